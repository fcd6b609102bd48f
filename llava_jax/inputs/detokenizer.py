"""Text as it comes: token ids one at a time, into pieces that are final."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from llava_jax.inputs.tokenizer import BYTE_PIECE, LlamaTokenizer

REPLACEMENT = "\ufffd"  # in place of a byte that is no character, or not yet one
MOST_UNDECIDED = 8  # ids that end within a character, until somewhere before them is taken as its beginning
LONGEST_CHARACTER = 4  # bytes


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
        self._text = _Cleaned(tokenizer) if _cleans_up(tokenizer) else _Decoded(tokenizer)
        self._length = 0  # characters that have been looked at for a stop string
        self._held = ""  # the last of them, which are not given out yet
        self._begun = False  # something was given out
        self._searches = [_Search(s) for s in self.stop]

    def push(self, token_id: int) -> str:
        """The text that has become final with this id, often empty."""
        return "" if self.stopped else self._take(self._text.push(int(token_id)), last=False)

    def flush(self) -> str:
        """What was still held back, once no more ids come."""
        return "" if self.stopped else self._take(self._text.rest(), last=True)

    def _take(self, text: str, last: bool) -> str:
        self._held += text
        self._length += len(text)
        for search in self._searches:
            search.push(text)
        found = min((search.found for search in self._searches if search.found is not None), default=self._length)
        matched = max((search.matched for search in self._searches if search.found is None), default=0)
        pending = self._length if last else self._length - matched
        self.stopped = not last and found < self._length and found <= pending
        return self._send(min(found, pending))

    def _send(self, end: int) -> str:
        """The text until this character, but for white space at its end, and that at the beginning of all."""
        here = self._held[: max(0, len(self._held) - self._length + end)]
        piece = here.rstrip()
        self._held = self._held[len(piece) :]
        if not self._begun:
            piece = piece.lstrip()
        self._begun = self._begun or bool(piece)
        return piece


class _Decoded:
    """The text of ids that come one at a time, of which only the last few are decoded again.

    These begin where a character does, and the first of them have a text of their own: so what stands before them makes
    no difference to what comes after.
    """

    def __init__(self, tokenizer):
        ours = isinstance(tokenizer, LlamaTokenizer)
        self._tokenizer = tokenizer if ours else _Others(tokenizer)
        self._decode = self._tokenizer.decode
        self._ids: list[int] = []
        self._known = 0  # of them, which stay for the sake of the others
        self._given = 0  # characters of their text

    def push(self, token_id: int) -> str:
        """The text that no further id can change, as far as it is new."""
        if self._tokenizer.is_skipped(token_id):
            return ""
        self._ids.append(token_id)
        if self._tokenizer.is_undecided(token_id):
            return ""
        text = self._decode(self._ids)
        settled = text.rstrip(REPLACEMENT)
        new = settled[self._given :]
        self._given = max(self._given, len(settled))
        if len(self._ids) - self._known > MOST_UNDECIDED and settled != text:
            return new + self._cut(text)
        if settled == text and (own := self._decode(self._ids[self._known :])):
            self._ids = self._ids[self._known :]
            self._known, self._given = len(self._ids), len(own)
        return new

    def rest(self) -> str:
        """What was not settled yet, once no more ids come."""
        return self._decode(self._ids)[self._given :]

    def _cut(self, text: str) -> str:
        """Begin where a character does, before bytes that are none: what is new before it. The last few bytes may still
        become one."""
        last = len(self._ids) - (LONGEST_CHARACTER - 1)
        for start in range(last, last - LONGEST_CHARACTER, -1):
            before, behind = self._decode(self._ids[:start]), self._decode(self._ids[start:])
            if behind and before + behind == text:
                new = before[self._given :]
                self._ids, self._known, self._given = self._ids[start:], 0, max(0, self._given - len(before))
                return new
        return ""


class _Others:
    """A tokenizer of transformers, asked as ours; spaces before punctuation stay."""

    def __init__(self, tokenizer):
        self._token = tokenizer.convert_ids_to_tokens
        self.decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.is_skipped = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}.__contains__

    def is_undecided(self, token_id: int) -> bool:
        return bool(BYTE_PIECE.fullmatch(self._token(token_id) or ""))


# ---- spaces that a tokenizer takes out before punctuation


def _cleans_up(tokenizer) -> bool:
    if isinstance(tokenizer, LlamaTokenizer):
        return False
    ids = tokenizer.encode("a , b")
    return tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class _Cleaned:
    """As `_Decoded`, with the spaces before punctuation taken out, as transformers' `clean_up_tokenization` does it.

    All that it looks at begins with a space; further ones stand behind an n or an apostrophe, and four other characters
    never stand in a row. So there are places that it cannot reach across, and what is behind the last of them waits.
    """

    def __init__(self, tokenizer):
        self._decoded, self._clean = _Decoded(tokenizer), tokenizer.clean_up_tokenization
        self._held = ""

    def push(self, token_id: int) -> str:
        self._held += self._decoded.push(token_id)
        cut = len(self._held)
        if " " in self._held[-4:]:
            cut = max((match.start() for match in re.finditer("(?<![ 'n]) ", self._held)), default=0)
        new, self._held = self._clean(self._held[:cut]), self._held[cut:]
        return new

    def rest(self) -> str:
        return self._clean(self._held + self._decoded.rest())


# ---- stop strings


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
