"""A conversation about one picture: what has been said stays in the cache, and a turn prefills only what is new."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.cache import Prefix, Suffix
from llava_jax.inference.generation_options import stop_strings
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.batch import bucket_length, pack
from llava_jax.inputs.groups import common_length, pack_questions
from llava_jax.inputs.prompt import as_turns
from llava_jax.models.quantize import Int8, to_int8


class Chat:
    """Made by `Llava.chat`. `turns` holds what has been said: question, answer, question, answer, …"""

    def __init__(self, llava, params, image=None, conv_mode: str | None = None, **options):
        self.llava, self.params, self.conv_mode, self.options = llava, params, conv_mode, options
        self.tiles, self.sizes = llava.load_images(image)
        self.turns: list[str] = []
        self._cached = np.zeros(0, np.int64)  # the ids whose keys and values the prefix holds
        self._prefix: Prefix | None = None

    def send(self, question: str, **options) -> str:
        """The answer to the next question; options as `generate` has them, over those of the chat."""
        return "".join(self.stream(question, **options))

    def stream(self, question: str, **options) -> Generator[str]:
        """`send`, as it comes. If it is not read to its end, what was read is the answer.

        Raises:
            ValueError: it cannot be asked; the conversation is then as it was.
        """
        (question,) = as_turns([question], self.llava.config.mm_use_im_start_end).texts
        ids = np.asarray(self.llava.prompt_ids([*self.turns, question], self.sizes, self.conv_mode))
        options = {**self.options, **options}
        stop = stop_strings(options.pop("stop", ()))
        slots, limit, sampling = self.llava.plan_decode(**options)
        prefix, shared = self._reuse(ids)
        questions = pack_questions([[ids[shared:]]], 1, 1)
        state = self.llava._first(slots, self.params, prefix, None, questions, sampling)
        return self._stream(question, ids, prefix, questions, state, limit, sampling, stop)

    def _stream(self, question, ids, prefix: Prefix, questions, state, limit, sampling, stop) -> Generator[str]:
        pieces = []
        with contextlib.suppress(GeneratorExit):  # whoever reads it has heard enough
            for piece, newest in self.llava.decode(self.params, prefix, state, limit, sampling, stop):
                state = newest  # the older one's buffers are given away
                pieces.append(piece)
                if piece:
                    yield piece
        self.turns += [question, "".join(pieces).strip()]
        self._keep(ids, prefix, questions, state)

    def _positions(self, ids) -> int:
        """How many positions some ids of the prompt take."""
        shown = self.sizes[: int(np.sum(ids == IMAGE_TOKEN_INDEX))]
        images = sum(int(num_image_tokens(width, height, self.llava.config)) for width, height in shown)
        return int(np.sum(ids != IMAGE_TOKEN_INDEX)) + images

    def _reuse(self, ids) -> tuple[Prefix, int]:
        """The prefix, and how many of the ids it holds, once it is cut down to them (or made, for the first turn)."""
        prefix = self._prefix
        shared = min(common_length([self._cached, ids]), len(ids) - 1) if prefix is not None else 0
        if prefix is None or np.any(ids[shared:] == IMAGE_TOKEN_INDEX):
            shared, head = len(ids) - 1, ids[:-1]
            batch = pack([head], [np.full(len(head), -100)], self.tiles, self.sizes, self.llava.config)
            prefix, _ = self.llava._prefill(self.params, batch)
        lengths = np.array([self._positions(ids[:shared])], np.int32)
        valid = np.arange(prefix.valid.shape[1]) < lengths[:, None]
        self._prefix, self._cached = replace(prefix, valid=valid, lengths=lengths), ids[:shared]
        return self._prefix, shared

    def _keep(self, ids, prefix: Prefix, questions, state) -> None:
        """Move the question and the answer into the prefix, for the next turn."""
        kept = np.asarray(state.tokens)[0, 0, : int(state.step) - 1]  # the newest token was never an input
        needed = int(prefix.lengths[0]) + state.suffix.valid.shape[-1]
        capacity = max(prefix.valid.shape[1], bucket_length(needed, self.llava.config))
        length = np.int32(questions.lengths[0, 0])
        self._prefix = self.llava._fold(capacity, questions.ids.shape[-1], prefix, state.suffix, length)
        self._cached = np.concatenate([ids, kept])


def fold(capacity: int, question_slots: int, prefix: Prefix, suffix: Suffix, question_length: jax.Array) -> Prefix:
    """One row's suffix written behind its prefix, G = R = 1: the question without its padding, then the new tokens.

    Args:
        capacity: positions of the new prefix; what is valid of them is the caller's to say.
    """
    start = prefix.lengths[0]

    def join(whole, part):
        part = part[:, 0].swapaxes(1, 2)
        return jax.tree.map(write, whole, to_int8(part, -1) if isinstance(whole, Int8) else part)

    def write(whole, part):
        more = [(0, 0), (0, 0), (0, capacity - whole.shape[2]), (0, 0)]
        whole = jnp.pad(whole, more[: whole.ndim])
        question, new = part[:, :, :question_slots], part[:, :, question_slots:]
        whole = jax.lax.dynamic_update_slice_in_dim(whole, question, start, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(whole, new, start + question_length, axis=2)

    pairs = zip(prefix.keys_values, suffix.keys_values, strict=True)
    keys_values = [tuple(join(a, b) for a, b in zip(old, new, strict=True)) for old, new in pairs]
    return replace(prefix, keys_values=keys_values, valid=jnp.zeros((1, capacity), bool))
