"""On a real GPU or TPU: `JAX_PLATFORMS=cuda pytest -m accelerator` (or tpu). Left out of the default run."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import plain_attention, qkv
from test_triton_attention import arrays, in_blocks, slots_used

import llava_jax
from llava_jax.models.attention import full_attention
from llava_jax.models.cache_attention import Appended, attend_and_append, decode_attention, question_attention
from llava_jax.models.quantize import to_int8
from llava_jax.models.triton_attention import takes
from llava_jax.parallel.target import target_gpu

pytestmark = pytest.mark.accelerator


@pytest.mark.parametrize("variant, name", [("vicuna", "chelsea"), ("mistral", "astronaut"), ("s2", "coffee")])
def test_recorded_tokens_and_logits(golden, converted, pictures, variant, name):
    """Float32 at the highest precision; looser than on a CPU, whose sums the reference shares."""
    assert jax.default_backend() != "cpu"
    recorded, (llava, params) = golden(variant), llava_jax.load(converted(variant), dtype="float32")
    ids, picture = recorded["image/input_ids"], pictures[name]
    logits = llava.forward(params, ids, picture).logits[0, -1]
    np.testing.assert_allclose(logits[::11], recorded[f"image/{name}/logits_last"], atol=1e-3)
    tokens = llava.generate_tokens(params, ids, picture, max_new_tokens=16)
    assert tokens.tolist() == recorded[f"image/{name}/generated"].tolist()


def test_bfloat16_is_the_default_there(converted, pictures):
    llava, params = llava_jax.load(converted("vicuna"))
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(params))
    assert llava.generate(params, pictures["chelsea"], "What is it?", max_new_tokens=8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("attend", [decode_attention, question_attention])
@pytest.mark.parametrize("rows, kv_heads", [(5, 2), (1, 8), (24, 4)])
def test_attention_over_the_cache_is_xlas_form(attend, int8, rows, kv_heads):
    """The GPU's kernel, half precision: parts that no block divides, and what is valid with holes."""
    questions = attend is question_attention
    new, slots = (40, 40) if questions else (1, 72)
    q, k, v, *prefix = arrays(2, rows, new, slots, 330, 8, kv_heads, 128, jnp.bfloat16)
    prefix = [to_int8(x, -1) for x in prefix] if int8 else prefix
    valid = [] if questions else [slots_used(2, rows, slots, 50)]
    assert_xlas_form(attend, q, k, v, *valid, *prefix, np.array([330, 75], np.int32))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_blocks_of_rows_over_the_cache(int8, kv_heads):
    """What is appended to them is in their slot already."""
    q, k, v, *prefix = arrays(2, 8, 1, 200, 330, 8, kv_heads, 128, jnp.bfloat16)
    prefix = [to_int8(x, -1) for x in prefix] if int8 else prefix
    lengths = [np.array([330, 75], np.int32), np.array([0, 75], np.int32)]
    _, owns = in_blocks(((5, 72, 50), (3, 200, 170)), k, v, lengths)
    blocks = [Appended(tuple(x[:, :, :, 9:10] for x in own.suffix), np.int32(9), None, own) for own in owns]
    assert_xlas_form(lambda *arrays: attend_and_append(*arrays)[0], q, blocks, *prefix)


def assert_xlas_form(attend, q, *others):
    arguments = q, *others
    here = jax.jit(lambda *arrays: attend(*arrays))
    if jax.default_backend() == "gpu" and takes(q, target_gpu()):
        assert "cache_attention" in here.lower(*arguments).as_text()
    with mock.patch("llava_jax.models.cache_attention.target_gpu", lambda: None):
        by_xla = jax.jit(lambda *arrays: attend(*arrays))(*arguments)
    np.testing.assert_allclose(np.float32(here(*arguments)), np.float32(by_xla), atol=0.05)


@pytest.mark.parametrize("positions", [577, 256])
def test_the_tower_attends_to_everything(positions):
    """By cudnn on a GPU that has it: bfloat16 against the plain formula."""
    parts = [jnp.asarray(x, jnp.bfloat16) for x in qkv(positions, 4, 4, 64)]
    if jax.default_backend() == "gpu" and target_gpu().compute_capability >= (8, 0):
        assert "__cudnn$fmha" in jax.jit(lambda *parts: full_attention(*parts)).lower(*parts).as_text()
    q, k, v = (np.asarray(x, np.float32) for x in parts)
    out = np.asarray(jax.jit(full_attention)(*parts), np.float32)
    for row in range(2):
        plain = plain_attention(q[row], k[row], v[row], np.ones((positions, positions), bool))
        np.testing.assert_allclose(out[row], plain, atol=0.02)
