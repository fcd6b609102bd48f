"""Attention over a prefix and what each row has of its own, against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import normal, plain_attention

from llava_jax.models import prefix_attention, tpu_attention
from llava_jax.models.attention import causal_attention
from llava_jax.models.cache_attention import (
    Appended,
    Own,
    attend_and_append,
    decode_attention,
    question_attention,
)
from llava_jax.models.prefix_attention import CHUNK, by_chunks, over_all
from llava_jax.models.quantize import to_int8
from llava_jax.models.tpu_attention import decode_apart, question_by_splash

GROUPS, ROWS, LENGTHS = 2, 3, np.array([7, 4], np.int32)


def parts(kv_heads, new, slots, heads=4, width=4, prefix=7):
    """q, own k and v, prefix k and v: prefixes of different lengths, in arrays with room to spare."""
    own, shared = (GROUPS, kv_heads, ROWS, slots, width), (GROUPS, kv_heads, prefix, width)
    shapes = (GROUPS, ROWS, new, heads, width), own, own, shared, shared
    return [3 * normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def assert_plain(out, q, k, v, prefix_k, prefix_v, seen):
    """seen: bool [G, R, L, S]."""
    assert out.shape == q.shape
    for g in range(GROUPS):
        before = np.arange(prefix_k.shape[2]) < LENGTHS[g]
        for r in range(ROWS):
            pairs = (prefix_k, k), (prefix_v, v)
            keys, values = (np.concatenate([a[g], b[g, :, r]], axis=1).swapaxes(0, 1) for a, b in pairs)
            both = np.concatenate([np.tile(before, (q.shape[2], 1)), seen[g, r]], axis=-1)
            np.testing.assert_allclose(out[g, r], plain_attention(q[g, r], keys, values, both), atol=5e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_questions(kv_heads):
    arrays = parts(kv_heads, new=3, slots=3)
    out = np.asarray(jax.jit(question_attention)(*arrays, LENGTHS))
    assert_plain(out, *arrays, np.broadcast_to(np.tril(np.ones((3, 3), bool)), (GROUPS, ROWS, 3, 3)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_position(kv_heads):
    """A suffix with holes: padding of the question, and slots that are still empty."""
    q, k, v, *prefix = arrays = parts(kv_heads, new=1, slots=6)
    valid = np.random.default_rng(0).random((GROUPS, ROWS, 6)) < 0.6
    valid[..., 4], valid[..., 5] = True, False
    out = np.asarray(jax.jit(decode_attention)(q, k, v, valid, *prefix, LENGTHS))
    assert_plain(out, *arrays, valid[:, :, None])


def appended(new, k, v, valid, slot, rows, slots=None):
    """Some of the rows as a block, with as many slots."""
    cut = np.s_[:, :, rows, :slots]
    own = Own((k[cut], v[cut]), valid[:, rows, :slots], LENGTHS)
    writes = np.ones_like(valid[:, rows, 0])
    return Appended(tuple(x[:, :, rows] for x in new), np.int32(slot), writes, own)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_position_is_appended(kv_heads, platform):
    """What is in its slot before, and behind it, is not looked at. Two blocks of rows, one with fewer slots."""
    q, k, v, *prefix = arrays = parts(kv_heads, new=1, slots=6)
    valid, slot = np.random.default_rng(0).random((GROUPS, ROWS, 6)) < 0.6, 4
    valid[..., slot], valid[..., 5] = True, False
    before = [np.where(np.arange(6)[:, None] == slot, 7.0, x).astype(np.float32) for x in (k, v)]
    new = [x[:, :, :, slot : slot + 1] for x in (k, v)]
    blocks = [appended(new, *before, valid, slot, *cut) for cut in ((np.s_[:1], 5), (np.s_[1:],))]
    if platform == "cpu":
        out, suffixes = jax.jit(attend_and_append)(q, blocks, *prefix)
        for ours, expected in zip(suffixes[0], (k, v), strict=True):
            np.testing.assert_array_equal(ours, expected[:, :, :1, :5])
        for ours, expected in zip(suffixes[1], (k, v), strict=True):
            np.testing.assert_array_equal(ours, expected[:, :, 1:])
    else:
        out = jax.jit(decode_apart)(q, blocks, *prefix)
    assert_plain(np.asarray(out), *arrays, valid[:, :, None])


def test_blocks_that_see_different_prefixes():
    """A prefix is looked at if the rows of one block live there."""
    q, k, v, *prefix = parts(2, new=1, slots=6)
    valid, new = np.ones((GROUPS, ROWS, 6), bool), [x[:, :, :, 5:] for x in (k, v)]
    blocks = [appended(new, k, v, valid, 5, rows) for rows in (np.s_[:1], np.s_[1:])]
    only_in = ([7, 0], [0, 4])
    blocks = [
        block._replace(own=block.own._replace(prefix_lengths=np.array(lengths, np.int32)))
        for block, lengths in zip(blocks, only_in, strict=True)
    ]
    expected = jax.jit(decode_attention)(q, k, v, valid, *prefix, LENGTHS)
    for out in (
        jax.jit(attend_and_append)(q, blocks, *prefix)[0],
        jax.jit(decode_apart)(q, blocks, *prefix),
    ):
        np.testing.assert_allclose(out[0, :1], expected[0, :1], atol=5e-6)
        np.testing.assert_allclose(out[1, 1:], expected[1, 1:], atol=5e-6)


def assert_same_part(got, expected):
    np.testing.assert_allclose(got.sum / got.weight[..., None], expected.sum / expected.weight[..., None], atol=2e-6)
    got_lse, expected_lse = (part.largest + np.log(part.weight) for part in (got, expected))
    np.testing.assert_allclose(got_lse, expected_lse, atol=2e-6)


P = 2 * CHUNK + 22  # positions of prefixes that are read in chunks


@pytest.mark.parametrize("int8", [False, True])
def test_prefixes_in_chunks(int8):
    """The last chunk begins among what is counted already."""
    q, k, v = normal(4, 2, 3, 8), normal(4, 2, P, 8, seed=1), normal(4, 2, P, 8, seed=2)
    if int8:
        k, v = to_int8(k, -1), to_int8(v, -1)
    arguments = q, k, v, np.array([P, 1, CHUNK, 2 * CHUNK + 1], np.int32)
    assert_same_part(jax.jit(by_chunks)(*arguments), jax.jit(over_all)(*arguments))


@pytest.mark.parametrize("form", [prefix_attention.over_few, tpu_attention.over_few])
@pytest.mark.parametrize("lengths, reads_all", [([0, P, 0, P], False), ([1, P, 0, P], True)])
def test_prefixes_that_nobody_looks_at_are_not_read(form, lengths, reads_all):
    q, k, v = normal(4, 2, 3, 8), normal(4, 2, P, 8, seed=1), normal(4, 2, P, 8, seed=2)
    lengths = np.array(lengths, np.int32)
    expected = jax.jit(over_all)(q, k, v, lengths)
    v[2] = np.nan
    got, living = jax.jit(form)(q, k, v, lengths), lengths > 0
    assert_same_part(*(jax.tree.map(lambda x: np.asarray(x)[living], part) for part in (got, expected)))
    assert np.isnan(got.sum[2]).any() == reads_all


def test_a_tpu_takes_int8_prefixes():
    q, k, v, *prefix = (x / 3 for x in parts(2, new=1, slots=4, width=16, prefix=24))
    lengths, valid = np.array([24, 17]), np.ones((GROUPS, ROWS, 4), bool)
    int8 = [to_int8(x, -1) for x in prefix]
    block = Appended((k[:, :, :, 3:], v[:, :, :, 3:]), np.int32(3), None, Own((k, v), valid, lengths))
    got = jax.jit(decode_apart)(q, [block], *int8)
    np.testing.assert_allclose(got, jax.jit(decode_attention)(q, k, v, valid, *int8, lengths), atol=2e-6)


def test_questions_continue_causal_attention():
    """Positions 5.. of a causal sequence, its first 5 as the prefix."""
    q, k, v = normal(1, 9, 4, 8), normal(1, 9, 2, 8, seed=1), normal(1, 9, 2, 8, seed=2)
    whole = jax.jit(causal_attention)(q, k, v, np.ones((1, 9), bool))
    prefix = k[:, :5].swapaxes(1, 2), v[:, :5].swapaxes(1, 2), np.array([5])
    own = (x[:, 5:].swapaxes(1, 2)[:, :, None] for x in (k, v))
    split = jax.jit(question_attention)(q[:, None, 5:], *own, *prefix)
    np.testing.assert_allclose(split[:, 0], whole[:, 5:], atol=1e-6)


def by_splash(q, k, v, *prefix, lengths):
    return question_by_splash(q, [Own((k, v), None, lengths)], *prefix, interpret=True)


@pytest.mark.parametrize(
    "kv_heads, new", [(2, 5), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 1), (4, 50)))]
)
def test_questions_by_splash(kv_heads, new):
    """Prefixes of two blocks, one of them padding for the most part; queries of one block, or of two."""
    q, k, v, *prefix = (x / 3 for x in parts(kv_heads, new=new, slots=new, width=64, prefix=384))
    lengths = np.array([384, 70], np.int32)
    expected = jax.jit(question_attention)(q, k, v, *prefix, lengths)
    np.testing.assert_allclose(jax.jit(by_splash)(q, k, v, *prefix, lengths=lengths), expected, atol=2e-6)
    int8 = [to_int8(x, -1) for x in prefix]
    expected = jax.jit(question_attention)(q, k, v, *int8, lengths)
    np.testing.assert_allclose(jax.jit(by_splash)(q, k, v, *int8, lengths=lengths), expected, atol=2e-6)


def lowered(platform, positions=384, precision="default"):
    """Question attention in bfloat16, as a platform has it that need not be here."""
    q, own, prefix = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((1, 2, 8, 4, 64), (1, 2, 2, 8, 64), (1, 2, positions, 64))
    )
    arguments = q, own, own, prefix, prefix, jax.ShapeDtypeStruct((1,), jnp.int32)
    with jax.default_matmul_precision(precision):
        traced = jax.jit(question_attention).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_splash_is_for_tpus_and_whole_blocks():
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("cpu") + lowered("tpu", positions=100) + lowered("tpu", precision="highest")


def test_an_int8_prefix_is_the_prefix_that_it_stands_for():
    q, k, v, *prefix = (x / 3 for x in parts(2, new=4, slots=4, width=16, prefix=24))
    attend, lengths = jax.jit(question_attention), np.array([24, 17])
    int8 = [to_int8(x, -1) for x in prefix]
    assert int8[0].scale.shape == (GROUPS, 2, 24)  # of each head and position
    got = attend(q, k, v, *int8, lengths)
    stands_for = (x.values * x.scale[..., None] for x in int8)
    np.testing.assert_allclose(got, attend(q, k, v, *stands_for, lengths), atol=1e-5)
    assert float(jnp.max(jnp.abs(got - attend(q, k, v, *prefix, lengths)))) < 0.05
