"""Prompt → ids with the image placeholder, and ids → text.

`LlamaTokenizer` gives the ids and the texts of transformers 4.37.2's Llama tokenizers, which the reference uses: the
slow one, legacy or not, and the fast one. There is one here because transformers 5 gives other ids for 76 of the 208
prompts that tests/golden recorded from the reference. It needs sentencepiece only. Imports neither JAX nor torch.
"""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from etils import epath
from sentencepiece import SentencePieceProcessor

from llava_jax.config_schema import SPECIAL_NAMES, read_if_there
from llava_jax.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_jax.errors import reason_of
from llava_jax.records import LFS_POINTER, read_file

SPIECE_UNDERLINE = "▁"
DEFAULT_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# Serialized `normalizer_spec`s: after a model's bytes, such a message overrides those fields of the model's own.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # add_dummy_prefix: false
_PREFIX_AND_NOTHING_ELSE = b"\x1a\x06\x12\x00\x18\x01\x20\x00"  # no charsmap, dummy prefix, extra spaces kept
DOWNLOAD_AGAIN = "download it again"
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def tokenizer_image_token(prompt: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX) -> list[int]:
    """Ids of a prompt with `image_token_index` where `<image>` stands, as the reference's function of this name."""
    return join_around_images(prompt.split(DEFAULT_IMAGE_TOKEN), tokenizer, image_token_index)


def join_around_images(chunks: Sequence[str], tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX) -> list[int]:
    """Ids of the texts between a prompt's images, with `image_token_index` for each image.

    Each text is encoded alone and the BOS of all but the first is dropped, so that one after an image starts with the
    tokenizer's dummy prefix, as the checkpoints were trained.
    """
    first, *others = [tokenizer.encode(chunk) for chunk in chunks]
    skip = 1 if first and first[0] == tokenizer.bos_token_id else 0
    return [*first, *(i for chunk in others for i in (image_token_index, *chunk[skip:]))]


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of a text before SentencePiece sees it; lstrip and rstrip eat the spaces beside it."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    special: bool = False

    @classmethod
    def parse(cls, token: str | dict) -> AddedToken:
        """As the JSON files write one."""
        if isinstance(token, str):
            return cls(token)
        return cls(token["content"], *(bool(token.get(key)) for key in ("lstrip", "rstrip", "special")))


@dataclass(frozen=True)
class LlamaTokenizer:
    """A SentencePiece Llama tokenizer, as transformers 4.37.2 reads the same files."""

    model_proto: bytes = field(repr=False)  # of `tokenizer.model`
    special_tokens: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_SPECIAL))  # by name: `bos_token` …
    added_tokens: dict[int, AddedToken] = field(default_factory=dict)  # by id, the special ones among them
    additional_special_tokens: tuple[str, ...] = ()  # those without a name
    legacy: bool = True  # slow: every text between added tokens gets the dummy prefix, else the first only
    fast: bool = False  # the fast one encodes as legacy, and decodes invalid bytes and special tokens its own way
    add_bos_token: bool = True
    add_eos_token: bool = False

    # ---- ids; None where there is no such token

    bos_token_id = property(lambda self: self._special_id("bos_token"))
    eos_token_id = property(lambda self: self._special_id("eos_token"))
    pad_token_id = property(lambda self: self._special_id("pad_token"))

    def __len__(self) -> int:
        """Number of different tokens, the added ones included: the rows that the embedding table needs."""
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """Token → id of everything that a text can become."""
        return dict(self._vocabulary)

    def add_tokens(self, tokens: Iterable[str | AddedToken]) -> LlamaTokenizer:
        """A new tokenizer that has these as special tokens too, as transformers' `add_tokens(…, special_tokens=True)`.

        A token that the vocabulary lacks gets the next id after it; one that it has keeps its id. An added token that
        is named again stays what it was, except that the fast tokenizer then takes it as special.
        """
        added, additional = dict(self.added_tokens), list(self.additional_special_tokens)
        ids, known = dict(self._vocabulary), dict(self._added_by_content)
        for token in tokens:
            if isinstance(token, str) and token in known and not self.fast:
                continue
            token = known.get(token, AddedToken(token)) if isinstance(token, str) else token
            if not token.content:
                continue
            token_id = ids.setdefault(token.content, len(ids))
            known[token.content] = added[token_id] = replace(token, special=True)
            if token.content not in self.special_tokens.values() and token.content not in additional:
                additional.append(token.content)
        return replace(self, added_tokens=added, additional_special_tokens=tuple(additional))

    # ---- text → ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with BOS in front where the tokenizer adds it."""
        ids = [self._token_id(token) for token in self._tokenize(text)]
        if self.add_bos_token and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        if self.add_eos_token and self.eos_token_id is not None:
            ids.append(self.eos_token_id)
        return ids

    def _tokenize(self, text: str) -> list[str]:
        if self.legacy or self.fast or not text:
            return self._tokenize_around_added(text)
        tokens = self._tokenize_around_added(SPIECE_UNDERLINE + text.replace(SPIECE_UNDERLINE, " "))
        if len(tokens) > 1 and tokens[0] == SPIECE_UNDERLINE and tokens[1] in self._all_special:
            return tokens[1:]
        return tokens

    def _tokenize_around_added(self, text: str) -> list[str]:
        chunks = self._added_pattern.split(text)  # texts at even places, added tokens at odd ones
        for i in range(1, len(chunks), 2):
            token = self._added_by_content[chunks[i]]
            if token.rstrip:
                chunks[i + 1] = chunks[i + 1].lstrip()
            if token.lstrip:
                chunks[i - 1] = chunks[i - 1].rstrip()
        parts = ([chunk] if i % 2 else self._tokenize_chunk(chunk) for i, chunk in enumerate(chunks))
        return list(itertools.chain.from_iterable(parts))

    def _tokenize_chunk(self, text: str) -> list[str]:
        if self.legacy or self.fast or not text.startswith((SPIECE_UNDERLINE, " ")):
            return self._model.encode(text, out_type=str)
        # SentencePiece may strip a leading space, so the reference puts the text `<unk>` before it and cuts its pieces.
        unk = self.special_tokens["unk_token"]
        tokens = self._model.encode(unk + text, out_type=str)
        return tokens[len(self._model.encode(unk, out_type=str)) :]

    # ---- ids → text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. An id past the vocabulary (a model's table may be padded) is nothing.

        Raises:
            ValueError: an id is negative (-200 and -100 are placeholders, not tokens).
        """
        tokens = self._tokens(ids, skip_special_tokens)
        return self._text_fast(tokens) if self.fast else self._text_slow(tokens)

    def _tokens(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        ids, size = [int(i) for i in ids], self._model.get_piece_size()
        if ids and min(ids) < 0:
            raise ValueError(f"decode: {min(ids)} is not a token id; leave placeholders out of the ids")
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._skipped_ids]
        added = self.added_tokens
        return [added[i].content if i in added else self._model.id_to_piece(i) for i in ids if i in added or i < size]

    def _text_slow(self, tokens: list[str]) -> str:
        """Added tokens that are not special stand apart, with a space on each side."""
        runs = [(apart, list(run)) for apart, run in itertools.groupby(tokens, self._spaced.__contains__)]
        texts = [text for apart, run in runs for text in (run if apart else [self._text_of_run(run)])]
        return " ".join([*filter(None, texts[:-1]), *texts[-1:]])

    def _text_of_run(self, tokens: list[str]) -> str:
        """As `LlamaTokenizer.convert_tokens_to_string`: a special token is not SentencePiece's to decode."""
        text, pieces, after_special = "", [], False
        for i, token in enumerate(tokens):
            if i == 0:
                token = token.removeprefix(SPIECE_UNDERLINE)
            if token not in self._all_special:
                pieces.append(token)
                after_special = False
                continue
            if self.legacy and i > 0 and not after_special:
                text += " "
            text += self._model.decode(pieces) + token if pieces else token
            pieces, after_special = [], True
        return text + self._model.decode(pieces) if pieces else text

    def _text_fast(self, tokens: list[str]) -> str:
        """As the fast decoder: a run of byte tokens is text if all of it is UTF-8, else one U+FFFD for each byte."""
        text = ""
        for of_bytes, run in itertools.groupby(tokens, lambda token: bool(BYTE_PIECE.fullmatch(token))):
            if of_bytes:
                text += _utf8_or_replacement(bytes(int(token[3:5], 16) for token in run))
            else:
                text += "".join(run).replace(SPIECE_UNDERLINE, " ")
        return text.removeprefix(" ")

    def is_skipped(self, token_id: int) -> bool:
        """Whether `decode` passes over it."""
        return not self._tokens([token_id], True)

    def is_undecided(self, token_id: int) -> bool:
        """Whether its text depends on what comes next: the fast decoder's bytes are text if all of their run is."""
        return self.fast and bool(BYTE_PIECE.fullmatch(self._tokens([token_id], False)[0]))

    # ---- what follows from the fields

    def _special_id(self, name: str) -> int | None:
        return self._token_id(self.special_tokens[name]) if name in self.special_tokens else None

    def _token_id(self, token: str) -> int:
        return self._added_ids[token] if token in self._added_ids else self._model.piece_to_id(token)

    @functools.cached_property
    def _model(self) -> SentencePieceProcessor:
        """What the reference makes of the model: the fast tokenizer never reads the model's own normalizer."""
        override = _PREFIX_AND_NOTHING_ELSE if self.fast else b"" if self.legacy else _NO_DUMMY_PREFIX
        return SentencePieceProcessor(model_proto=self.model_proto + override)

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        vocabulary = {self._model.id_to_piece(i): i for i in range(self._model.get_piece_size())}
        return vocabulary | self._added_ids

    @functools.cached_property
    def _added_ids(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added_tokens.items()}

    @functools.cached_property
    def _added_by_content(self) -> dict[str, AddedToken]:
        return {token.content: token for token in self.added_tokens.values()}

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern:
        """Matches the leftmost added token, and the longest there."""
        longest_first = sorted(self._added_by_content, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")

    @functools.cached_property
    def _all_special(self) -> frozenset[str]:
        return frozenset(self.special_tokens.values()) | frozenset(self.additional_special_tokens)

    @functools.cached_property
    def _skipped_ids(self) -> frozenset[int]:
        if self.fast:
            return frozenset(i for i, token in self.added_tokens.items() if token.special)
        return frozenset(map(self._token_id, self._all_special))

    @functools.cached_property
    def _spaced(self) -> frozenset[str]:
        size = self._model.get_piece_size()
        extra = {token for token in self.additional_special_tokens if self._token_id(token) >= size}
        return frozenset(self._added_ids) - self._all_special | extra


def _utf8_or_replacement(run: bytes) -> str:
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


# ---- from files


def load_tokenizer(directory: str | Path, name: str = "", reading: str = "original"):
    """The tokenizer of a checkpoint directory, of the kind that the reference's `load_pretrained_model` takes.

    Args:
        directory: holds `tokenizer.model` (and its JSON files), or `tokenizer.json` alone (Llama 3), which is read by
            transformers' PreTrainedTokenizerFast: same `encode`, `decode` and ids, but its `decode` keeps special
            tokens unless told `skip_special_tokens=True`.
        name: the checkpoint's name: the fast tokenizer is taken for "mistral", as in the reference.
        reading: "original", or "llava-hf" for the fast tokenizer whatever the name.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file is not what its name says.
    """
    files = epath.Path(directory)
    if (files / "tokenizer.model").is_file():
        return _load_llama(files, fast=reading == "llava-hf" or "mistral" in name.lower())
    if (files / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast  # slow to import

        for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
            _read_json(files / name)
        with tempfile.TemporaryDirectory() as local:  # transformers reads no gs://
            for file in files.glob("*token*.json"):
                (Path(local) / file.name).write_bytes(file.read_bytes())
            try:
                return PreTrainedTokenizerFast.from_pretrained(local)
            except Exception as error:  # the Rust library's own, and whatever comes of keys that are not there
                problem = f"no tokenizer ({reason_of(error)}); {DOWNLOAD_AGAIN}"
                raise ValueError(f"{files / 'tokenizer.json'}: {problem}") from error
    looked_for = "looked for tokenizer.model and tokenizer.json; copy them from the checkpoint"
    raise FileNotFoundError(f"{directory} has no tokenizer: {looked_for}")


def _load_llama(directory: Path, fast: bool) -> LlamaTokenizer:
    proto = _read_model(directory / "tokenizer.model")
    config = _read_json(directory / "tokenizer_config.json")
    if config.get("added_tokens_decoder") is not None:
        added = {int(i): AddedToken.parse(token) for i, token in config["added_tokens_decoder"].items()}
    else:  # older files
        config |= _read_json(directory / "special_tokens_map.json")
        added = {i: AddedToken(content) for content, i in _read_json(directory / "added_tokens.json").items()}
        listed = _read_json(directory / "tokenizer.json").get("added_tokens") or []
        added |= {token["id"]: AddedToken.parse(token) for token in listed}
    by_content = {token.content: token for token in added.values()}
    special = {name: AddedToken(content) for name, content in DEFAULT_SPECIAL.items() if name not in config}
    for name in SPECIAL_NAMES:
        if config.get(name) is not None:
            token = AddedToken.parse(config[name])
            special[name] = by_content.get(token.content, token)
    if "unk_token" not in special:
        raise ValueError(f"{directory}: its tokenizer files say unk_token=null, which must be a text; {DOWNLOAD_AGAIN}")
    # Those without a name override the listed ones only where they say how they strip.
    given = config.get("additional_special_tokens") or []
    additional = [token if isinstance(token, str) else AddedToken.parse(token) for token in given]

    named = {name: token.content for name, token in special.items()}
    unnamed = tuple(AddedToken.parse(token).content for token in given)
    legacy = config.get("legacy", True) is not False
    bos_and_eos = bool(config.get("add_bos_token", True)), bool(config.get("add_eos_token", False))
    tokenizer = LlamaTokenizer(proto, named, added, unnamed, legacy, fast, *bos_and_eos)
    in_order = [special[name] for name in SPECIAL_NAMES if name in special]
    return tokenizer.add_tokens([*in_order, *additional])


def _read_model(path: Path) -> bytes:
    proto = read_file(path, DOWNLOAD_AGAIN)
    try:
        for override in (b"", _NO_DUMMY_PREFIX, _PREFIX_AND_NOTHING_ELSE):
            SentencePieceProcessor().LoadFromSerializedProto(proto + override)
    except RuntimeError as error:
        pointer = "a git-LFS pointer, not" if proto.startswith(LFS_POINTER) else "not"
        raise ValueError(f"{path} ({len(proto)} bytes) is {pointer} a SentencePiece model; {DOWNLOAD_AGAIN}") from error
    return proto


def _read_json(path: Path) -> dict:
    return read_if_there(path, DOWNLOAD_AGAIN) or {}
