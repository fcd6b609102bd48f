"""How an answer is decoded, from what the caller says: checked before any work, and then one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.config import GenerationDefaults
from llava_jax.inference.sampling import Greedy, Sample, Sampling, validate
from llava_jax.inputs.numbers import finite_number, whole_number
from llava_jax.inputs.prompt import as_texts

MOST_NEW_TOKENS = 1 << 20  # room for all of them is taken at the start


@dataclass(frozen=True)
class GenerationOptions:
    """Made by `generation_options`, which checks it."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()  # texts that end an answer, and are cut off

    @property
    def output_capacity(self) -> int:
        """Slots for new tokens: 32, 64, 128, …, so that few programs serve every `max_new_tokens`."""
        return 1 << max(5, (self.max_new_tokens - 1).bit_length())


def generation_options(
    defaults: GenerationDefaults,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] | None = None,
) -> GenerationOptions:
    """The options of an answer, as `Llava.generate` explains them; `defaults` are the checkpoint's top_p and top_k.

    Raises:
        ValueError: a number is out of its range, two things exclude each other, or a stop string is no text.
    """
    limit = whole_number("max_new_tokens", max_new_tokens, 1, MOST_NEW_TOKENS)
    numbers = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    given: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if sampling is None:
        given = dict(temperature=0.0, top_p=defaults.top_p, top_k=defaults.top_k, seed=0) | given
        greedy = finite_number("temperature", given["temperature"]) == 0
        given["temperature"] = 1.0 if greedy else given["temperature"]
        sampling = validate(Sample(**given))  # wrong is wrong, used or not
        sampling = Greedy() if greedy else sampling
    elif given:
        raise ValueError(f"sampling={sampling!r:.80} and {', '.join(given)} are two ways to say it; give one")
    else:
        sampling = validate(sampling)
    texts = as_texts(() if stop is None else stop, "stop")
    if "" in texts:
        raise ValueError("stop: an empty text would end every answer at once; leave it out")
    return GenerationOptions(limit, sampling, texts)
