"""What each key of a checkpoint's JSON files may be: a table for each file, and one check for all of them.

A table names the keys that are read, and leaves any other alone. What a key of `config.json` may be stands with its
field in the dataclasses of `config.py` and `config_parts.py`, which are checked however they are made.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from llava_jax.fields import (
    Check,
    Kind,
    a_list,
    a_map,
    either,
    kinds_of,
    number,
    one_of,
    optional,
    or_null,
    problem_of,
    require,
    simple,
    whole,
)
from llava_jax.records import read_json_object

PROJECTOR_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")
ENCODABLE = re.compile("[^\ud800-\udfff]*")
READINGS = ("original", "llava-hf")


# ---- values that are written in more than one way


def read_pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`: a list of pairs, or that list as a string."""
    pairs = ast.literal_eval(value) if isinstance(value, str) else value
    return tuple((w, h) for w, h in pairs or ())


def read_scales(value: Any) -> tuple[int, ...]:
    """`s2_scales`: "336,672,1008", or a list."""
    return tuple(sorted(int(s) for s in value.split(",")) if isinstance(value, str) else sorted(value))


def _reads_as(read: Callable[[Any], Any], kind: Kind, expected: str) -> Check:
    """A value that `read` makes into one of this kind."""

    def accepts(value: Any) -> bool:
        try:
            return problem_of(read(value), kind) is None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False

    return simple(accepts, expected)


# ---- the tables

MAX_SIDE = 1 << 16  # pixels
MAX_ROWS = 1 << 24  # rows of an embedding
INT32 = (1 << 31) - 1

FLAG = simple(lambda value: isinstance(value, bool), "must be true or false")
TEXT = simple(lambda value: isinstance(value, str) and bool(ENCODABLE.fullmatch(value)), "must be a text")
ID = whole(0, MAX_ROWS)
IDS = either(ID, a_list(ID))
PAD = whole(-1, MAX_ROWS)  # -1, as the first Llamas have it, is none
PINPOINTS = _reads_as(
    read_pinpoints,
    a_list(a_list(whole(-MAX_SIDE, MAX_SIDE), 2)),
    f"is not supported; supported: a list of [width, height] pairs, or that list as a string, each up to {MAX_SIDE}",
)
SCALES = _reads_as(
    read_scales,
    a_list(whole(1, MAX_SIDE)),
    f"is not supported; supported: sizes in pixels up to {MAX_SIDE}, like '336,672,1008'",
)
PROJECTOR = simple(
    lambda value: value in ("linear", "identity") or (isinstance(value, str) and bool(PROJECTOR_MLP.fullmatch(value))),
    "is not supported; supported: linear, mlpNx_gelu (mlp2x_gelu, …), identity",
)


def all_of(of: Callable[[Kind], Check], table: Mapping[str, Kind]) -> dict[str, Check]:
    return {key: of(kind) for key, kind in table.items()}


ADDED_TOKEN = {"content": TEXT, **dict.fromkeys(("lstrip", "rstrip", "special"), or_null(FLAG))}
TOKEN = either(TEXT, ADDED_TOKEN)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_TOKENS = {**dict.fromkeys(SPECIAL_NAMES, or_null(TOKEN)), "additional_special_tokens": or_null([TOKEN])}
ID_AS_TEXT = simple(
    lambda value: bool(re.fullmatch("[0-9]{1,8}", value)) and int(value) <= MAX_ROWS,
    f"must be an id from 0 to {MAX_ROWS}",
)
SHARD = simple(
    lambda value: (
        isinstance(value, str)
        and bool(ENCODABLE.fullmatch(value))
        and "\0" not in value
        and len(value) < 256  # as file systems have it
        and not PurePosixPath(value).is_absolute()
        and ".." not in PurePosixPath(value).parts
    ),
    "must be a file in the checkpoint's own directory",
)
INDEX = {"weight_map": a_map(SHARD)}

# A safetensors file's header.
HEADER = a_map({"dtype": TEXT, "shape": [whole(0, 1 << 40)], "data_offsets": a_list(whole(0, 1 << 50), 2)})

# transformers has it in three files: a text, or several with names.
NAMED_TEMPLATE = all_of(optional, {"name": TEXT, "template": TEXT})
CHAT_TEMPLATE = {"chat_template": or_null(either(TEXT, [NAMED_TEMPLATE]))}

PUBLISHED = all_of(
    optional, {"vision_tower": one_of("inside", "beside"), "names": [TEXT], "dtype": TEXT, "tied_head": TEXT}
)

# The files that are read as they are, by their names.
FILES: dict[str, Kind] = {
    "tokenizer_config.json": {
        **SPECIAL_TOKENS,
        **CHAT_TEMPLATE,
        **dict.fromkeys(("legacy", "add_bos_token", "add_eos_token"), or_null(FLAG)),
        "added_tokens_decoder": or_null(a_map(ADDED_TOKEN, ID_AS_TEXT)),
    },
    "special_tokens_map.json": SPECIAL_TOKENS,
    "added_tokens.json": a_map(ID),
    "tokenizer.json": {"added_tokens": or_null([{"id": ID, **ADDED_TOKEN}])},
    "processor_config.json": {**CHAT_TEMPLATE, "image_processor": or_null({})},
    "chat_template.json": CHAT_TEMPLATE,
    "model.safetensors.index.json": INDEX,
    "pytorch_model.bin.index.json": INDEX,
    "llava_jax.json": {
        "layout": one_of("liuhaotian", "llava-hf"),
        "reading": optional(one_of(*READINGS)),
        **dict.fromkeys(("name", "source", "dtype", "fingerprint"), optional(TEXT)),
        "conv_mode": or_null(TEXT),
        "published": optional(PUBLISHED),
    },
    "checksums.json": {"files": a_map(TEXT), "parameters": a_map({"dtype": TEXT, "crc32": TEXT})},
    "train_options.json": {
        "model_path": TEXT,
        "lora_r": whole(1, 1 << 16),
        "lora_alpha": number(1e-6, 1e9),
        "lora_dropout": number(0, 1),
        "unfreeze_mm_vision_tower": FLAG,
    },
}


# ---- the check


def check_fields(value: object, prefix: str = "") -> None:
    """ValueError unless a dataclass's fields are of their kinds."""
    kinds = kinds_of(type(value))  # type: ignore[arg-type]  # to mypy a class is not Hashable
    require(vars(value), kinds, "config", name=prefix)


def read_if_there(path, remedy: str = "") -> dict | None:
    """`read_checked`, or None where there is no such file."""
    return read_checked(path, remedy) if path.is_file() else None


def read_checked(path, remedy: str = "") -> dict:
    """A JSON object out of a checkpoint's directory; what `FILES` says of its keys is checked, all together."""
    value = read_json_object(path, remedy)
    if kind := FILES.get(path.name):
        require(value, kind, path, remedy)
    return value
