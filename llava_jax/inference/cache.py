"""The two parts of the cache: a prefix that questions share, and each row's own suffix (DESIGN: shared prefix)."""

from __future__ import annotations

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import TextConfig
from llava_jax.models.quantize import Int8, to_int8

KeysValues = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Prefix:
    """Written once by prefill, read-only afterwards: G prompts of up to P positions."""

    keys_values: list[KeysValues]  # for each layer, k and v [G, K, P, D], as decoding reads them; arrays or Int8
    lengths: jax.Array | np.ndarray  # int32 [G]; what is behind them is padding

    @property
    def capacity(self) -> int:
        """P."""
        return jax.tree.leaves(self.keys_values)[0].shape[2]


@flax.struct.dataclass
class Suffix:
    """What the decode loop carries: S slots for each of R rows after each of G prefixes."""

    keys_values: list[KeysValues]  # for each layer, k and v [G, K, R, S, D]
    valid: jax.Array  # bool [G, R, S]


def empty_suffix(config: TextConfig, groups: int, rows: int, slots: int, dtype) -> Suffix:
    shape = (groups, config.num_key_value_heads, rows, slots, config.head_dim)
    keys_values = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]
    return Suffix(keys_values, jnp.zeros((groups, rows, slots), bool))


def append_to_prefix(
    capacity: int, question_slots: int, prefix: Prefix, suffix: Suffix, question_length: jax.Array
) -> Prefix:
    """One row's suffix written behind its prefix, G = R = 1: the question without its padding, then the new tokens.

    The new prefix has `capacity` positions and the old one's lengths: the caller knows how many tokens it keeps.
    """
    start = prefix.lengths[0]

    def append(old, new):
        new = new[:, :, 0]  # [1, K, S, D]
        return jax.tree.map(write, old, to_int8(new, -1) if isinstance(old, Int8) else new)

    def write(old, new):
        padding = [(0, 0), (0, 0), (0, capacity - old.shape[2]), (0, 0)]
        whole = jnp.pad(old, padding[: old.ndim])
        question, tokens = new[:, :, :question_slots], new[:, :, question_slots:]
        whole = jax.lax.dynamic_update_slice_in_dim(whole, question, start, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(whole, tokens, start + question_length, axis=2)

    layers = zip(prefix.keys_values, suffix.keys_values, strict=True)
    keys_values = [tuple(append(a, b) for a, b in zip(old, new, strict=True)) for old, new in layers]
    return replace(prefix, keys_values=keys_values)
