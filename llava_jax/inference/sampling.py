"""From logits to the next token: greedy, or sampled as transformers' warpers do it."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Sampling:
    """How a token is drawn. All but `do_sample` is traced, so another temperature compiles nothing.

    temperature, then top_k (0: off), then top_p (1: off), in transformers' order.
    """

    temperature: np.float32
    top_p: np.float32
    top_k: np.int32
    seed: np.uint32
    do_sample: bool = flax.struct.field(pytree_node=False)


def make_sampling(temperature: float, top_p: float, top_k: int, seed: int) -> Sampling:
    """Check the numbers and pack them; temperature 0 is greedy, as in the original's command line.

    Raises:
        ValueError: a number is out of its range.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature!r} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be in (0, 1]; 1 turns it off")
    if top_k < 0:
        raise ValueError(f"top_k={top_k!r} must be 0 (off) or more")
    numbers = np.float32(temperature), np.float32(top_p), np.int32(top_k), np.uint32(seed % 2**32)
    return Sampling(*numbers, do_sample=temperature > 0)


def warp(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """logits [..., V] divided by the temperature, -inf outside top_k and top_p (transformers' logits warpers)."""
    logits = logits / sampling.temperature
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    in_k = (sampling.top_k == 0) | (rank < sampling.top_k) | (rank == 0)
    probs = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf), axis=-1)
    not_above = jnp.cumsum(probs[..., ::-1], axis=-1)[..., ::-1]  # this token and all less likely ones
    in_p = (sampling.top_p >= 1) | (not_above > 1 - sampling.top_p) | (rank == 0)
    least = jnp.min(jnp.where(in_k & in_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def next_token(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """logits float32 [..., V] → int32 [...]. The draw depends on the seed and the step alone, not on a row's place."""
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    noise = jax.random.gumbel(key, logits.shape[-1:])  # one draw for every row: alone or in a batch, the same
    return jnp.argmax(warp(logits, sampling) + noise, axis=-1).astype(jnp.int32)
