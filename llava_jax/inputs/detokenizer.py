"""Text as it comes: token ids one at a time, into pieces that are final."""

from __future__ import annotations

from collections.abc import Iterable

from llava_jax.inputs.tokenizer import BYTE_PIECE, LlamaTokenizer


class IncrementalDetokenizer:
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
        self._looked = 0  # at characters for a stop string
        self._searches = [_Search(s) for s in self.stop]

    def push(self, token_id: int) -> str:
        """The text that has become final with this id, often empty."""
        if self.stopped:
            return ""
        self._ids.append(int(token_id))
        text = _settled_text(self.tokenizer, self._ids)
        for search in self._searches:
            search.push(text[self._looked :])
        self._looked = len(text)
        found = min((search.found for search in self._searches if search.found is not None), default=None)
        pending = len(text) - max((search.matched for search in self._searches if search.found is None), default=0)
        self.stopped = found is not None and found <= pending
        return self._send(text[: pending if found is None else min(found, pending)])

    def flush(self) -> str:
        """What was still held back, once no more ids come."""
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._send(text[: min((i for i in map(text.find, self.stop) if i >= 0), default=None)])

    def _send(self, text: str) -> str:
        piece = text.strip()[self._sent :]
        self._sent += len(piece)
        return piece


def _settled_text(tokenizer, ids: list[int]) -> str:
    """The part of the text that no further id can change, for our tokenizer and for those of transformers."""
    if isinstance(tokenizer, LlamaTokenizer):
        return tokenizer.settled_text(ids)

    def is_byte_or_nothing(token_id: int) -> bool:
        token = tokenizer.convert_ids_to_tokens(token_id)
        return bool(token and BYTE_PIECE.fullmatch(token)) or not tokenizer.decode([token_id], skip_special_tokens=True)

    end = len(ids)
    while end and is_byte_or_nothing(ids[end - 1]):
        end -= 1
    return tokenizer.decode(ids[:end], skip_special_tokens=True).rstrip("\ufffd")


class _Search:
    """Looks for one string in a text that comes in pieces, in linear time (Knuth, Morris and Pratt).

    `found` is where it first begins; before that, `matched` is how much of it the text ends with.
    """

    def __init__(self, wanted: str):
        self.wanted = wanted
        self.found: int | None = None
        self.matched = 0
        self._seen = 0  # characters
        self._shorter = [0, 0]  # for each matched length so far: the next shorter one that the text then ends with too

    def push(self, piece: str) -> None:
        if self.found is not None:
            return
        for character in piece:
            self._seen += 1
            self.matched = self._longest(self.matched, character)
            if self.matched == len(self.wanted):
                self.found = self._seen - self.matched
                return
            if self.matched == len(self._shorter):
                shorter = self._shorter[self.matched - 1]
                self._shorter.append(self._longest(shorter, self.wanted[self.matched - 1]))

    def _longest(self, matched: int, character: str) -> int:
        """The longest beginning that a text ends with which ended with `matched` of it, after one more character."""
        while matched and self.wanted[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.wanted[matched] == character)
