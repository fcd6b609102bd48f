"""How the next token is chosen: `Greedy()`, or `Sample(…)` as transformers' logits warpers do it."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.inputs.numbers import finite_number, whole_number


@flax.struct.dataclass
class Greedy:
    """The most likely token."""

    def choose(self, logits: jax.Array, said: jax.Array, step: jax.Array) -> jax.Array:
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

    def choose(self, logits: jax.Array, said: jax.Array, step: jax.Array) -> jax.Array:
        """logits float32 [..., V], said bool [..., V]: which words the answer has; step: its tokens → int32 [...].

        The draw depends on the seed and the step alone: a row gives the same alone and at any place in a batch.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        noise = jax.random.gumbel(key, logits.shape[-1:])
        return jnp.argmax(self.warp(logits, said) + noise, axis=-1).astype(jnp.int32)

    def warp(self, logits: jax.Array, said: jax.Array) -> jax.Array:
        """The warped logits, -inf where a token is out."""
        penalized = jnp.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        logits = jnp.where(said, penalized, logits) / self.temperature
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


Sampling = Greedy | Sample


def said_words(tokens: jax.Array, vocab_size: int) -> jax.Array:
    """bool [..., V]: which words are among tokens int32 [..., S], of which -1 is none."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    words = jnp.where(rows >= 0, rows, vocab_size)  # past the end: dropped
    said = jnp.zeros((len(rows), vocab_size), bool).at[jnp.arange(len(rows))[:, None], words].set(True, mode="drop")
    return said.reshape(*tokens.shape[:-1], vocab_size)


# Below it float32 cannot divide logits: it becomes 0, or they infinity. Just above it the likeliest token is certain.
LEAST_TEMPERATURE = 1e-30
PENALTIES = 0.01, 100.0  # the same, with what is divided twice


def validate(sampling: Sampling) -> Sampling:
    """The same with its numbers checked and of fixed types, so that 1 and 1.0 are one program.

    A temperature below LEAST_TEMPERATURE is greedy.

    Raises:
        ValueError: a number is out of its range, or it is neither a Greedy nor a Sample.
    """
    if isinstance(sampling, Greedy):
        return sampling
    if not isinstance(sampling, Sample):
        raise ValueError(f"sampling={sampling!r:.80} must be a Greedy or a Sample")
    temperature = finite_number("temperature", sampling.temperature)
    top_p, min_p = finite_number("top_p", sampling.top_p), finite_number("min_p", sampling.min_p)
    penalty = finite_number("repetition_penalty", sampling.repetition_penalty)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be more than 0; 0 is greedy, Greedy()")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be in (0, 1]; 1 turns it off")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p!r} must be in [0, 1]; 0 turns it off")
    if not PENALTIES[0] <= penalty <= PENALTIES[1]:
        least, most = PENALTIES
        raise ValueError(f"repetition_penalty={penalty!r} must be from {least:g} to {most:g}; 1 turns it off")
    top_k = whole_number("top_k", sampling.top_k, 0, 2**31 - 1, "; 0 turns it off")
    seed = whole_number("seed", sampling.seed, 0, 2**32 - 1)
    if temperature < LEAST_TEMPERATURE:
        if penalty == 1:
            return Greedy()
        temperature, top_k = 1.0, 1
    f32 = np.float32
    return Sample(f32(temperature), np.int32(top_k), f32(top_p), f32(min_p), f32(penalty), np.uint32(seed))
