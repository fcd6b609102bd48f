"""Attention to parts of the keys, one by one, and what makes it attention to all of them."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.attention import MASKED


class Part(NamedTuple):
    """What queries [...] get from some of the keys that they see; `join` makes several parts into attention over all.

    A kernel that gives its output already normalised, and lse = log(sum(exp(score))), gives the part (out, lse, 1).
    """

    sum: jax.Array  # float32 [..., D]: of the values, each times its weight, exp(score - largest)
    largest: jax.Array  # float32 [...]: of the scores; MASKED or less where a query sees none of these keys
    weight: jax.Array | int  # float32 [...]: the sum of the weights


def nothing(q) -> Part:
    """What queries [..., D] get from no keys."""
    each = jnp.zeros(q.shape[:-1], jnp.float32)
    return Part(jnp.zeros(q.shape, jnp.float32), jnp.full_like(each, MASKED), each)


def join(*parts: Part) -> jax.Array:
    """Exactly softmax(scores of all parts) @ values of all parts: float32 [..., D]."""
    largest = jnp.stack([part.largest for part in parts]).max(0)
    factors = [jnp.exp(part.largest - largest) for part in parts]
    out = [part.sum * factor[..., None] for part, factor in zip(parts, factors, strict=True)]
    weights = [part.weight * factor for part, factor in zip(parts, factors, strict=True)]
    return reduce(add, out) / reduce(add, weights)[..., None]


def join_along_first_axis(parts: Part) -> jax.Array:
    """`join` of many parts whose arrays are one: [parts, ...]."""
    factors = jnp.exp(parts.largest - parts.largest.max(0))
    return (parts.sum * factors[..., None]).sum(0) / (parts.weight * factors).sum(0)[..., None]


def split_rows(x: jax.Array, blocks, axis: int) -> list[jax.Array]:
    """What belongs to each block, of arrays of all their rows side by side. A block's `valid` is [G, R, S]."""
    return jnp.split(x, np.cumsum([block.valid.shape[1] for block in blocks])[:-1], axis)
