"""Attention over the cache in the forms that libtpu makes the most of, by its own estimate (compiled, not measured)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp

from llava_jax.models.attention import MASKED, SPLASH_BLOCKS, splash_block, splash_takes
from llava_jax.models.linear import MATRIX_UNIT_ROWS
from llava_jax.models.parts import Part, join, nothing, split_rows
from llava_jax.models.quantize import Int8, values_and_scale


def decode_apart(q, blocks, prefix_k, prefix_v, over_prefix: Callable[..., Part] | None = None) -> jax.Array:
    """One new position a row, whose own key and value are not in its suffix yet; see `cache_attention.Appended`.

    If they were, XLA would fetch the whole suffix into a core's memory, update it there and write all of it back.

    Args:
        q: [G, R, 1, H, D], of the rows of all blocks, as is what comes out.
        prefix_k, prefix_v: [G, K, P, D], arrays or Int8.
        over_prefix: `over_all` (None), or what gives the same.
    """
    owns = [block.own for block in blocks]
    groups, kv_heads, _, _, width = owns[0].suffix[0].shape
    of_rows = q.reshape(groups, q.shape[1], kv_heads, -1, width).swapaxes(1, 2)  # [G, K, R, h, D]
    heads = of_rows.reshape(groups, kv_heads, -1, width)  # of all rows, [G, K, R·h, D]: XLA lays these out densely
    pairs = zip(split_rows(of_rows, owns, 2), blocks, strict=True)
    each = [_own_parts(queries, block) for queries, block in pairs]
    own, new = (jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *parts) for parts in zip(*each, strict=True))
    lengths = reduce(jnp.maximum, [own.prefix_lengths for own in owns])
    shared = (over_prefix or over_all)(heads, prefix_k, prefix_v, lengths)
    out = join(shared, own, new).astype(q.dtype)
    return out.reshape(of_rows.shape).swapaxes(1, 2).reshape(q.shape)


def _own_parts(of_rows, block) -> tuple[Part, Part]:
    """A block's queries [G, K, R, h, D] over its suffix before, and over the new positions, both as [G, K, R·h, …]."""
    own = block.own
    before = own.valid & (jnp.arange(own.valid.shape[-1]) != block.slot)
    heads = of_rows.reshape(*of_rows.shape[:2], -1, of_rows.shape[-1])
    k, v = own.suffix
    part = _part(heads.reshape(of_rows.shape), k, v, before[:, None, :, None])
    part = jax.tree.map(lambda x: x.reshape(*heads.shape[:3], *x.shape[4:]), part)
    return part, _new_part(heads, *block.new)


FEW_ROWS = 8  # of a prefix: within a conditional XLA leaves scores in HBM, and those of more rows take long to write
FEW = 2  # one prefix takes a third more time alone than as one of many: this is worth it below half of them


def over_all(q, k, v, lengths) -> Part:
    """q [G, K, X, D] over all of k, v [G, K, P, D], arrays or Int8, before `lengths`, int32 [G]."""
    seen = jnp.arange(jax.tree.leaves(k)[0].shape[2]) < lengths[:, None]
    return _part(q, k, v, seen[:, None, None])


def over_few(q, k, v, lengths) -> Part:
    """`over_all`; while few prefixes have a length, the others are not read."""
    living = lengths > 0
    order, count = jnp.argsort(~living, stable=True), living.sum()

    def one_by_one(q, k, v, lengths) -> Part:
        def step(n, parts: Part) -> Part:
            def read(x):
                return jax.lax.dynamic_slice_in_dim(x, order[n], 1)

            one = over_all(*jax.tree.map(read, (q, k, v, lengths)))
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=order[n], axis=0)
            return jax.tree.map(put, parts, one)

        return jax.lax.fori_loop(0, count, step, nothing(q))

    return jax.lax.cond(FEW * count <= len(q), one_by_one, over_all, q, k, v, lengths)


def _part(q, k, v, seen) -> Part:
    """Queries q [..., X, D] over k, v [..., S, D], arrays or Int8, as far as `seen`, bool [..., 1 or X, S].

    An int8 position's scale meets its score, or its weight, instead of its D numbers.
    """
    count, einsum = q.shape[-2], partial(jnp.einsum, preferred_element_type=jnp.float32)
    (k, k_scale), (v, v_scale) = values_and_scale(k, q.dtype), values_and_scale(v, q.dtype)
    scores = einsum("...xd,...sd->...xs", _matrix_unit_rows(q), k) * q.shape[-1] ** -0.5 * k_scale
    scores = jnp.where(seen if seen.shape[-2] == 1 else _matrix_unit_rows(seen), scores, MASKED)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    out = einsum("...xs,...sd->...xd", (weights * v_scale).astype(v.dtype), v)
    return Part(out[..., :count, :], largest[..., :count, 0], weights.sum(-1)[..., :count])


def _matrix_unit_rows(q):
    """[..., X, D] with X at least MATRIX_UNIT_ROWS; those added are not looked at."""
    count = q.shape[-2]
    if count == 1:
        return jnp.broadcast_to(q, (*q.shape[:-2], MATRIX_UNIT_ROWS, q.shape[-1]))
    return jnp.pad(q, [(0, 0)] * (q.ndim - 2) + [(0, max(0, MATRIX_UNIT_ROWS - count)), (0, 0)])


def _new_part(heads, k, v) -> Part:
    """heads [G, K, R·h, D], each over the one key of its row, k and v [G, K, R, 1, D]."""
    per_row = heads.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x[..., 0, :], per_row, axis=2).astype(jnp.float32) for x in (k, v))
    largest = jnp.sum(heads.astype(jnp.float32) * k, axis=-1) * heads.shape[-1] ** -0.5
    return Part(v, largest, jnp.ones_like(largest))


# ---- questions


def splash_takes_questions(q, prefix_k) -> bool:
    """Whether `question_by_splash` does; see `attention.splash_takes`."""
    width, positions = q.shape[-1], jax.tree.leaves(prefix_k)[0].shape[2]
    return splash_takes(positions, width, q.dtype)


def question_by_splash(q, owns, prefix_k, prefix_v, interpret: bool = False) -> jax.Array:
    """`cache_attention.question_attention`, over the prefix by splash (see `attention.splash_attention`), which keeps
    no scores. P must be a multiple of 128, D of 64; `interpret` runs it in Pallas' interpreter, on any platform."""
    (own,), (groups, rows, length, count, width) = owns, q.shape
    k, v = own.suffix
    kv_heads = k.shape[1]
    heads = q.transpose(0, 3, 1, 2, 4)  # [G, H, R, Q, D]
    flat = heads.reshape(groups, count, rows * length, width)
    flat = jnp.pad(flat, [(0, 0), (0, 0), (0, -flat.shape[2] % SPLASH_BLOCKS[-1]), (0, 0)])
    out, lse = _over_prefix(flat, prefix_k, prefix_v, own.prefix_lengths, interpret)
    shape = groups, kv_heads, count // kv_heads, rows, length, width
    out, lse = out[:, :, : rows * length].reshape(shape), lse[:, :, : rows * length].reshape(shape[:-1])
    over_own = _part(heads.reshape(shape), k[:, :, None], v[:, :, None], jnp.tril(jnp.ones((length, length), bool)))
    joined = join(Part(out.astype(jnp.float32), lse, 1), over_own).astype(q.dtype)
    return joined.reshape(heads.shape).transpose(0, 2, 3, 1, 4)


def _over_prefix(q, k, v, lengths, interpret: bool):
    """q [G, H, X, D] over all of k, v [G, K, P, D] before `lengths`: (out [G, H, X, D], log-sum-exp float32 [G, H, X]).

    int8 keys and values become half precision one group after another: splash has no scales.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, only where it is needed

    rows, positions = q.shape[2], jax.tree.leaves(k)[0].shape[2]
    block_q, block_kv = splash_block(rows), splash_block(positions)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((rows, positions))] * q.shape[1]),
        block_sizes=splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv),
        save_residuals=True,
        interpret=interpret,
    )

    def of_group(group):
        q, k, v, length = group
        scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not
        in_prefix = (jnp.arange(positions) < length).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.ones(rows, jnp.int32), in_prefix)
        out, (lse,) = kernel(scaled, _dequantized(k, q.dtype), _dequantized(v, q.dtype), segments)
        return out, lse

    arguments = q, k, v, lengths
    return jax.lax.map(of_group, arguments) if isinstance(k, Int8) else jax.vmap(of_group)(arguments)


def _dequantized(x, dtype):
    return (x.values * x.scale[..., None]).astype(dtype) if isinstance(x, Int8) else x
