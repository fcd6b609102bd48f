"""Ceilings for what a step of decoding and question prefill move, write and need, by the compilers' own account.

The widths are the 7B's: with narrower kernels and heads, activations and padded tiles weigh more than they do there,
and a cache fits into a TPU core's own memory. Each layer is the same program again, so two are enough.
"""

import dataclasses
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax.capacity.programs import Programs, slice_mesh
from llava_jax.capacity.report import compiler_is_there, default_axes
from llava_jax.capacity.roofline import GPUS, TOPOLOGIES, Precision, Shapes
from llava_jax.config import LlavaConfig
from llava_jax.inference import generate
from llava_jax.inference.cache import Prefix
from llava_jax.inference.sampling import Greedy
from llava_jax.inputs.types import Questions
from llava_jax.models.quantize import Int8
from llava_jax.parallel.sharding import batch_sharding, num_batch_shards
from llava_jax.parallel.target import half_precision

pytestmark = pytest.mark.usefixtures("no_tpu")
QUESTION, SLOTS, PREFIX = 64, 128, 3072
MIB = 2**20

# Bytes of HBM that a step moves, over those that cannot be avoided. By topology, and groups x rows on each shard
CEILINGS = {
    ("h100", 1, 1): 1.01,
    ("h100", 8, 16): 1.13,
    ("v5e-1", 1, 1): 1.01,
    ("v5e-1", 8, 16): 1.03,
    ("v5e-4", 1, 1): 1.01,
    ("v5e-4", 8, 16): 1.03,
    ("v5e-8", 1, 1): 1.01,
    ("v5e-8", 8, 16): 1.03,
    ("v6e-8", 1, 1): 1.01,
    ("v6e-8", 8, 16): 1.03,
}
QUESTION_MIB = {"h100": 330, "v5e-1": 540, "v5e-4": 390}  # temporaries of question prefill, 8 x 16; no scores


def shallow(config: LlavaConfig, layers: int) -> LlavaConfig:
    text, vision = (dataclasses.replace(part, num_hidden_layers=layers) for part in (config.text, config.vision))
    return config.replace(text=text, vision=vision)


def programs(topology: str, rows: int, layers: int) -> Programs:
    where, config = TOPOLOGIES[topology], LlavaConfig.preset("1.6-vicuna-7b")
    precision = Precision("int8", True) if topology == "v5e-1" else Precision()  # it has no room for bfloat16
    mesh = slice_mesh(where, **default_axes(config, where, precision))
    return Programs(shallow(config, layers), mesh, Shapes(PREFIX, rows, QUESTION, SLOTS), precision)


def prefixes(of: Programs, groups: int):
    """What prefill gives, abstract: divided over the batch's axes, and by heads over `tensor`."""
    text, dtype = of.config.text, half_precision(of.mesh.devices.flat[0])
    by_group, by_head = batch_sharding(of.mesh), heads_sharding(of)
    array = jax.ShapeDtypeStruct
    keys = groups, text.num_key_value_heads, PREFIX, text.head_dim
    if of.precision.int8_prefix:
        scale = array(keys[:3], jnp.float32, sharding=by_head)
        one: Any = Int8(array(keys, jnp.int8, sharding=by_head), scale)
    else:
        one = array(keys, dtype, sharding=by_head)
    lengths = array((groups,), jnp.int32, sharding=by_group)
    last_hidden = array((groups, text.hidden_size), dtype, sharding=by_group)
    return Prefix([(one, one)] * text.num_hidden_layers, lengths), last_hidden


def heads_sharding(of: Programs) -> NamedSharding:
    return NamedSharding(of.mesh, PartitionSpec(*batch_sharding(of.mesh).spec, "tensor"))


def state(of: Programs, groups: int):
    """What question prefill gives, abstract."""
    rows = groups, of.shapes.rows
    array = jax.ShapeDtypeStruct
    questions = Questions(array((*rows, QUESTION), jnp.int32), array(rows, jnp.int32), array(rows, bool))
    ask = partial(generate.sample_first_token, of.model, SLOTS)
    with jax.set_mesh(of.mesh):
        out = jax.eval_shape(ask, of.params(), *prefixes(of, groups), questions, Greedy())

    def place(x):
        whole = NamedSharding(of.mesh, PartitionSpec())
        by = heads_sharding(of) if x.ndim == 5 else batch_sharding(of.mesh) if x.ndim else whole
        return array(x.shape, x.dtype, sharding=by)

    return jax.tree.map(place, out)


def cases(combinations):
    for case in combinations:
        of_a_gpu = pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'")
        mark = of_a_gpu if case[0] in GPUS else pytest.mark.long
        yield pytest.param(*case, marks=mark, id="-".join(map(str, case)))


def decode_program(topology: str, groups: int, rows: int):
    """The decode loop of two layers, `groups` prefixes on each shard."""
    of = programs(topology, rows, layers=2)
    groups *= num_batch_shards(of.mesh)
    return of.decode(groups, prefixes(of, groups), state(of, groups))


def question_program(topology: str, layers: int):
    """Question prefill, 16 rows on each of 8 prefixes on each shard."""
    of = programs(topology, 16, layers)
    groups = 8 * num_batch_shards(of.mesh)
    return of.question(groups, prefixes(of, groups))[0]


@pytest.mark.parametrize("topology, groups, rows", list(cases(CEILINGS)))
def test_a_step_of_decoding(topology, groups, rows):
    decode = decode_program(topology, groups, rows)
    assert decode.step.ratio < CEILINGS[topology, groups, rows]
    for where, counts in decode.whole_writes.items():
        assert not any(counts.values()), (where, counts)


@pytest.mark.parametrize("topology, layers", list(cases([("h100", 2), ("v5e-1", 1), ("v5e-4", 1)])))
def test_question_prefill(topology, layers):
    question = question_program(topology, layers)
    assert question.temporaries < QUESTION_MIB[topology] * MIB
    made_once = {"prefix": 0, "suffix": 2 * layers, "kernel": 0}
    assert question.whole_writes["program"] == made_once


def main(topologies: list[str]) -> None:
    print("| | wave | a step moves, MiB | of the unavoidable | estimated cycles | temporaries, MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for topology, groups, rows in (case for case in CEILINGS if case[0] in topologies):
        decode = decode_program(topology, groups, rows)
        step, cycles = decode.step, f"{decode.step.cycles:,}" if decode.step.cycles else ""
        figures = f"{step.bytes / MIB:,.0f} | {step.ratio:.2f} | {cycles} | {decode.temporaries / MIB:.0f}"
        print(f"| {topology} | {groups} x {rows} | {figures} |", flush=True)
    for topology in topologies:
        question = question_program(topology, layers=2)
        moved, made = question.once.bytes / MIB, question.temporaries / MIB
        print(f"{topology}, questions, 8 x 16: {moved:,.0f} MiB moved, {made:.0f} MiB of temporaries", flush=True)


if __name__ == "__main__":  # TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/test_ceilings.py v5e-8 h100
    main(sys.argv[1:])
