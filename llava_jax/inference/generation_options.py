"""How an answer is decoded, from what the caller says: checked before any work, and then one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.config import GenerationDefaults
from llava_jax.inference.sampling import Greedy, Sample, sampling_of, validate
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.prompt import as_texts

MOST_NEW_TOKENS = 1 << 20  # room for all of them is taken at the start


@dataclass(frozen=True)
class GenerationOptions:
    """Made by `generation_options`, which checks it."""

    max_new_tokens: int
    sampling: Greedy | Sample
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
    sampling: Greedy | Sample | None = None,
    stop: str | Sequence[str] | None = None,
) -> GenerationOptions:
    """The options of an answer, as `Llava.generate` explains them.

    Args:
        defaults: the checkpoint's, of `top_p` and `top_k`.

    Raises:
        ValueError: a number is out of its range, two things exclude each other, or a stop string is no text.
    """
    limit = whole_number("max_new_tokens", max_new_tokens, 1, MOST_NEW_TOKENS)
    if sampling is None:
        return GenerationOptions(limit, sampling_of(defaults, temperature, top_p, top_k, seed), _stop_strings(stop))
    numbers = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    if given := [name for name, value in numbers.items() if value is not None]:
        raise ValueError(f"sampling={sampling!r:.80} and {', '.join(given)} are two ways to say it; give one")
    return GenerationOptions(limit, validate(sampling), _stop_strings(stop))


def _stop_strings(stop) -> tuple[str, ...]:
    texts = as_texts(() if stop is None else stop, "stop")
    if "" in texts:
        raise ValueError("stop: an empty text would end every answer at once; leave it out")
    return texts
