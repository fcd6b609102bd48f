"""The decoder's arithmetic as pure functions: norm, rotary positions, loss (`attention.py` has the attention)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import RopeScaling, TextConfig
from llava_jax.constants import IGNORE_INDEX


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [..., E] / rms(x), rounded to x's dtype before the weight multiplies (LlamaRMSNorm)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scale * wide.astype(x.dtype)


def divide_exactly(x: jax.Array, by: np.ndarray) -> jax.Array:
    """float32 x / by, correctly rounded, which XLA's own division is not: one step back by the quotient's remainder.

    The remainder is exact because the quotient and `by` are split into halves whose products fit in float32.
    """
    inverse, mask = np.float32(1) / by, np.uint32(0xFFFFF000)
    by_head = (by.view(np.uint32) & mask).view(np.float32)
    quotient = x * inverse
    head = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(quotient, jnp.uint32) & mask, jnp.float32)
    tail, by_tail = quotient - head, by - by_head
    remainder = ((x - head * by_head) - head * by_tail - tail * by_head) - tail * by_tail
    return quotient + remainder * inverse


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · σ(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def _inverse_frequencies(config: TextConfig, base) -> np.ndarray:
    """float32 [..., D/2] for float64 `base` [...]: 1 / base^(2i/D), rounded where torch rounds.

    The last bit matters: it is worth 1e-3 on the logits of a few thousand positions.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    rounded = np.asarray(base, np.float32).astype(np.float64)
    power = rounded[..., None] ** exponent.astype(np.float64)
    return np.float32(1) / power.astype(np.float32)


def _llama3_frequencies(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: low frequencies slowed by `factor`, a smooth ramp between (transformers' llama3 rope_scaling)."""
    wavelength = 2 * np.pi / plain
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    ramp = scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor
    ramp = ramp / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - ramp) * plain / scaling.factor + ramp * plain
    slowed = np.where(wavelength > low, plain / scaling.factor, plain)
    return np.where((wavelength <= low) & (wavelength >= high), between, slowed).astype(np.float32)


def _dynamic_frequencies(config: TextConfig, factor: float, max_seq_len: int) -> np.ndarray:
    """Dynamic NTK: one row for each length from the trained one to `max_seq_len`; the base grows with the length."""
    trained = config.max_position_embeddings
    lengths = np.arange(trained, max(trained, max_seq_len) + 1, dtype=np.float64)
    stretch = factor * lengths / trained - (factor - 1)
    return _inverse_frequencies(config, config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2)))


def rotary_embedding(
    positions: jax.Array, config: TextConfig, seq_len: jax.Array, max_seq_len: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [..., L, D], half-split (each angle stands at i and at i + D/2).

    Args:
        positions: int32 [..., L].
        seq_len: int32 [...]: how long each row's sequence is so far; only `dynamic` scaling looks at it.
        max_seq_len: what `seq_len` can be at most, known when compiling.
    """
    scaling, angles = config.rope_scaling, positions.astype(jnp.float32)[..., None]
    plain = _inverse_frequencies(config, config.rope_theta)
    frequencies: jax.Array | np.ndarray = plain
    if scaling and scaling.rope_type == "dynamic":
        table = jnp.asarray(_dynamic_frequencies(config, scaling.factor, max_seq_len))
        beyond = jnp.clip(seq_len - config.max_position_embeddings, 0, len(table) - 1)
        frequencies = table[beyond][..., None, :]
    elif scaling and scaling.rope_type == "llama3":
        frequencies = _llama3_frequencies(plain, scaling)
    elif scaling:  # linear
        angles = angles / scaling.factor
    angles = angles * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [..., L, H, D] by cos, sin [..., L, D], rounded to x's dtype first (apply_rotary_pos_emb)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[..., None, :].astype(x.dtype) + turned * sin[..., None, :].astype(x.dtype)


def flat_positions(shape: tuple[int, ...]) -> jax.Array:
    """uint32 of that shape: where each element stands in C order, modulo 2**32."""
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    places = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(n) for axis, n in enumerate(strides))
    return sum(places, jnp.uint32(0))


def label_log_probs(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """log softmax of logits [..., V] at labels [...]; meaningless where a label is -100."""
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def causal_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next token: logits [B, L, V], labels int32 [B, L], of which -100 is left out.

    NaN if nothing is labelled, as in the reference.
    """
    logits, labels = logits[:, :-1].astype(jnp.float32), labels[:, 1:]
    labelled = labels != IGNORE_INDEX
    return -jnp.sum(jnp.where(labelled, label_log_probs(logits, labels), 0.0)) / jnp.sum(labelled)
