"""The training loss, whose logits exist only where there is a label, and only a few at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llava_jax.constants import IGNORE_INDEX
from llava_jax.inputs.types import Targets
from llava_jax.models.ops import label_log_probs
from llava_jax.parallel.sharding import constrain_batch, row_shards

CHUNK_BYTES = 256 << 20  # of float32 logits alive at once on a device


def next_token_loss(hidden: jax.Array, targets: Targets[jax.Array], logits_of, vocab_size: int) -> jax.Array:
    """Mean cross-entropy over the labelled positions (LlamaForCausalLM's loss), in float32; 0 if there are none.

    Args:
        hidden: normed last hidden states [B, L, E].
        targets: which positions, and their labels [B, M].
        logits_of: hidden states [..., E] → float32 logits [..., V]. It runs again in the backward pass.
    """
    picked = constrain_batch(jnp.take_along_axis(hidden, targets.positions[..., None], axis=1))  # [B, M, E]
    rows, count = targets.labels.shape
    chunks = _divisor(count, rows // row_shards(rows) * count * vocab_size * 4 / CHUNK_BYTES)

    @jax.checkpoint
    def of_chunk(picked, labels):
        return -jnp.sum(jnp.where(labels != IGNORE_INDEX, label_log_probs(logits_of(picked), labels), 0.0))

    pairs = zip(jnp.split(picked, chunks, axis=1), jnp.split(targets.labels, chunks, axis=1), strict=True)
    total = sum(of_chunk(*pair) for pair in pairs)
    return total / jnp.maximum(jnp.sum(targets.labels != IGNORE_INDEX), 1)


def _divisor(count: int, least: float) -> int:
    """The smallest divisor of `count` that is not under `least`."""
    return next((n for n in range(1, count) if count % n == 0 and n >= least), count)
