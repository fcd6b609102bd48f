"""A conversation about one picture: what has been said stays in the cache, and a turn prefills only what is new."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.cache import Prefix
from llava_jax.inference.generate import DecodeState
from llava_jax.inference.generation_options import GenerationOptions, generation_options
from llava_jax.inference.sampling import Sampling
from llava_jax.inference.streaming import stream_text
from llava_jax.inputs.batch import bucket_length, merged_length, pack
from llava_jax.inputs.groups import common_length, pack_questions
from llava_jax.inputs.prompt import as_turns
from llava_jax.inputs.types import Questions

if TYPE_CHECKING:
    from llava_jax.inference.llava import Llava


@dataclass(frozen=True)
class CachedIds:
    """Token ids, -200 where an image goes, and their keys and values."""

    ids: np.ndarray
    prefix: Prefix


class Chat:
    """Made by `Llava.chat`. `turns` holds what has been said: question, answer, question, answer, …"""

    def __init__(self, llava: Llava, params, image, conv_mode: str | None, options: dict[str, Any]):
        self.llava, self.params, self.conv_mode = llava, params, conv_mode
        generation_options(llava.config.generation, **options)  # for its errors
        self._options = options
        self.images = llava.load_images(image)
        self.sizes = [image.size for image in self.images]  # (width, height) of each
        self.turns: list[str] = []
        self.cached: CachedIds | None = None  # what need not be prefilled again

    def send(
        self,
        question,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> str:
        """The answer to the next question. Options are as `Llava.generate` has them; None is as the chat was made."""
        numbers: dict[str, Any] = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        return "".join(self.stream(question, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, **numbers))

    def stream(
        self,
        question,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Generator[str]:
        """`send`, as it comes. If it is not read to its end, what was read is the answer.

        Raises:
            ValueError: it cannot be asked; the conversation is then as it was.
        """
        given: dict[str, Any] = dict(max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        given |= dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        asked = {name: value for name, value in given.items() if value is not None}
        options = generation_options(self.llava.config.generation, **self._options | asked)
        (question,) = as_turns([question], self.llava.config.mm_use_im_start_end).texts
        ids = np.asarray(self.llava.prompt_ids([*self.turns, question], self.sizes, self.conv_mode))
        self.cached = cached = self._reuse(ids)
        questions = pack_questions([[ids[len(cached.ids) :]]], 1, 1)
        state = self.llava.engine.sample_first_token(self.params, cached.prefix, questions, options)
        return self._stream(question, ids, cached.prefix, questions, state, options)

    def _stream(
        self, question: str, ids, prefix: Prefix, questions: Questions, state: DecodeState, options: GenerationOptions
    ) -> Generator[str]:
        llava, said = self.llava, []
        with contextlib.suppress(GeneratorExit):  # whoever reads it has heard enough
            for piece in stream_text(llava.engine, llava.tokenizer, self.params, prefix, state, options):
                state = piece.state  # the older one's buffers are given away
                said.append(piece.text)
                if piece.text:
                    yield piece.text
        self.turns += [question, "".join(said).strip()]
        self._keep(ids, prefix, questions, state)

    def _reuse(self, ids: np.ndarray) -> CachedIds:
        """What is cached of these ids: cut down to what they begin with, or prefilled, all but the last id."""
        engine, config = self.llava.engine, self.llava.config
        shared, prefix = 0, None
        if self.cached is not None:
            shared, prefix = min(common_length([self.cached.ids, ids]), len(ids) - 1), self.cached.prefix
        if prefix is None or np.any(ids[shared:] == IMAGE_TOKEN_INDEX):
            shared = len(ids) - 1
            prefix, _ = engine.prefill(self.params, pack([ids[:-1]], self.images, config))
        lengths = np.array([merged_length(ids[:shared], self.sizes, config)], np.int32)
        return CachedIds(ids[:shared], replace(prefix, lengths=lengths))

    def _keep(self, ids: np.ndarray, prefix: Prefix, questions: Questions, state: DecodeState) -> None:
        """Move the question and the answer into the prefix, for the next turn."""
        kept = np.asarray(state.tokens)[0, 0, : int(state.step) - 1]  # the newest token was never an input
        needed = int(prefix.lengths[0]) + state.suffix.valid.shape[-1]
        capacity = max(prefix.capacity, bucket_length(needed, self.llava.config))
        prefix = self.llava.engine.append_to_prefix(prefix, state, questions, capacity)
        self.cached = CachedIds(np.concatenate([ids, kept]), prefix)
