"""How the next token is chosen: `Greedy()`, or `Sample(…)` as transformers' logits warpers do it."""

from __future__ import annotations

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import GenerationDefaults


@flax.struct.dataclass
class Greedy:
    """The most likely token."""

    def choose(self, logits: jax.Array, tokens: jax.Array, step: jax.Array) -> jax.Array:
        """logits float32 [..., V] → int32 [...]."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@flax.struct.dataclass
class Sample:
    """A token drawn from the distribution after the warpers, in transformers' order.

    Every field is traced, so other values compile nothing. 0 turns top_k and min_p off, 1 turns top_p and
    repetition_penalty off; the penalty looks at the answer's own tokens, as transformers' does given embeddings.
    """

    temperature: float | np.float32 = 1.0
    top_k: int | np.int32 = 50
    top_p: float | np.float32 = 1.0
    min_p: float | np.float32 = 0.0
    repetition_penalty: float | np.float32 = 1.0
    seed: int | np.uint32 = 0

    def choose(self, logits: jax.Array, tokens: jax.Array, step: jax.Array) -> jax.Array:
        """logits float32 [..., V], tokens int32 [..., S] of which `step` are there → int32 [...].

        The draw depends on the seed and the step alone: a row gives the same alone and at any place in a batch.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        noise = jax.random.gumbel(key, logits.shape[-1:])
        return jnp.argmax(self.warp(logits, tokens, step) + noise, axis=-1).astype(jnp.int32)

    def warp(self, logits: jax.Array, tokens: jax.Array, step: jax.Array) -> jax.Array:
        """The warped logits, -inf where a token is out."""
        penalized = jnp.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        logits = jnp.where(_said(tokens, step, logits.shape[-1]), penalized, logits) / self.temperature
        ordered = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(logits.shape[-1])
        kept = (self.top_k == 0) | (rank < self.top_k) | (rank == 0)
        probs = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        not_above = jnp.cumsum(probs[..., ::-1], axis=-1)[..., ::-1]  # this token and all less likely ones
        kept &= (self.top_p >= 1) | (not_above > 1 - self.top_p) | (rank == 0)
        probs = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        kept &= probs >= self.min_p * probs[..., :1]
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)


def _said(tokens: jax.Array, step: jax.Array, vocab_size: int) -> jax.Array:
    """bool [..., V]: which words are among the first `step` of tokens [..., S]."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    words = jnp.where(jnp.arange(rows.shape[-1]) < step, rows, vocab_size)  # past the end: dropped
    said = jnp.zeros((len(rows), vocab_size), bool).at[jnp.arange(len(rows))[:, None], words].set(True, mode="drop")
    return said.reshape(*tokens.shape[:-1], vocab_size)


def checked(sampling: Greedy | Sample) -> Greedy | Sample:
    """The same with its numbers checked and as arrays of fixed types, so that 1 and 1.0 are one program.

    Raises:
        ValueError: a number is out of its range.
    """
    if isinstance(sampling, Greedy):
        return sampling
    if not sampling.temperature > 0:
        raise ValueError(f"temperature={sampling.temperature!r} must be more than 0; 0 is greedy, Greedy()")
    for name in ("top_p", "repetition_penalty"):
        value = getattr(sampling, name)
        if not 0 < value <= (1 if name == "top_p" else float("inf")):
            raise ValueError(
                f"{name}={value!r} must be {'in (0, 1]' if name == 'top_p' else 'more than 0'}; 1 turns it off"
            )
    if sampling.top_k < 0:
        raise ValueError(f"top_k={sampling.top_k!r} must be 0 (off) or more")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(f"min_p={sampling.min_p!r} must be in [0, 1]; 0 turns it off")
    floats = {n: np.float32(getattr(sampling, n)) for n in ("temperature", "top_p", "min_p", "repetition_penalty")}
    return Sample(**floats, top_k=np.int32(sampling.top_k), seed=np.uint32(sampling.seed % 2**32))


def sampling_of(defaults: GenerationDefaults, temperature: float = 0.0, top_p=None, top_k=None, seed: int = 0):
    """Greedy (temperature 0) or Sample, as the original's command line has it; what is None is in the defaults.

    Raises:
        ValueError: a number is out of range.
    """
    top_p = defaults.top_p if top_p is None else top_p
    top_k = defaults.top_k if top_k is None else top_k
    sample = Sample(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    checked(replace(sample, temperature=temperature or 1.0))  # a wrong number is wrong, used or not
    return sample if temperature else Greedy()
