"""The programs of a continuous batch, compiled for chips that are not there, and what the compiler made of them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from llava_jax.capacity import roofline, traffic
from llava_jax.capacity.ahead import (
    Compiled,
    abstract_array,
    abstract_params,
    chip_bytes,
    compile_for,
    compile_if_it_fits,
)
from llava_jax.capacity.hlo import Module, parse
from llava_jax.capacity.roofline import Precision, Work
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import BatchShape, Block
from llava_jax.inference.engine import Engine
from llava_jax.inference.pool import Pool
from llava_jax.inference.requests import RowOptions
from llava_jax.inference.rows import Rows, row_settings
from llava_jax.inputs.groups import CacheLayout
from llava_jax.inputs.types import Questions
from llava_jax.parallel.sharding import batch_sharding
from llava_jax.parallel.target import default_dtype


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
    """One compiled program, in bytes of HBM on one chip."""

    seconds: float  # of compiling
    inputs: int  # besides parameters, pools and rows, which are there all the time
    temporaries: int
    outputs: int  # that are not inputs, pools or rows given back
    code: int
    once: Moved  # in one run, but for the decode loop
    step: Moved | None  # at each step of the decode loop, where there is one
    whole_writes: dict[str, dict[str, int]]  # of prefix and suffix arrays and kernels: see `traffic.whole_writes`
    collectives: traffic.Collectives

    @property
    def total(self) -> int:
        """Beside what is there all the time, and its code, which stays while other programs run."""
        return self.inputs + self.temporaries + self.outputs


@dataclass(frozen=True)
class Programs:
    """What the engine compiles for a batch of this shape, for one model on one mesh."""

    config: LlavaConfig
    mesh: Mesh
    shape: BatchShape
    precision: Precision

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.config, self.mesh, self.precision.int8_prefix, self.precision.int8_activations)

    @cached_property
    def params(self) -> dict:
        return abstract_params(self.config, self.mesh, self.precision.quantize)

    @cached_property
    def pools(self) -> list[Pool]:
        make, dtype = self.engine.batch.pool_shapes, self._dtype
        return [make(self.shape.groups, pool.capacity, dtype) for pool in self.shape.pools]

    @cached_property
    def rows(self) -> dict[Block, Rows]:
        make, dtype = self.engine.batch.rows_shapes, self._dtype
        return {block: make(self.shape.groups, *self.shape.row_class(block), dtype) for block in self.shape.blocks}

    @property
    def cache_bytes(self) -> int:
        """Pools and rows, on one chip."""
        return chip_bytes((self.pools, self.rows))

    @property
    def layout(self) -> CacheLayout:
        with jax.default_matmul_precision("default"):  # as it is compiled: "highest" has no splash in bfloat16
            return self.engine.cache_layout(self.params)

    # ---- prefixes

    def encode(self) -> Program:
        """A picture of as many tiles as there can be, into a prefix of each shard."""
        side, tiles = self.config.tile_size, self.shape.shards * self.config.max_tiles_per_image
        pictures = self._array(tiles, side, side, 3, dtype=jnp.uint8)
        length = self.shape.pools[-1].capacity
        inputs = self._embeds, pictures, self._array(self.shape.shards, length)
        compiled = self._compile(self.engine.batch.place_image, self.params, *inputs)
        return self._read("encode", compiled, inputs, self._works["encode"])

    def prefill(self, pool: int = -1) -> Program | None:
        """A prefix of each shard: the whole of it, or as much as is prefilled at a time."""
        size = min(self.shape.chunk or math.inf, self.shape.pools[pool].capacity)
        inputs = self._embeds, self._per_shard, self._per_shard
        compiled = self._if_it_fits(self.engine.batch.prefill_first, size, self.params, self.pools[pool], *inputs)
        return compiled and self._read("prefill", compiled, inputs, self._works["prefill"])

    def prefill_next(self, size: int, pool: int = -1) -> Program:
        """`size` more positions of a prefix of each shard."""
        inputs = self._embeds, *[self._per_shard] * 3
        compiled = self._compile(self.engine.batch.prefill_next, size, self.params, self.pools[pool], *inputs)
        return self._read(f"prefill of {size} more", compiled, inputs)

    def copy(self, pool: int = -1) -> Program:
        """A prefix of each shard into another slot."""
        inputs = self._per_shard, self._per_shard
        compiled = self._compile(self.engine.batch.copy_slot, self.pools[pool], self.shape.shards, *inputs)
        return self._read("copy", compiled, inputs)

    # ---- rows

    def questions(self, block: Block) -> Program | None:
        """As many as are admitted together, on a prefix of each shard."""
        count, lanes = self.shape.admitted, self.shape.shards
        row_ids = self._array(lanes, count)
        said = self._array(lanes, count, self.shape.max_model_len)
        behind = row_ids, self._questions, self._settings, row_ids, said
        compiled = self._if_it_fits(
            self.engine.batch.admit,
            self.params,
            self.pools[block.pool],
            self._per_shard,
            self.rows[block],
            self._per_shard,
            *behind,
        )
        return compiled and self._read("question", compiled, behind, self._works["question"])

    def decode(self, blocks: Sequence[Block] | None = None) -> Program | None:
        """The decode loop for the rows of these blocks, or of all."""
        blocks = self.shape.blocks if blocks is None else blocks
        pools = sorted({block.pool for block in blocks})
        active = [self._array(self.shape.groups, self.shape.row_class(block).rows, dtype=bool) for block in blocks]
        lengths = [self._array(self.shape.groups) for _ in pools]
        compiled = self._if_it_fits(
            self.engine.batch.decode,
            self.shape.decode_steps,
            self.params,
            [self.pools[n] for n in pools],
            lengths,
            [[self.rows[block] for block in blocks if block.pool == n] for n in pools],
            active,
            _NUMBER,
            _NUMBER,
        )
        tensor = self.mesh.shape.get("tensor", 1)
        step = roofline.step(self.config, self.shape, blocks, tensor, self.precision)
        return compiled and self._read("decode", compiled, (lengths, active), step=step)

    def move(self, block: Block) -> Program:
        """A row of each shard into the block of longer ones."""
        inputs = [self._per_shard] * 4
        shorts, longs = self.rows[block], self.rows[block.following]
        compiled = self._compile(self.engine.batch.move, shorts, longs, self.shape.shards, *inputs)
        return self._read("move", compiled, inputs)

    def score(self, pool: int = -1) -> Program:
        """Answers to choose from, on a prefix of each shard."""
        at = self.pools[pool], self.shape.shards, self._per_shard, self._per_shard
        compiled = self._compile(self.engine.batch.score, self.params, *at, self._questions)
        return self._read("score", compiled, self._questions)

    # ---- abstract arguments

    @property
    def _dtype(self):
        return default_dtype(self.mesh.devices.flat[0])

    def _array(self, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return abstract_array(batch_sharding(self.mesh), *shape, dtype=dtype)

    @property
    def _per_shard(self) -> jax.ShapeDtypeStruct:
        return self._array(self.shape.shards)

    @property
    def _questions(self) -> Questions:
        rows = self.shape.shards, self.shape.admitted
        return Questions(self._array(*rows, self.shape.question), self._array(*rows), self._array(*rows, dtype=bool))

    @property
    def _settings(self):
        rows = self.shape.shards, self.shape.admitted
        one = row_settings(RowOptions(1), 1)
        return jax.tree.map(lambda x: self._array(*rows, *x.shape, dtype=x.dtype), one)

    @cached_property
    def _embeds(self):
        """A prefix of each shard, embedded, placed as the compiler places it."""
        text = self._array(self.shape.shards, self.shape.pools[-1].capacity)
        return self._compile(self.engine.batch.embed_text, self.params, text).out

    # ---- what became of them

    def _compile(self, program, *arguments) -> Compiled:
        return compile_for(self.mesh, program.jitted, *arguments)

    def _if_it_fits(self, program, *arguments) -> Compiled | None:
        return compile_if_it_fits(self.mesh, program.jitted, *arguments)

    @property
    def _works(self) -> dict[str, Work]:
        return roofline.works(self.config, self.shape, self.mesh.shape.get("tensor", 1), self.precision)

    def _read(
        self, name: str, compiled: Compiled, inputs, once: Work | None = None, step: Work | None = None
    ) -> Program:
        print(f"{name}: {compiled.seconds:.0f} s of compiling", file=sys.stderr)
        memory, module = compiled.executable.memory_analysis(), parse(compiled.text)
        return Program(
            seconds=compiled.seconds,
            inputs=chip_bytes(inputs),
            temporaries=memory.temp_size_in_bytes,
            outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            once=_moved(module, [module.entry], once),
            step=_moved(module, module.loops, step) if step else None,
            whole_writes=traffic.whole_writes(module, self._watched),
            collectives=traffic.collectives(module),
        )

    @cached_property
    def _watched(self) -> traffic.Watched:
        def shape(x):
            return x.sharding.shard_shape(x.shape)

        prefixes = [jax.tree.leaves(pool)[0] for pool in self.pools]
        cache = {f"prefix of {keys.shape[2]}": shape(keys) for keys in prefixes}
        for rows in self.rows.values():
            keys = rows.suffix.keys_values[0][0]
            cache[f"suffix of {keys.shape[3]}"] = shape(keys)
        return traffic.Watched(self._kernel_shapes(), cache)

    def _kernel_shapes(self) -> set[tuple[int, ...]]:
        """Of each kernel on one chip, and of those of a layer that read the same input and may be put side by side."""
        together: dict[tuple[str, int], list[int]] = {}
        for path, array in flatten_dict(self.params, sep="/").items():
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


_NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def _moved(module: Module, names: list[str], work: Work | None) -> Moved:
    moved = sum(traffic.computation_traffic(module, name).moved for name in names)
    cycles = sum(traffic.estimated_cycles(module, name) for name in names)
    return Moved(round(moved), round(work.moved) if work else 0, cycles)
