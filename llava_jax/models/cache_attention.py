"""Attention over a cache of two parts: a prefix that R rows share, and each row's own positions, under one softmax.

Exact, no approximation: the weights on both parts are normalised together (Hydragen, arXiv:2402.05099).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.models.attention import MASKED
from llava_jax.models.quantize import Int8


class Part(NamedTuple):
    """What queries [...] get from some of the keys that they see; `join` makes several parts into attention over all.

    A kernel that gives its output already normalised, and lse = log(sum(exp(score))), gives the part (out, lse, 1).
    """

    sum: jax.Array  # float32 [..., D]: of the values, each times its weight, exp(score - largest)
    largest: jax.Array  # float32 [...]: of the scores; MASKED or less where a query sees none of these keys
    weight: jax.Array | int  # float32 [...]: the sum of the weights


def join(*parts: Part) -> jax.Array:
    """Exactly softmax(scores of all parts) @ values of all parts: float32 [..., D]."""
    largest = jnp.stack([part.largest for part in parts]).max(0)
    factors = [jnp.exp(part.largest - largest) for part in parts]
    out = sum(part.sum * factor[..., None] for part, factor in zip(parts, factors, strict=True))
    return out / sum(part.weight * factor for part, factor in zip(parts, factors, strict=True))[..., None]


def question_attention(q, k, v, prefix_k, prefix_v, prefix_lengths) -> jax.Array:
    """Questions of Q positions: each position sees its prefix, and its own question up to itself.

    Args:
        q: [G, R, Q, H, D], as is what comes out; k, v: [G, K, R, Q, D], H a multiple of K (grouped queries).
        prefix_k, prefix_v: [G, K, P, D], arrays or Int8.
        prefix_lengths: int32 [G], how many positions of the prefix are no padding.
    """
    length = q.shape[2]
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (q.shape[0], q.shape[1], length, length))
    return _attention(q, k, v, seen, prefix_k, prefix_v, prefix_lengths)


def decode_attention(q, suffix_k, suffix_v, suffix_valid, prefix_k, prefix_v, prefix_lengths) -> jax.Array:
    """One new position a row: it sees its prefix, and what is valid in its suffix, itself included.

    Args:
        q: [G, R, 1, H, D], as is what comes out.
        suffix_k, suffix_v: [G, K, R, S, D]; suffix_valid: bool [G, R, S].
        prefix_k, prefix_v, prefix_lengths: as in `question_attention`.
    """
    return _attention(q, suffix_k, suffix_v, suffix_valid[:, :, None], prefix_k, prefix_v, prefix_lengths)


def _attention(q, k, v, seen, prefix_k, prefix_v, prefix_lengths):
    """q [G, R, L, H, D]; k, v [G, K, R, S, D], of which each query sees `seen`, bool [G, R, L, S]."""
    heads = q.reshape(*q.shape[:3], k.shape[1], -1, q.shape[-1]).transpose(0, 3, 1, 2, 4, 5)  # [G, K, R, L, h, D]
    in_prefix = jnp.arange(jax.tree.leaves(prefix_k)[0].shape[2]) < prefix_lengths[:, None]
    arguments = heads, prefix_k, prefix_v, k, v, in_prefix, seen
    over_heads = jax.vmap(_two_parts, in_axes=(0, 0, 0, 0, 0, None, None))
    one_head_at_a_time = {"cpu": _two_parts_mapped} if q.shape[2] > 1 else {}  # its scores stay in the cache
    out = jax.lax.platform_dependent(*arguments, default=jax.vmap(over_heads), **one_head_at_a_time)
    return out.transpose(0, 2, 3, 1, 4, 5).reshape(q.shape)


def _two_parts_mapped(*arguments):
    def of_group(group):
        heads, valid = group[:5], group[5:]
        return jax.lax.map(lambda head: _two_parts(*head, *valid), heads)

    return jax.lax.map(of_group, arguments)


def _two_parts(q, prefix_k, prefix_v, k, v, in_prefix, seen):
    """One kv head of one group: q [R, L, h, D], prefix [P, D], k and v [R, S, D], in_prefix [P], seen [R, L, S].

    An int8 position's scale meets its score, or its weight, instead of its D numbers.
    """
    wide = dict(preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5
    prefix_k, k_scale = _with_scale(prefix_k, q.dtype)
    prefix_v, v_scale = _with_scale(prefix_v, q.dtype)
    over_prefix = jnp.einsum("rlhd,pd->rlhp", q, prefix_k, **wide) * (scale * k_scale)
    over_own = jnp.einsum("rlhd,rsd->rlhs", q, k, **wide) * scale
    over_prefix = jnp.where(in_prefix, over_prefix, MASKED)
    over_own = jnp.where(seen[:, :, None], over_own, MASKED)
    largest = jnp.maximum(over_prefix.max(-1, keepdims=True), over_own.max(-1, keepdims=True))
    on_prefix, on_own = jnp.exp(over_prefix - largest), jnp.exp(over_own - largest)
    out = jnp.einsum("rlhp,pd->rlhd", (on_prefix * v_scale).astype(prefix_v.dtype), prefix_v, **wide)
    out += jnp.einsum("rlhs,rsd->rlhd", on_own.astype(v.dtype), v, **wide)
    return (out / (on_prefix.sum(-1, keepdims=True) + on_own.sum(-1, keepdims=True))).astype(q.dtype)


def _with_scale(x, dtype):
    return (x.values.astype(dtype), x.scale) if isinstance(x, Int8) else (x, 1)
