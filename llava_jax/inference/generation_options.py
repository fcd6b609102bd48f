"""How an answer is decoded, from what the caller says: checked before any work."""

from __future__ import annotations

import numpy as np

from llava_jax.config import GenerationDefaults
from llava_jax.inference.sampling import checked, sampling_of
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.prompt import as_texts

MOST_NEW_TOKENS = 1 << 20  # room for all of them is taken at the start


def plan_decode(defaults: GenerationDefaults, max_new_tokens: int = 512, sampling=None, **numbers):
    """(slots, bucketed; limit; sampling, checked) for so many new tokens.

    `sampling` is a Greedy or Sample; or else `temperature` (0: greedy), `top_p`, `top_k` and `seed` make one.

    Raises:
        ValueError: a number is out of its range.
    """
    limit = whole_number("max_new_tokens", max_new_tokens, 1, MOST_NEW_TOKENS)
    if sampling is not None and numbers:
        raise ValueError(f"sampling={sampling!r:.80} and {', '.join(numbers)} are two ways to say it; give one")
    sampling = sampling_of(defaults, **numbers) if sampling is None else checked(sampling)
    return 1 << max(5, (limit - 1).bit_length()), np.int32(limit), sampling


def stop_strings(stop) -> tuple[str, ...]:
    """The texts that end an answer; one of them may be given alone, and None is none.

    Raises:
        ValueError: one is no text, is empty, or has half a character.
    """
    texts = as_texts(() if stop is None else stop, "stop")
    if "" in texts:
        raise ValueError("stop: an empty text would end every answer at once; leave it out")
    return texts
