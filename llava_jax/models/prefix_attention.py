"""New positions over the prefixes that their rows share, as XLA does it for CPUs and for GPUs without a kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llava_jax.models.attention import MASKED
from llava_jax.models.parts import Part, nothing
from llava_jax.models.quantize import values_and_scale

CHUNK = 256  # positions that are read at a time, so that what is taken out of the prefixes stays in the cache
FEW = 2  # a position costs a CPU twice as much there, or less: below half of all positions chunks are faster


def over_all(q, k, v, lengths) -> Part:
    """q [G, K, X, D] over all of k, v [G, K, P, D], arrays or Int8, before `lengths`, int32 [G]."""
    seen = jnp.arange(jax.tree.leaves(k)[0].shape[2]) < lengths[:, None]
    return add(nothing(q), q, k, v, seen[:, None, None], keys_first=True)


def over_few(q, k, v, lengths) -> Part:
    """`over_all` for a CPU: while few prefixes are looked at, it reads no others, and no padding."""
    groups, _, positions = jax.tree.leaves(k)[0].shape[:3]
    few = FEW * lengths.sum() <= groups * positions
    return jax.lax.cond(few, by_chunks, over_all, q, k, v, lengths)


def by_chunks(q, k, v, lengths) -> Part:
    """`over_all`, a chunk of one prefix after another, as far as it goes."""
    kv_heads, positions = jax.tree.leaves(k)[0].shape[1:3]
    chunk = min(CHUNK, positions)

    def of_group(group):
        q, length, index = group

        def step(n, sums: Part) -> Part:
            start = jnp.minimum(n * chunk, positions - chunk)  # the last one may begin among what is counted already

            def read(x):
                sizes = 1, kv_heads, chunk, *x.shape[3:]
                return jax.lax.dynamic_slice(x, (index, 0, start, *[0] * (x.ndim - 3)), sizes)[0]

            position = start + jnp.arange(chunk)
            seen = (n * chunk <= position) & (position < length)
            return add(sums, q, jax.tree.map(read, k), jax.tree.map(read, v), seen)

        return jax.lax.fori_loop(0, (length + chunk - 1) // chunk, step, nothing(q))

    return jax.lax.map(of_group, (q, lengths, jnp.arange(len(q))))


def add(sums: Part, q, k, v, seen, keys_first: bool = False) -> Part:
    """A part, and queries [..., X, D] over some more keys [..., S, D], arrays or Int8, as far as `seen`, bool
    [..., 1 or X, S]. An int8 position's scale meets its score, or its weight, instead of its D numbers.

    keys_first: they are many, and a CPU would turn all of them round if they were the second in the product.
    """
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    (k, k_scale), (v, v_scale) = values_and_scale(k, q.dtype), values_and_scale(v, q.dtype)
    if keys_first:  # else XLA makes one of the product and its transposition
        scores = jax.lax.optimization_barrier(einsum("...sd,...xd->...sx", k, q)).swapaxes(-1, -2)
    else:
        scores = einsum("...xd,...sd->...xs", q, k)
    scores = jnp.where(seen, scores * (q.shape[-1] ** -0.5 * k_scale), MASKED)
    largest = jnp.maximum(sums.largest, scores.max(-1))
    weights, fade = jnp.exp(scores - largest[..., None]), jnp.exp(sums.largest - largest)
    new = einsum("...xs,...sd->...xd", (weights * v_scale).astype(v.dtype), v)
    return Part(sums.sum * fade[..., None] + new, largest, sums.weight * fade + weights.sum(-1))
