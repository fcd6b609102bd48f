"""Answers as the OpenAI API writes them, whole or in chunks: that of a chat, and that of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llava_jax.inference.requests import Token
from llava_jax.serve.logprobs import Writer, chat_logprobs, text_logprobs

Json = dict[str, Any]


class Piece(NamedTuple):
    """What is new of one answer."""

    answer: int  # its number
    text: str = ""  # final: never half a character, nor what may become a stop string
    tokens: tuple[Token, ...] = ()
    finish: str | None = None  # "stop" or "length" on the last one


@dataclass
class Tally:
    """What a request has cost so far, for `usage`, the log and the metrics."""

    prompt_tokens: int = 0  # positions, those of the images among them
    new_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # answer → positions of its prompt found in the cache

    def cached_tokens(self, answers_per_prompt: int) -> int:
        """Of each prompt once: what the first of its answers found, before it was there for the others."""
        prompts: dict[int, int] = {}
        for index, found in self.cached.items():
            prompt = index // answers_per_prompt
            prompts[prompt] = min(found, prompts.get(prompt, found))
        return sum(prompts.values())

    def usage(self, answers_per_prompt: int) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens(answers_per_prompt)},
        }


# ---- the two forms


@dataclass(frozen=True)
class Form:
    """How one endpoint writes its answers."""

    prefix: str  # of ids
    whole: str  # its `object`, whole and in chunks
    chunk: str
    opening: Callable[[], Json] | None  # of each answer, before its first piece
    content: Callable[[str], Json]
    delta: Callable[[str], Json]
    logprobs: Callable[[Writer, Sequence[Token], int], Json]


CHAT = Form(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda: {"delta": {"role": "assistant", "content": ""}},
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text} if text else {}},
    lambda writer, tokens, offset: chat_logprobs(writer, tokens),
)
TEXT = Form(
    "cmpl-",
    "text_completion",
    "text_completion",
    None,
    lambda text: {"text": text},
    lambda text: {"text": text},
    text_logprobs,
)


@dataclass(frozen=True)
class Envelope:
    """What is the same in all that is said of one request."""

    form: Form
    id: str
    created: int  # Unix time
    model: str
    writer: Writer | None = None  # None: without log-probabilities

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Json) -> Json:
        """The answers, of the pieces of each."""
        choices = []
        for index, own in enumerate(pieces):
            tokens = [token for piece in own for token in piece.tokens]
            content = self.form.content("".join(piece.text for piece in own))
            choices.append(self._choice(index, content, tokens, 0, own[-1].finish))
        return self._around(self.form.whole, choices) | {"usage": usage}

    def opening(self, answers: int, usage: Json) -> list[Json]:
        """The chunks before all others."""
        if self.form.opening is None:
            return []
        choices = [self._choice(i, self.form.opening(), (), 0, None) for i in range(answers)]
        return [self._around(self.form.chunk, [choice]) | usage for choice in choices]

    def piece(self, piece: Piece, offset: int, usage: Json) -> Json | None:
        """A chunk; None where there is nothing to say yet. `offset` as `text_logprobs` has it."""
        if not (piece.text or piece.finish or (piece.tokens and self.writer)):
            return None
        choice = self._choice(piece.answer, self.form.delta(piece.text), piece.tokens, offset, piece.finish)
        return self._around(self.form.chunk, [choice]) | usage

    def length(self, piece: Piece) -> int:
        """Characters of a piece's tokens, where they are told."""
        return sum(len(self.writer.write(token.id).text) for token in piece.tokens) if self.writer else 0

    def closing(self, usage: Json) -> Json:
        """The chunk that tells the usage."""
        return self._around(self.form.chunk, []) | {"usage": usage}

    def _choice(self, index: int, content: Json, tokens: Sequence[Token], offset: int, finish: str | None) -> Json:
        told = self.form.logprobs(self.writer, tokens, offset) if self.writer and tokens else None
        return {"index": index, **content, "logprobs": told, "finish_reason": finish}

    def _around(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
