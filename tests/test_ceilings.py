"""Ceilings for what a step of decoding and question prefill move, write and need, by the compilers' own account.

The widths are the 7B's: with narrower kernels and heads, activations and padded tiles weigh more than they do there,
and a cache fits into a TPU core's own memory. Each layer is the same program again, so two are enough, but where that
memory (128 MiB) holds one array of suffixes: on v5e slices, 8 x 16 with two chips to a model.
"""

import dataclasses
from dataclasses import dataclass, field
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
from llava_jax.parallel.gpu import half_precision
from llava_jax.parallel.sharding import batch_sharding, num_batch_shards

pytestmark = pytest.mark.usefixtures("no_tpu")
QUESTION, SLOTS, PREFIX = 64, 128, 3072


@dataclass(frozen=True)
class Ceiling:
    step: float  # bytes of HBM that a step moves, over those that cannot be avoided
    layers: int
    written: dict[str, dict[str, int]] = field(default_factory=dict)  # whole arrays; what is not named: none


THROUGH_VMEM = {"step": {"suffix": 4}}  # of one row, a MiB or two each: fetched, updated and written back on a TPU
CEILINGS = {  # by topology and groups x rows on each shard of the mesh
    ("h100", 1, 1): Ceiling(1.01, 2),
    ("h100", 8, 16): Ceiling(1.13, 2),
    ("v5e-1", 1, 1): Ceiling(1.02, 2, THROUGH_VMEM),
    ("v5e-1", 8, 16): Ceiling(1.03, 2),
    ("v5e-4", 1, 1): Ceiling(1.02, 2, THROUGH_VMEM),
    ("v5e-4", 8, 16): Ceiling(1.06, 4),
    ("v5e-8", 1, 1): Ceiling(1.02, 2, THROUGH_VMEM),
    ("v5e-8", 8, 16): Ceiling(1.06, 4),
    ("v6e-8", 1, 1): Ceiling(1.01, 2, THROUGH_VMEM),
    ("v6e-8", 8, 16): Ceiling(1.02, 2),
}
QUESTION_MIB = 330  # temporaries of question prefill on an H100, 8 x 16


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


def cases():
    for topology, groups, rows in CEILINGS:
        of_a_gpu = pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'")
        daily = (topology, groups) == ("v5e-4", 1)  # 5 s
        mark = of_a_gpu if topology in GPUS else () if daily else pytest.mark.long
        yield pytest.param(topology, groups, rows, marks=mark, id=f"{topology}-{groups}x{rows}")


@pytest.mark.parametrize("topology, groups, rows", list(cases()))
def test_a_step_of_decoding(topology, groups, rows):
    ceiling = CEILINGS[topology, groups, rows]
    of = programs(topology, rows, ceiling.layers)
    groups *= num_batch_shards(of.mesh)
    decode = of.decode(groups, prefixes(of, groups), state(of, groups))
    assert decode.step.ratio < ceiling.step
    for where, counts in decode.whole_writes.items():
        allowed = ceiling.written.get(where, {})
        assert {part: count for part, count in counts.items() if count > allowed.get(part, 0)} == {}, where


@pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'")
def test_question_prefill():
    of = programs("h100", 16, 2)
    question, _ = of.question(8, prefixes(of, 8))
    assert question.temporaries < QUESTION_MIB << 20
    assert question.whole_writes["program"] == {"prefix": 0, "suffix": 4, "kernel": 0}  # each is made once
