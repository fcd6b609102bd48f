"""Batch evaluation's programs, compiled for chips that are not there, and what the compiler made of them.

libtpu alone is needed for TPUs, and JAX's CUDA plugin for GPUs. Neither may look for its chips: see NO_TPU in
`llava_jax.capacity.report`.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh

from llava_jax.capacity import traffic
from llava_jax.capacity.hlo import Module, parse
from llava_jax.capacity.roofline import Gpus, Precision, Shapes, Slice, Work, position_bytes, works
from llava_jax.compiling import compiler_options
from llava_jax.config import LlavaConfig
from llava_jax.inference import generate
from llava_jax.inference.sampling import Greedy
from llava_jax.inputs.groups import MAX_GROUPS
from llava_jax.inputs.types import Batch, Questions
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM, param_shapes
from llava_jax.models.quantize import is_quantized, with_scales
from llava_jax.parallel.sharding import batch_sharding, make_mesh, num_batch_shards, param_shardings
from llava_jax.parallel.target import half_precision


@dataclass(frozen=True)
class Moved:
    """Bytes of HBM on one chip."""

    bytes: int
    unavoidable: int  # see `roofline.Work`
    cycles: int  # libtpu's own estimate, to rank programs by and no measurement; 0 for GPUs

    @property
    def ratio(self) -> float | None:
        """How many times the unavoidable bytes; None where nothing is unavoidable."""
        return self.bytes / self.unavoidable if self.unavoidable else None


@dataclass(frozen=True)
class Program:
    """One compiled program, in bytes of HBM on one chip. Its arguments are all the parameters, and its own."""

    seconds: float  # of compiling
    arguments: int
    temporaries: int
    outputs: int  # that are not arguments given back
    code: int
    once: Moved  # in one run, but for the decode loop
    step: Moved | None  # at each step of the decode loop, where there is one
    whole_writes: dict[str, dict[str, int]]  # of prefix and suffix arrays and kernels: see `traffic.whole_writes`
    collectives: traffic.Collectives

    @property
    def total(self) -> int:
        """Without its code, which stays while other programs run."""
        return self.arguments + self.temporaries + self.outputs


# ---- compiling


def slice_mesh(where: Slice | Gpus, **axes: int) -> Mesh:
    """A mesh over a slice's chips, e.g. `slice_mesh(SLICES["v5e-8"], data=1, tensor=8)`, or over a machine's GPUs."""
    return make_mesh(topologies.get_topology_desc(**where.description).devices, **axes)


def abstract_params(config: LlavaConfig, mesh: Mesh, quantize: str | None = None):
    """The parameters as `ShapeDtypeStruct`s in half precision, or int8, divided as the rules table has it."""
    dtype = half_precision(mesh.devices.flat[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), param_shapes(config))
    if quantize is not None:
        shapes = with_scales(shapes, [path for path in flatten_dict(shapes, sep="/") if is_quantized(path)])
    return jax.tree.map(lambda x, at: _array(at, *x.shape, dtype=x.dtype), shapes, param_shardings(shapes, mesh))


def _array(sharding, *shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def chip_bytes(tree) -> int:
    """What one chip holds of a tree of placed arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Compiled(NamedTuple):
    """What `compile_for` gives."""

    executable: Any  # a jax.stages.Compiled
    text: str  # its HLO
    out: Any  # its results, abstract, placed as the compiler placed them
    seconds: float  # of compiling


def compile_for(mesh: Mesh, function, *arguments, **options) -> Compiled:
    """`jax.jit(function)` for abstract arguments; `decodes`: see `compiler_options`."""
    thread = ThreadPoolExecutor(1)  # of its own: the compiler holds the one that calls it for minutes, deaf to Ctrl-C
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return thread.submit(_compile_for, folder, mesh, function, *arguments, **options).result()


def _compile_for(folder: str, mesh: Mesh, function, *arguments, decodes: bool = False, **options) -> Compiled:
    began = time.perf_counter()
    precision = jax.default_matmul_precision("default")  # "highest" has no splash in bfloat16
    tpu = mesh.devices.flat[0].platform == "tpu"
    with jax.set_mesh(mesh), precision:
        lowered = jax.jit(function, keep_unused=True, **options).lower(*arguments)
        asked: dict[str, Any] = compiler_options(mesh, decodes)
        if tpu:  # as_text() cannot parse all that libtpu writes
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **asked})
            text = next(Path(folder).glob("*.after_codegen.txt")).read_text()
        else:
            compiled = lowered.compile(asked)
            text = compiled.as_text() or ""
    out = jax.tree.map(lambda x, at: _array(at, *x.shape, dtype=x.dtype), lowered.out_info, compiled.output_shardings)
    return Compiled(compiled, text, out, time.perf_counter() - began)


def compile_if_it_fits(*args, **options) -> Compiled | None:
    """`compile_for`, or None where the compiler finds that a chip has no room for the program."""
    try:
        return compile_for(*args, **options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


@dataclass(frozen=True)
class Programs:
    """The programs of waves of any number of prefixes, for one model on one mesh."""

    config: LlavaConfig
    mesh: Mesh
    shapes: Shapes
    precision: Precision

    @property
    def model(self) -> LlavaLlamaForCausalLM:
        return LlavaLlamaForCausalLM(self.config, int8_prefix=self.precision.int8_prefix)

    def params(self):
        return abstract_params(self.config, self.mesh, self.precision.quantize)

    @property
    def prefix_bytes(self) -> int:
        """Keys and values of one prefix on one chip."""
        return self.shapes.prefix * self.precision.prefix(self.config.text) // self.mesh.shape.get("tensor", 1)

    def once(self) -> tuple[dict[str, Program], tuple]:
        """(encode and prefill of one picture for each shard of the rows, the prefixes and hidden states they give)."""
        rows, side, at = num_batch_shards(self.mesh), self.config.tile_size, batch_sharding(self.mesh)
        tiles = _array(at, rows * self.config.max_tiles_per_image, side, side, 3, dtype=jnp.uint8)
        text = _array(at, rows, 128) if rows > 1 else _array(at, 128)
        whole = (rows, self.shapes.prefix)
        mask = _array(at, *whole, dtype=bool)
        batch = Batch(tiles, text, _array(at, *whole), _array(at, *whole), mask, _array(at, rows))

        def encode(params, tiles):
            return self.model.apply({"params": params}, tiles, method="encode_images")

        encoded = compile_for(self.mesh, encode, self.params(), tiles)
        prefilled = compile_for(self.mesh, partial(generate.prefill, self.model), self.params(), batch)
        work, kernels = self._works(rows), traffic.Watched(self._kernel_shapes(), {})
        programs = {
            "encode": _read("encode", encoded, kernels, work["encode"]),
            "prefill": _read("prefill", prefilled, kernels, work["encode"] + work["prefill"]),
        }
        return programs, prefilled.out

    def answer(self, groups: int, prefixes) -> Program | None:
        """What evaluation runs for a wave of that many of those prefixes: question prefill and decode; None where
        the compiler finds that a chip has no room for it."""
        answer = partial(generate.generate_from_prefix, self.model, self.shapes.slots)
        answered = compile_if_it_fits(self.mesh, answer, *self._asked(groups, prefixes), _LIMIT, decodes=True)
        name, work, watched = f"answer to {groups} prefixes", self._works(groups), self._watched(groups, prefixes)
        return answered and _read(name, answered, watched, work["question"], work["step"])

    def question(self, groups: int, prefixes) -> tuple[Program, Any] | None:
        """(question prefill alone, to be looked at by itself, and the state that it gives), if it fits."""
        ask = partial(generate.sample_first_token, self.model, self.shapes.slots)
        asked = compile_if_it_fits(self.mesh, ask, *self._asked(groups, prefixes))
        watched, work = self._watched(groups, prefixes), self._works(groups)["question"]
        return asked and (_read("question", asked, watched, work), asked.out)

    def decode(self, groups: int, prefixes, state) -> Program | None:
        """The decode loop alone, if it fits."""
        params, prefix, *_, sampling = self._asked(groups, prefixes)
        run, arguments = partial(generate.decode_loop, self.model), (params, prefix, state, sampling, _LIMIT)
        decoded = compile_if_it_fits(self.mesh, run, *arguments, decodes=True, donate_argnums=2)
        watched, work = self._watched(groups, prefixes), self._works(groups)["step"]
        return decoded and _read("decode", decoded, watched, None, work)

    def _asked(self, groups: int, prefixes):
        prefix, last = jax.tree.map(lambda x: _array(x.sharding, groups, *x.shape[1:], dtype=x.dtype), prefixes)
        at, rows = batch_sharding(self.mesh), (groups, self.shapes.rows)
        ids, mask = _array(at, *rows, self.shapes.question), _array(at, *rows, dtype=bool)
        return self.params(), prefix, last, Questions(ids, _array(at, *rows), mask), Greedy()

    def _works(self, groups: int) -> dict[str, Work]:
        shards, tensor = num_batch_shards(self.mesh), self.mesh.shape.get("tensor", 1)
        return works(self.config, self.shapes, groups // shards, tensor, self.precision)

    def _watched(self, groups: int, prefixes) -> traffic.Watched:
        prefix, shards = jax.tree.leaves(prefixes[0].keys_values)[0], num_batch_shards(self.mesh)
        _, heads, length, width = prefix.sharding.shard_shape(prefix.shape)
        groups, slots = groups // shards, self.shapes.question + self.shapes.slots
        cache = {"prefix": (groups, heads, length, width), "suffix": (groups, heads, self.shapes.rows, slots, width)}
        return traffic.Watched(self._kernel_shapes(), cache)

    def _kernel_shapes(self) -> set[tuple[int, ...]]:
        """Of each kernel on one chip, and of those of a layer that read the same input and may be put side by side."""
        together: dict[tuple[str, int], list[int]] = {}
        for path, array in flatten_dict(self.params(), sep="/").items():
            if path.endswith(("/kernel", "/embedding")) and "position" not in path:
                *layer, _, _ = path.split("/")
                height, *width = array.sharding.shard_shape(array.shape)
                together.setdefault(("/".join(layer), height), []).append(math.prod(width))
        sides = (
            (height, sum(widths))
            for (_, height), all_widths in together.items()
            for count in range(1, len(all_widths) + 1)
            for widths in itertools.combinations(all_widths, count)
        )
        return set(sides)


_LIMIT = jax.ShapeDtypeStruct((), jnp.int32)


def _read(
    name: str, compiled: Compiled, watched: traffic.Watched, once: Work | None, step: Work | None = None
) -> Program:
    print(f"{name}: {compiled.seconds:.0f} s of compiling", file=sys.stderr)
    memory, module = compiled.executable.memory_analysis(), parse(compiled.text)
    return Program(
        seconds=compiled.seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        once=_moved(module, [module.entry], once),
        step=_moved(module, module.loops, step) if step else None,
        whole_writes=traffic.whole_writes(module, watched),
        collectives=traffic.collectives(module),
    )


def _moved(module: Module, names: list[str], work: Work | None) -> Moved:
    moved = sum(traffic.computation_traffic(module, name).moved for name in names)
    cycles = sum(traffic.estimated_cycles(module, name) for name in names)
    return Moved(round(moved), round(work.moved) if work else 0, cycles)


# ---- how many prefixes fit

TRIES = 6  # waves compiled on the way to the largest


@dataclass(frozen=True)
class Capacity:
    """What a slice has room for. Bytes are of HBM on one chip."""

    params: int
    prefix: int  # of one prefix (of one on each of the mesh's shards of rows)
    groups: int  # the most prefixes that fit; 0: not even one, and there are no programs
    programs: dict[str, Program]  # encode, prefill; question and decode of a usual wave, as two programs
    waves: dict[int, AnswerBatch]  # by their number of prefixes


@dataclass(frozen=True)
class AnswerBatch:
    needed: int  # the most that a chip holds at any time, the code of all programs included
    answer: Program


def largest_wave(programs: Programs, room: float) -> Capacity:
    """The most that fit, of those that parameters and cache alone leave room for, and what was compiled on the way."""
    shards, params, bound = num_batch_shards(programs.mesh), chip_bytes(programs.params()), most_groups(programs, room)
    if bound < 1:
        return Capacity(params, programs.prefix_bytes, 0, {}, {})
    once, prefixes = programs.once()
    prefix = chip_bytes(prefixes[0].keys_values)

    def compiled(size: int) -> AnswerBatch | None:
        answer = programs.answer(size * shards, prefixes)
        return None if answer is None else AnswerBatch(needed(once["prefill"], answer, prefix, size), answer)

    tried = search(compiled, room, params, bound)
    groups = shards * max((size for size, wave in tried.items() if wave.needed <= room), default=0)
    halves = _halves(programs, min(groups, MAX_GROUPS * shards), prefixes) if groups else {}
    return Capacity(params, prefix, groups, once | halves, {size * shards: wave for size, wave in tried.items()})


def most_groups(programs: Programs, room: float) -> int:
    """How many prefixes on each shard parameters and cache alone leave room for."""
    text, tensor, shapes = programs.config.text, programs.mesh.shape.get("tensor", 1), programs.shapes
    suffix = shapes.rows * (shapes.question + shapes.slots) * position_bytes(text) // tensor
    return int((room - chip_bytes(programs.params())) // (programs.prefix_bytes + suffix))


def _halves(programs: Programs, groups: int, prefixes) -> dict[str, Program]:
    """What `answer` consists of, where it fits, for both want more together."""
    if not (asked := programs.question(groups, prefixes)):
        return {}
    question, state = asked
    decode = programs.decode(groups, prefixes, state)
    return {"question": question} | ({"decode": decode} if decode else {})


def search(compiled, room: float, params: int, bound: int) -> dict[int, AnswerBatch]:
    """Waves of up to `bound` prefixes, the largest that fits among them: first the usual one, then again and again
    where the line through the two that are nearest to the room meets it. `compiled` makes a number of prefixes into
    their AnswerBatch, or None where the compiler itself finds no room."""
    size = min(MAX_GROUPS, bound)
    tried: dict[int, AnswerBatch] = {}
    while size not in tried and len(tried) < TRIES:
        wave = compiled(size)
        if wave is None:
            bound, size = size - 1, (max(tried, default=0) + size) // 2
            if size:
                continue
            break
        tried[size] = wave
        near, far = (sorted(tried, key=lambda size: abs(tried[size].needed - room)) * 2)[:2]
        origin, at_origin = (0, params) if near == far else (far, tried[far].needed)
        each = max(1, (tried[near].needed - at_origin) / (near - origin))
        size = min(bound, max(1, int(near + (room - tried[near].needed) // each)))
        if size in tried and len(tried) == 1:  # one point is no line
            size = min(bound, size + 1)
    return dict(sorted(tried.items()))


def needed(prefill: Program, answer: Program, prefix: int, size: int) -> int:
    """The most that one chip holds at any time for a wave of `size` prefixes on each shard.

    That is the last prefill, beside the memory of all prefixes if there is more than one, or answering.
    """
    wave = size * prefix if size > 1 else 0
    at_most = max(prefill.total + wave, answer.total)
    return at_most + prefill.code + answer.code
