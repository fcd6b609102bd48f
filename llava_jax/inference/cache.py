"""The two parts of the cache: a prefix that questions share, and each row's own suffix (DESIGN: shared prefix)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import TextConfig

KeysValues = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Prefix:
    """Written once by prefill, read-only afterwards: G prompts of up to P positions."""

    keys_values: list[KeysValues]  # for each layer, k and v [G, K, P, D], as decoding reads them; arrays or Int8
    valid: jax.Array | np.ndarray  # bool [G, P]
    lengths: jax.Array | np.ndarray  # int32 [G]


@flax.struct.dataclass
class Suffix:
    """What the decode loop carries: S slots for each of R rows after each of G prefixes."""

    keys_values: list[KeysValues]  # for each layer, k and v [G, R, S, K, D]
    valid: jax.Array  # bool [G, R, S]


def empty_suffix(config: TextConfig, groups: int, rows: int, slots: int, dtype) -> Suffix:
    """A suffix of `slots` empty slots."""
    shape = (groups, rows, slots, config.num_key_value_heads, config.head_dim)
    keys_values = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]
    return Suffix(keys_values, jnp.zeros(shape[:3], bool))
