"""Text as it comes: token ids one at a time, into pieces that are final."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava_jax.inputs.tokenizer import BYTE_PIECE, LlamaTokenizer


class TextStream:
    """Turns ids that come one at a time into pieces of text that are final: never half a character.

    The pieces, that of `flush` included, join to `decode(ids, skip_special_tokens=True)`, cut before the first of
    the `stop` strings and stripped. Where a piece might be the beginning of a stop string, or the white space at the
    end, it waits. `stopped` says that a stop string has come; later ids are ignored. Empty stop strings never match.
    """

    def __init__(self, tokenizer, stop: Iterable[str] = ()):
        self.tokenizer = tokenizer
        self.stop = tuple(s for s in stop if s)
        self.stopped = False
        self._ids: list[int] = []
        self._sent = 0  # characters given out so far

    def push(self, token_id: int) -> str:
        """The text that has become final with this id, often empty."""
        if self.stopped:
            return ""
        self._ids.append(int(token_id))
        text = _settled_text(self.tokenizer, self._ids)
        found, pending = _find_stop(text, self.stop), _begin_of_stop(text, self.stop)
        self.stopped = found is not None and found <= pending
        return self._send(text[: pending if found is None else min(found, pending)])

    def flush(self) -> str:
        """What was still held back, once no more ids come."""
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._send(text[: _find_stop(text, self.stop)])

    def _send(self, text: str) -> str:
        piece = text.strip()[self._sent :]
        self._sent += len(piece)
        return piece


def _settled_text(tokenizer, ids: list[int]) -> str:
    """The part of the text that no further id can change, for our tokenizer and for those of transformers."""
    if isinstance(tokenizer, LlamaTokenizer):
        return tokenizer.settled_text(ids)
    end = len(ids)
    while end and _is_byte_or_nothing(tokenizer, ids[end - 1]):
        end -= 1
    return tokenizer.decode(ids[:end], skip_special_tokens=True).rstrip("\ufffd")


def _is_byte_or_nothing(tokenizer, token_id: int) -> bool:
    token = tokenizer.convert_ids_to_tokens(token_id)
    return bool(token and BYTE_PIECE.fullmatch(token)) or not tokenizer.decode([token_id], skip_special_tokens=True)


def _find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((i for i in (text.find(s) for s in stop) if i >= 0), default=None)


def _begin_of_stop(text: str, stop: Sequence[str]) -> int:
    """Where the longest ending of the text begins that may yet become a stop string; the text's length if none."""
    longest = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return len(text) - longest
