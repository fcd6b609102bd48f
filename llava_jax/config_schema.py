"""What each key of a checkpoint's JSON files may be: a table for each file, and one check for all of them.

A table names the keys that are read, and leaves any other alone. The dataclasses of `config.py` are checked by the
tables of their files, however they are made.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from llava_jax.records import read_json_object

PROJECTOR_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")
ENCODABLE = re.compile("[^\ud800-\udfff]*")
READINGS = ("original", "llava-hf")
SHOWN = 5  # problems that an error tells


# ---- kinds of values


@dataclass(frozen=True)
class Kind:
    """What a value may be: `problems(name, value)` are lines such as "vocab_size='365' must be …"."""

    problems: Callable[[str, Any], list[str]]
    expected: str
    required: bool = False


def simple(accepts: Callable[[Any], bool], expected: str) -> Kind:
    """A value that `accepts` is true of."""
    return Kind(lambda name, value: [] if accepts(value) else [f"{name}={shown(value)} {expected}"], expected)


def shown(value: object) -> str:
    """A value as an error shows it."""
    try:
        return f"{value!r:.100}"
    except (RecursionError, ValueError):  # nested too deep, or of too many digits
        return type(value).__name__


def whole(lowest: int, highest: int) -> Kind:
    """An integer; neither true nor 2.0 is one."""
    return simple(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest,
        f"must be a whole number from {lowest} to {highest}",
    )


def number(lowest: float, highest: float) -> Kind:
    """An integer or a float, which NaN is not."""
    return simple(
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest,
        f"must be a number from {lowest:g} to {highest:g}",
    )


def one_of(*supported: Any) -> Kind:
    """One of these, of the same type."""
    return simple(
        lambda value: any(type(value) is type(one) and value == one for one in supported),
        f"is not supported; supported: {', '.join(map(str, supported))}",
    )


def a_list(kind: Kind, length: int | None = None) -> Kind:
    """A list, or a dataclass's tuple, of values of one kind."""
    expected = "must be a list" if length is None else f"must be a list of {length}"

    def problems(name: str, value: Any) -> list[str]:
        if not isinstance(value, list | tuple) or len(value) != (len(value) if length is None else length):
            return [f"{name}={shown(value)} {expected}"]
        return [line for i, item in enumerate(value) for line in kind.problems(f"{name}[{i}]", item)]

    return Kind(problems, expected)


def an_object(table: Mapping[str, Kind]) -> Kind:
    """An object whose keys are checked by a table."""
    expected = "must be an object"

    def problems(name: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return [f"{name}={shown(value)} {expected}"]
        dot = name and f"{name}."
        missing = [f"has no {dot}{key}" for key, kind in table.items() if kind.required and key not in value]
        lines = (kind.problems(dot + key, value[key]) for key, kind in table.items() if key in value)
        return missing + [line for some in lines for line in some]

    return Kind(problems, expected)


def a_map(kind: Kind, key: Kind | None = None) -> Kind:
    """An object of any keys (or keys of one kind) to values of one kind."""
    expected = "must be an object"

    def problems(name: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return [f"{name}={shown(value)} {expected}"]
        keys = [line for k in value for line in key.problems(f"{name} key", k)] if key else []
        return keys + [line for k, v in value.items() for line in kind.problems(f"{name}[{shown(k)}]", v)]

    return Kind(problems, expected)


def either(first: Kind, second: Kind) -> Kind:
    """A value of the one kind or of the other."""
    expected = f"{first.expected} or {second.expected.removeprefix('must be ')}"

    def problems(name: str, value: Any) -> list[str]:
        if not (first.problems(name, value) and second.problems(name, value)):
            return []
        return [f"{name}={shown(value)} {expected}"]

    return Kind(problems, expected)


def or_null(kind: Kind) -> Kind:
    """A value of this kind, or null, which means what leaving the key out means."""
    return replace(kind, problems=lambda name, value: [] if value is None else kind.problems(name, value))


def required(kind: Kind) -> Kind:
    """A key that must be there."""
    return replace(kind, required=True)


# ---- values that are written in more than one way


def read_pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`: a list of pairs, or that list as a string."""
    pairs = ast.literal_eval(value) if isinstance(value, str) else value
    return tuple((w, h) for w, h in pairs or ())


def read_scales(value: Any) -> tuple[int, ...]:
    """`s2_scales`: "336,672,1008", or a list."""
    return tuple(sorted(int(s) for s in value.split(",")) if isinstance(value, str) else sorted(value))


def _reads_as(read: Callable[[Any], Any], kind: Kind, expected: str) -> Kind:
    """A value that `read` makes into one of this kind."""

    def accepts(value: Any) -> bool:
        try:
            return not kind.problems("", read(value))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False

    return simple(accepts, expected)


# ---- the tables

SIDE = 1 << 16  # pixels
TABLE = 1 << 24  # rows of an embedding
INT32 = (1 << 31) - 1

FLAG = simple(lambda value: isinstance(value, bool), "must be true or false")
TEXT = simple(lambda value: isinstance(value, str) and bool(ENCODABLE.fullmatch(value)), "must be a text")
ID = whole(0, TABLE)
IDS = either(ID, a_list(ID))
PAD = whole(-1, TABLE)  # -1, as the first Llamas have it, is none
PINPOINTS = _reads_as(
    read_pinpoints,
    a_list(a_list(whole(-SIDE, SIDE), 2)),
    f"is not supported; supported: a list of [width, height] pairs, or that list as a string, each up to {SIDE}",
)
SCALES = _reads_as(
    read_scales,
    a_list(whole(1, SIDE)),
    f"is not supported; supported: sizes in pixels up to {SIDE}, like '336,672,1008'",
)
PROJECTOR = simple(
    lambda value: value in ("linear", "identity") or (isinstance(value, str) and bool(PROJECTOR_MLP.fullmatch(value))),
    "is not supported; supported: linear, mlpNx_gelu (mlp2x_gelu, …), identity",
)

ROPE = {
    "factor": number(1, 1e6),
    "low_freq_factor": number(1e-3, 1e6),
    "high_freq_factor": number(1e-3, 1e6),
    "original_max_position_embeddings": whole(1, INT32),
}
ROPE_TYPE = one_of("linear", "dynamic", "llama3")
DECODER = {
    "hidden_size": whole(1, 1 << 17),
    "intermediate_size": whole(1, 1 << 20),
    "num_hidden_layers": whole(1, 512),
    "num_attention_heads": whole(1, 1 << 12),
    "num_key_value_heads": whole(1, 1 << 12),
    "head_dim": whole(1, 1 << 12),
    "vocab_size": whole(1, TABLE),
    "max_position_embeddings": whole(1, INT32),
    "rms_norm_eps": number(1e-12, 1),
    "rope_theta": number(1, 1e12),
    "attention_bias": FLAG,
    "attention_dropout": number(0, 1),
    "tie_word_embeddings": FLAG,
    "hidden_act": one_of("silu"),
    "bos_token_id": or_null(ID),
    "eos_token_id": or_null(IDS),
    "pad_token_id": or_null(ID),
}
TOWER = {
    "hidden_size": whole(1, 1 << 17),
    "intermediate_size": whole(1, 1 << 20),
    "num_hidden_layers": whole(1, 512),
    "num_attention_heads": whole(1, 1 << 12),
    "image_size": whole(1, SIDE),
    "patch_size": whole(1, SIDE),
    "layer_norm_eps": number(1e-12, 1),
    "hidden_act": one_of("quick_gelu", "gelu"),
}
PIXELS = {"image_mean": a_list(number(-1000, 1000), 3), "image_std": a_list(number(1e-6, 1000), 3)}
LLAVA = {
    "mm_vision_tower": or_null(TEXT),
    "mm_vision_select_feature": one_of("patch", "cls_patch"),
    "mm_projector_type": PROJECTOR,
    "mm_hidden_size": whole(1, 1 << 20),
    "mm_patch_merge_type": one_of("flat", "spatial", "spatial_unpad"),
    "image_aspect_ratio": one_of("anyres", "pad", "square"),
    "image_grid_pinpoints": PINPOINTS,
    "mm_use_im_start_end": FLAG,
    "mm_use_im_patch_token": FLAG,
    "tokenizer_padding_side": one_of("right", "left"),
    "tokenizer_model_max_length": or_null(whole(1, INT32)),
    "s2": FLAG,
    "s2_scales": SCALES,
    "unfreeze_mm_vision_tower": FLAG,
}
SAMPLING = {"top_p": number(0, 1), "top_k": whole(0, INT32)}


def _all_or_null(table: Mapping[str, Kind]) -> dict[str, Kind]:
    return {key: or_null(kind) for key, kind in table.items()}


# As the files have them. What transformers and the original write as null may be null.
_NULL_IN_DECODER = ("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "tie_word_embeddings")
DECODER_FILE = {
    **DECODER,
    **{key: or_null(DECODER[key]) for key in _NULL_IN_DECODER},
    "pad_token_id": or_null(PAD),
    "mlp_bias": one_of(False),
    "rope_scaling": or_null(an_object(ROPE)),
    "rope_parameters": or_null(an_object({**ROPE, "rope_theta": DECODER["rope_theta"]})),  # transformers 5
}
TOWER_FILE = {**TOWER, **PIXELS}
LIUHAOTIAN = an_object(
    {
        **DECODER_FILE,
        **_all_or_null(LLAVA),
        "model_type": required(one_of("llava", "llava_llama", "llava_mistral", "llava_next")),
        "architectures": or_null(a_list(TEXT)),
        "vision_tower": or_null(TEXT),
    }
)
LLAVA_HF = an_object(
    {
        "model_type": required(one_of("llava", "llava_next")),
        "text_config": required(an_object({**DECODER_FILE, "model_type": one_of("llama", "mistral")})),
        "vision_config": or_null(an_object({**TOWER_FILE, "model_type": one_of("clip_vision_model")})),
        "image_grid_pinpoints": or_null(PINPOINTS),
        "vision_feature_select_strategy": one_of("default", "full"),
        "projector_hidden_act": one_of("gelu"),
        "multimodal_projector_bias": one_of(True),
        "tie_word_embeddings": or_null(FLAG),
    }
)
CLIP = an_object(TOWER_FILE)
PREPROCESSOR = an_object(PIXELS)
GENERATION = an_object({**_all_or_null(SAMPLING), "eos_token_id": or_null(IDS), "pad_token_id": or_null(PAD)})

ADDED_TOKEN = {"content": required(TEXT), **dict.fromkeys(("lstrip", "rstrip", "special"), or_null(FLAG))}
TOKEN = either(TEXT, an_object(ADDED_TOKEN))
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_TOKENS = {
    **dict.fromkeys(SPECIAL_NAMES, or_null(TOKEN)),
    "additional_special_tokens": or_null(a_list(TOKEN)),
}
ID_AS_TEXT = simple(
    lambda value: bool(re.fullmatch("[0-9]{1,8}", value)) and int(value) <= TABLE, f"must be an id from 0 to {TABLE}"
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
INDEX = an_object({"weight_map": required(a_map(SHARD))})

# A safetensors file's header.
HEADER = a_map(
    an_object(
        {
            "dtype": required(TEXT),
            "shape": required(a_list(whole(0, 1 << 40))),
            "data_offsets": required(a_list(whole(0, 1 << 50), 2)),
        }
    )
)

# transformers has it in three files: a text, or several with names.
CHAT_TEMPLATE = {"chat_template": or_null(either(TEXT, a_list(an_object({"name": TEXT, "template": TEXT}))))}

# The files that are read as they are, by their names.
FILES = {
    "tokenizer_config.json": an_object(
        {
            **SPECIAL_TOKENS,
            **CHAT_TEMPLATE,
            **dict.fromkeys(("legacy", "add_bos_token", "add_eos_token"), or_null(FLAG)),
            "added_tokens_decoder": or_null(a_map(an_object(ADDED_TOKEN), ID_AS_TEXT)),
        }
    ),
    "special_tokens_map.json": an_object(SPECIAL_TOKENS),
    "added_tokens.json": a_map(ID),
    "tokenizer.json": an_object({"added_tokens": or_null(a_list(an_object({"id": required(ID), **ADDED_TOKEN})))}),
    "processor_config.json": an_object({**CHAT_TEMPLATE, "image_processor": or_null(an_object({}))}),
    "chat_template.json": an_object(CHAT_TEMPLATE),
    "model.safetensors.index.json": INDEX,
    "pytorch_model.bin.index.json": INDEX,
    "llava_jax.json": an_object(
        {
            "layout": required(one_of("liuhaotian", "llava-hf")),
            "name": TEXT,
            "reading": one_of(*READINGS),
            **dict.fromkeys(("source", "dtype", "fingerprint"), TEXT),
            "conv_mode": or_null(TEXT),
            "published": an_object(
                {"vision_tower": one_of("inside", "beside"), "names": a_list(TEXT), "dtype": TEXT, "tied_head": TEXT}
            ),
        }
    ),
    "checksums.json": an_object(
        {
            "files": required(a_map(TEXT)),
            "parameters": required(a_map(an_object({"dtype": required(TEXT), "crc32": required(TEXT)}))),
        }
    ),
    "train_options.json": an_object(
        {
            "model_path": required(TEXT),
            "lora_r": required(whole(1, 1 << 16)),
            "lora_alpha": required(number(1e-6, 1e9)),
            "lora_dropout": required(number(0, 1)),
            "unfreeze_mm_vision_tower": required(FLAG),
        }
    ),
}


# ---- the check


def check_fields(value: Any, table: Mapping[str, Kind], prefix: str = "") -> None:
    """ValueError unless a dataclass's fields are what a table says."""
    refuse(an_object(table).problems(prefix, vars(value)), "config")


def refuse(problems: Iterable[str], where: str, remedy: str = "") -> None:
    """ValueError if there are any, the first of them in one line."""
    if lines := list(problems):
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ValueError(f"{where}: {'; '.join(lines[:SHOWN])}{more}{remedy and '; ' + remedy}")


def read_checked(path, remedy: str = "") -> dict:
    """A JSON object out of a checkpoint's directory; what `FILES` says of its name is checked.

    Args:
        path: local or gs://.
        remedy: the end of an error's sentence, such as "get the file again".

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no JSON object, or keys of it are wrong: all of them, together.
    """
    value = read_json_object(path, remedy)
    if kind := FILES.get(path.name):
        refuse(kind.problems("", value), str(path), remedy)
    return value
