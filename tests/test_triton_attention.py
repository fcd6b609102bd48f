"""The GPU's kernel over the cache, in Pallas' interpreter, against XLA's form of it; and which programs get it."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from test_attention import normal

from llava_jax.models.cache_attention import Appended, Own, attend_and_append, decode_attention, question_attention
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


def in_blocks(blocks, k, v, lengths):
    """Rows [G, K, R, S, D] in blocks of (rows, slots, slots used): (what is valid of all of them, each block's)"""
    valid, owns, first = np.zeros((len(k), *k.shape[2:4]), bool), [], 0
    for (rows, slots, used), of_block in zip(blocks, lengths, strict=True):
        cut = np.s_[:, first : first + rows, :slots]
        valid[cut] = slots_used(len(k), rows, slots, used)
        owns.append(Own((k[:, *cut], v[:, *cut]), valid[cut], of_block))
        first += rows
    return valid, owns


def by_kernel(q, owns, prefix_k, prefix_v, tiling):
    return jax.jit(partial(triton_attention, tiling=tiling, interpret=True))(q, owns, prefix_k, prefix_v)


def both(q, k, v, valid, prefix_k, prefix_v, lengths, tiling):
    """(the kernel's, XLA's)"""
    got = by_kernel(q, [Own((k, v), valid, lengths)], prefix_k, prefix_v, tiling)
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
    ("blocks", "heads", "int8", "tiling"),
    [
        (((3, 32, 20), (2, 96, 70)), 2, False, Tiling(16, 32, 1, 4, 2)),
        (((5, 40, 40), (1, 72, 65), (3, 16, 9)), 8, True, Tiling(16, 32, 3, 4, 2)),  # all three meet in a tile
        # a row in two tiles
        pytest.param(((4, 64, 64), (3, 32, 1)), 6, True, Tiling(16, 32, 1, 4, 2), marks=pytest.mark.long),
        pytest.param(((1, 32, 8), (1, 32, 32)), 4, False, Tiling(16, 32, 8, 4, 2), marks=pytest.mark.long),
    ],
)
def test_blocks_of_rows(blocks, heads, int8, tiling):
    """In the second prefix nobody lives in the first block, in the third nobody but there. XLA's form has all rows in
    one block."""
    rows, slots = sum(rows for rows, *_ in blocks), max(slots for _, slots, _ in blocks)
    q, k, v, *shared = arrays(3, rows, 1, slots, 100, heads)
    shared = [to_int8(x, -1) for x in shared] if int8 else shared
    lengths = [np.array([97, 40 * (n > 0), 33 * (n == 0)], np.int32) for n in range(len(blocks))]
    valid, owns = in_blocks(blocks, k, v, lengths)
    expected = jax.jit(decode_attention)(q, k, v, valid, *shared, np.array([97, 40, 33], np.int32))
    np.testing.assert_allclose(by_kernel(q, owns, *shared, tiling), expected, atol=5e-6)


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
    own = Own((k, v), valid, np.zeros(1, np.int32))
    assert np.isfinite(by_kernel(q, [own], *shared, Tiling(16, 32, splits, 4, 2))).all()


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
    got = by_kernel(q, [Own((k, v), valid, lengths)], *shared, tiling)
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_tilings():
    """Every multiprocessor has a program where there are few; a pass over the keys for each tile of queries."""
    assert choose_tiling(16, 256, H100) == Tiling(queries=16, keys=64, splits=1, warps=4, stages=3)
    assert choose_tiling(1, 32, H100).splits == 4 and choose_tiling(4, 8, A100).splits == 13
    assert choose_tiling(16 * 64, 256, H100) == Tiling(queries=64, keys=64, splits=1, warps=4, stages=3)
    assert choose_tiling(16 * 64, 256, A100) == Tiling(queries=128, keys=32, splits=1, warps=8, stages=3)
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


def on(kind, multiprocessors):
    """Programs are for such a GPU, which need not be here."""
    device = AbstractDevice(kind, multiprocessors, "gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("tensor",), (AxisType.Auto,), abstract_device=device))


@pytest.mark.parametrize("attend", [decode_attention, question_attention])
@pytest.mark.parametrize(
    ("where", "kernel"),
    [(on("NVIDIA A100-SXM4-40GB", 108), True), (on("Tesla T4", 40), False), (nullcontext(), False)],
    ids=["A100", "T4", "here"],
)
def test_which_programs_get_it(attend, where, kernel):
    q, k, v, *shared = arrays(1, 2, 1, 1, 64, dtype=jnp.bfloat16)
    valid = [np.ones((1, 2, 1), bool)] if attend is decode_attention else []
    with where:
        traced = jax.jit(lambda *parts: attend(*parts)).trace(q, k, v, *valid, *shared, np.array([40], np.int32))
        assert ("cache_attention" in traced.lower(lowering_platforms=("cuda",)).as_text()) == kernel
        assert "cache_attention" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_blocks_of_rows_share_a_kernel():
    q, k, v, *shared = arrays(1, 3, 1, 64, 64, dtype=jnp.bfloat16)
    _, owns = in_blocks(((2, 32, 9), (1, 64, 9)), k, v, [np.array([40], np.int32)] * 2)
    blocks = [Appended(tuple(x[:, :, :, 8:9] for x in own.suffix), np.int32(8), None, own) for own in owns]
    with on("NVIDIA H100 80GB HBM3", 132):
        traced = jax.jit(lambda *parts: attend_and_append(*parts)).trace(q, blocks, *shared)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "cache_attention"') == 1
