"""Log-probabilities of tokens in OpenAI's two forms: that of chats and that of texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_jax.inference.requests import Token
from llava_jax.inputs.detokenizer import BYTE_PIECE

LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's own stand-in


class Written(NamedTuple):
    """A token as OpenAI writes it."""

    text: str  # `bytes:\\xe2` for a byte that is no character
    bytes: list[int] | None  # None: not known


@dataclass(frozen=True)
class Writer:
    """Writes a tokenizer's tokens one by one, each with the space before it."""

    tokenizer: Any

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        return {i: piece for piece, i in self.tokenizer.get_vocab().items()}

    @functools.cached_property
    def _anchor(self) -> int:
        """A token that others are written behind, for the first of a text loses its space."""
        return self.tokenizer.encode("a")[-1]

    def write(self, token_id: int) -> Written:
        piece = self._pieces.get(token_id, "")
        if byte := BYTE_PIECE.fullmatch(piece):
            value = int(byte[1], 16)
            return Written(chr(value) if value < 128 else f"bytes:\\x{byte[1].lower()}", [value])
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        text = decode([self._anchor, token_id])[len(decode([self._anchor])) :] or piece  # a special one
        return Written(text, None if "\ufffd" in text else list(text.encode()))


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else float(logprob)


def chat_logprobs(writer: Writer, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        written = writer.write(token_id)
        return {"token": written.text, "logprob": _finite(logprob), "bytes": written.bytes}

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(*other) for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(writer: Writer, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`offset`: characters of the answer's tokens before these."""
    texts = [writer.write(token.id).text for token in tokens]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    likely = []
    for token in tokens:
        said = [(token.id, token.logprob)] if all(token.id != i for i, _ in token.top) else []
        likely.append({writer.write(i).text: _finite(logprob) for i, logprob in [*token.top, *said]})
    logprobs = [_finite(token.logprob) for token in tokens]
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": likely, "text_offset": offsets}
