"""The GPU's kernel over the cache, in Pallas' interpreter, against XLA's form of it; and which programs get it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import normal, pretend

from llava_jax.models.cache_attention import decode_attention, question_attention
from llava_jax.models.quantize import to_int8
from llava_jax.models.triton_attention import Tiling, choose_tiling, takes, triton_attention
from llava_jax.parallel.target import Gpu

H100, A100, L4, T4 = Gpu((9, 0), 132), Gpu((8, 0), 108), Gpu((8, 9), 58), Gpu((7, 5), 40)


def arrays(groups, rows, new, slots, prefix, heads=4, kv_heads=2, width=16, dtype=jnp.float32):
    """q, own k and v, prefix k and v."""
    own, shared = (groups, kv_heads, rows, slots, width), (groups, kv_heads, prefix, width)
    shapes = (groups, rows, new, heads, width), own, own, shared, shared
    return [jnp.asarray(2 * normal(*shape, seed=seed), dtype) for seed, shape in enumerate(shapes)]


def slots_used(groups, rows, slots, used):
    """bool [G, R, S]: the question's padding is a hole, the newest token stands at the end, and nothing behind it."""
    valid = np.random.default_rng(0).random((groups, rows, slots)) < 0.6
    valid[..., used - 1], valid[..., used:] = True, False
    return valid


def both(q, k, v, valid, prefix_k, prefix_v, lengths, tiling):
    """(the kernel's, XLA's)"""
    kernel = jax.jit(partial(triton_attention, tiling=tiling, interpret=True))
    got = kernel(q, k, v, valid, prefix_k, prefix_v, lengths)
    if valid is None:
        return got, jax.jit(question_attention)(q, k, v, prefix_k, prefix_v, lengths)
    return got, jax.jit(decode_attention)(q, k, v, valid, prefix_k, prefix_v, lengths)


@pytest.mark.parametrize(
    ("rows", "slots", "used", "prefix", "heads", "int8", "tiling"),
    [
        (3, 64, 24, 128, 2, False, Tiling(16, 64, 1, 4, 2)),
        (5, 40, 33, 100, 8, True, Tiling(16, 32, 3, 4, 2)),  # grouped queries, two tiles, no multiple of a block
        pytest.param(
            1, 64, 64, 64, 4, False, Tiling(16, 64, 4, 4, 2), marks=pytest.mark.long
        ),  # more splits than blocks
        pytest.param(20, 64, 1, 64, 2, True, Tiling(32, 64, 1, 4, 2), marks=pytest.mark.long),
    ],
)
def test_one_position(rows, slots, used, prefix, heads, int8, tiling):
    q, k, v, *shared = arrays(2, rows, 1, slots, prefix, heads)
    lengths, valid = np.array([prefix - 3, prefix // 3], np.int32), slots_used(2, rows, slots, used)
    shared = [to_int8(x, -1) for x in shared] if int8 else shared
    np.testing.assert_allclose(*both(q, k, v, valid, *shared, lengths, tiling), atol=5e-6)


@pytest.mark.parametrize(
    ("rows", "length", "prefix", "heads", "int8", "tiling"),
    [
        (3, 24, 128, 2, False, Tiling(16, 64, 1, 4, 2)),  # tiles of parts of two rows
        (2, 9, 70, 6, True, Tiling(16, 32, 2, 4, 2)),
        pytest.param(2, 100, 64, 4, False, Tiling(32, 32, 1, 4, 2), marks=pytest.mark.long),  # some tiles of one row
    ],
)
def test_questions(rows, length, prefix, heads, int8, tiling):
    q, k, v, *shared = arrays(2, rows, length, length, prefix, heads)
    lengths = np.array([prefix, 1], np.int32)
    shared = [to_int8(x, -1) for x in shared] if int8 else shared
    np.testing.assert_allclose(*both(q, k, v, None, *shared, lengths, tiling), atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
def test_half_precision(dtype):
    """Weights are rounded by each block's own largest score, so that the last bit may differ."""
    q, k, v, *shared = arrays(1, 4, 1, 64, 256, dtype=dtype)
    valid = slots_used(1, 4, 64, 50)
    got, expected = both(q, k, v, valid, *shared, np.array([200], np.int32), Tiling(16, 64, 2, 4, 2))
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), np.float32(expected), atol=0.02)


@pytest.mark.parametrize("splits", [1, 2])
def test_what_sees_nothing_is_finite(splits):
    q, k, v, *shared = arrays(1, 2, 1, 32, 64)
    valid = np.zeros((1, 2, 32), bool)
    kernel = partial(triton_attention, tiling=Tiling(16, 32, splits, 4, 2), interpret=True)
    assert np.isfinite(jax.jit(kernel)(q, k, v, valid, *shared, np.zeros(1, np.int32))).all()


@pytest.mark.parametrize("dead", ["prefix", "suffix"])
def test_what_no_query_sees_is_not_looked_at(dead):
    """A prefix's padding and empty slots, block by block: they may hold what would spoil everything."""
    q, k, v, *shared = arrays(1, 2, 1, 96, 192)
    valid, lengths = slots_used(1, 2, 96, 40), np.array([100], np.int32)
    tiling = Tiling(16, 32, 1, 4, 2)
    expected = both(q, k, v, valid, *shared, lengths, tiling)[1]
    if dead == "prefix":
        shared = [x.at[:, :, 128:].set(jnp.nan) for x in shared]
    else:
        k, v = (x.at[:, :, :, 64:].set(jnp.nan) for x in (k, v))
    kernel = jax.jit(partial(triton_attention, tiling=tiling, interpret=True))
    np.testing.assert_allclose(kernel(q, k, v, valid, *shared, lengths), expected, atol=5e-6)


def test_tilings():
    """Every multiprocessor has a program where there are few; a pass over the keys for each tile of 128 queries."""
    assert choose_tiling(16, 256, H100) == Tiling(queries=16, keys=64, splits=1, warps=4, stages=3)
    assert choose_tiling(1, 32, H100).splits == 4 and choose_tiling(4, 8, A100).splits == 13
    assert choose_tiling(16 * 64, 256, H100) == Tiling(queries=128, keys=64, splits=1, warps=8, stages=3)
    assert choose_tiling(64, 64, A100) == Tiling(queries=64, keys=32, splits=1, warps=4, stages=3)
    assert choose_tiling(17, 8, L4) == Tiling(queries=32, keys=32, splits=7, warps=4, stages=2)


@pytest.mark.parametrize(
    ("dtype", "width", "gpu", "kernel"),
    [
        (jnp.bfloat16, 128, H100, True),
        (jnp.float16, 64, A100, True),
        (jnp.bfloat16, 16, L4, True),
        (jnp.float32, 128, H100, False),
        (jnp.float16, 128, T4, False),
        (jnp.bfloat16, 96, H100, False),
        (jnp.bfloat16, 256, H100, False),
    ],
)
def test_what_it_takes(dtype, width, gpu, kernel):
    assert takes(jax.ShapeDtypeStruct((1, 1, 1, 4, width), dtype), gpu) == kernel


@pytest.mark.parametrize("attend", [decode_attention, question_attention])
@pytest.mark.parametrize(("capability", "kernel"), [("8.0", True), ("7.5", False), (None, False)])
def test_which_programs_get_it(monkeypatch, attend, capability, kernel):
    if capability:
        pretend(monkeypatch, capability)
    q, k, v, *shared = arrays(1, 2, 1, 1, 64, dtype=jnp.bfloat16)
    valid = [np.ones((1, 2, 1), bool)] if attend is decode_attention else []
    traced = jax.jit(lambda *parts: attend(*parts)).trace(q, k, v, *valid, *shared, np.array([40], np.int32))
    assert ("cache_attention" in traced.lower(lowering_platforms=("cuda",)).as_text()) == kernel
    assert "cache_attention" not in traced.lower(lowering_platforms=("cpu",)).as_text()
