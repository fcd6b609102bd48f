"""Attention as it is compiled for GPUs that are not there, with llava-jax[cuda-ahead], which .ci/run has apart."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_capacity import small

from llava_jax.capacity.ahead import slice_mesh
from llava_jax.capacity.programs import Programs
from llava_jax.capacity.report import compiler_is_there
from llava_jax.capacity.roofline import GPUS, Precision
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import one_pool
from llava_jax.models.attention import causal_attention, full_attention
from llava_jax.models.cache_attention import Appended, Own, attend_and_append, decode_attention, question_attention
from llava_jax.models.quantize import Int8
from llava_jax.parallel.target import Gpu, target_gpu

pytestmark = [
    pytest.mark.usefixtures("no_tpu"),
    pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'"),
]
KERNEL = 'custom_call_target="__gpu$xla.gpu.triton"'


@pytest.mark.parametrize("name", GPUS)
def test_the_gpu_of_a_program_is_the_one_it_is_compiled_for(name):
    card = GPUS[name].card
    with jax.set_mesh(slice_mesh(GPUS[name], tensor=GPUS[name].chips)):
        assert target_gpu() == Gpu(card.capability, card.cores)


def array(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compiled(mesh, attend, *arguments, **options):
    with jax.set_mesh(mesh):
        return jax.jit(lambda *arrays: attend(*arrays)).lower(*arguments).compile(options)


def cache_arguments(mesh, attend, groups, rows, kv_heads, int8=False, dtype=jnp.bfloat16, by=(None, None)):
    """A 7B's or Mistral's heads, prefixes of 3,072, questions of 64 positions or a suffix of 192 slots."""
    new, slots = (64, 64) if attend is question_attention else (1, 192)
    data, tensor = by
    q = array(mesh, (groups, rows, new, 32, 128), dtype, data, None, None, tensor)
    own = array(mesh, (groups, kv_heads, rows, slots, 128), dtype, data, tensor)
    prefix = array(mesh, (groups, kv_heads, 3072, 128), jnp.int8 if int8 else dtype, data, tensor)
    if int8:
        prefix = Int8(prefix, array(mesh, prefix.shape[:3], jnp.float32, data, tensor))
    valid = [] if attend is question_attention else [array(mesh, (groups, rows, slots), jnp.bool, data)]
    return q, own, own, *valid, prefix, prefix, array(mesh, (groups,), jnp.int32, data)


def blocks_arguments(mesh, kv_heads, int8=False, by=(None, None)):
    """Of `attend_and_append`: as `cache_arguments`, but four rows of 128 slots beside two of 512."""
    q, *_, prefix_k, prefix_v, lengths = cache_arguments(mesh, decode_attention, 8, 6, kv_heads, int8, by=by)
    blocks = []
    for rows, slots in ((4, 128), (2, 512)):
        new, suffix = ((array(mesh, (8, kv_heads, rows, n, 128), jnp.bfloat16, *by),) * 2 for n in (1, slots))
        own = Own(suffix, array(mesh, (8, rows, slots), jnp.bool, by[0]), lengths)
        blocks.append(Appended(new, array(mesh, (), jnp.int32), None, own))
    return q, blocks, prefix_k, prefix_v


@pytest.mark.parametrize("name", ["h100", "a100", "l4"])
@pytest.mark.parametrize("attend", [decode_attention, question_attention])
@pytest.mark.parametrize(
    ("groups", "rows", "kv_heads", "int8"),
    [(8, 16, 32, False), (8, 16, 8, False), (8, 16, 8, True), (8, 16, 32, True), (1, 1, 32, False), (1, 1, 8, True)],
)
def test_no_register_is_spilled(name, attend, groups, rows, kv_heads, int8):
    """1 to 3 s each."""
    mesh = slice_mesh(GPUS[name], tensor=1)
    assert_one_kernel(mesh, attend, cache_arguments(mesh, attend, groups, rows, kv_heads, int8))


@pytest.mark.parametrize("name", ["h100", "a100", "l4"])
@pytest.mark.parametrize("kv_heads, int8", [(32, False), (8, True)])
def test_blocks_of_rows_read_a_prefix_once(name, kv_heads, int8):
    """3 s each."""
    mesh = slice_mesh(GPUS[name], tensor=1)
    assert_one_kernel(mesh, attend_and_append, blocks_arguments(mesh, kv_heads, int8))


def assert_one_kernel(mesh, attend, arguments):
    """Which stores nothing because it has no more registers: the compiler refuses it else."""
    program = compiled(mesh, attend, *arguments, xla_gpu_fail_ptx_compilation_on_register_spilling=True)
    assert program.as_text().count(KERNEL) == 1
    assert program.memory_analysis().temp_size_in_bytes < 10 << 20  # no scores; splits of few heads


def test_a_gpu_without_the_kernel_gets_xlas_form():
    mesh = slice_mesh(GPUS["t4"], tensor=1)
    arguments = cache_arguments(mesh, decode_attention, 1, 1, 8, dtype=jnp.float16)
    assert KERNEL not in compiled(mesh, decode_attention, *arguments).as_text()
    part = array(mesh, (1, 640, 4, 64), jnp.float16)
    assert "cudnn" not in compiled(mesh, causal_attention, part, part, part).as_text()


@pytest.mark.parametrize("attend", [decode_attention, question_attention, attend_and_append])
def test_the_cache_on_a_mesh_sends_nothing(attend):
    mesh, by = slice_mesh(GPUS["h100-8"], data=2, tensor=4), ("data", "tensor")
    blocks = attend is attend_and_append
    arguments = blocks_arguments(mesh, 8, by=by) if blocks else cache_arguments(mesh, attend, 8, 16, 8, by=by)
    text = compiled(mesh, attend, *arguments).as_text()
    assert text.count(KERNEL) == 1 and "bf16[4,2,3072,128]" in text
    assert not any(sent in text for sent in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("by", ["data", "both"])
def test_the_tower_by_cudnn_on_a_mesh(by):
    """577 positions; divided over tiles and heads, or over tiles by both axes."""
    mesh = slice_mesh(GPUS["h100-8"], data=2, tensor=4)
    spec = ("data", None, "tensor") if by == "data" else (("data", "tensor"),)
    part = array(mesh, (8, 577, 16, 64), jnp.bfloat16, *spec)
    program = compiled(mesh, full_attention, part, part, part)
    text = program.as_text()
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert not any(sent in text for sent in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert program.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("chips", [1, 2])
def test_without_the_kernel_the_suffix_is_not_turned_round(chips):
    """Neither before the decode loop nor after it, nor gathered: narrow, two layers, 15 s."""
    config, shape = small(LlavaConfig.preset("1.6-vicuna-7b")), one_pool(1, 4, 1024, 16, 64, 128)
    where = dataclasses.replace(GPUS["t4"], chips=chips)
    decode = Programs(config, slice_mesh(where, tensor=chips), shape, Precision()).decode()
    written = {section: counts["suffix of 192"] for section, counts in decode.whole_writes.items()}
    assert written == {"before": 0, "step": 0, "after": 0}
    assert decode.collectives.decoder == (0 if chips == 1 else 2)
