"""A checkpoint in the published layout that it did not come in: its config, its processor, its `<image>` token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_jax import config_layouts as layouts
from llava_jax.config import KNOWN_TOWERS, LlavaConfig
from llava_jax.config_schema import read_if_there
from llava_jax.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_jax.conversion.published_files import write_json
from llava_jax.inputs.tokenizer import load_tokenizer

ROWS_MULTIPLE = 64  # where llava-hf's tables grow for `<image>`, it is to a multiple of this

# What changes what the model answers, and so must come out of the other layout as it went in.
ESSENTIAL = (
    "vision",
    "text",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_use_im_start_end",
    "s2",
)


# ---- config.json


def liuhaotian_config(config: LlavaConfig, vision_tower: str | None, what: str) -> dict:
    """`config.json` as the original has it, of a llava-hf checkpoint.

    Args:
        vision_tower: what it is to name as `mm_vision_tower`; None is the published CLIP of this shape.
        what: the checkpoint, as an error names it.

    Raises:
        ValueError: the layout cannot say what this config says.
    """
    tower = vision_tower or next((name for name, known in KNOWN_TOWERS.items() if known == config.vision), None)
    if tower is None:
        raise ValueError(
            f"{what}: the liuhaotian layout names a vision tower, and this one has the shape of none of "
            f"{', '.join(KNOWN_TOWERS)}; name a CLIP of its shape with --vision-tower"
        )
    # Its weights go inside, tuned or not, and this makes the original read them there.
    config = config.replace(mm_vision_tower=tower, unfreeze_mm_vision_tower=True)
    out = config.replace(source=None).to_hf()
    _check("liuhaotian", config, layouts.read_liuhaotian(out) | {"vision": config.vision}, what)
    return out


def llava_hf_config(config: LlavaConfig, token: int, what: str) -> dict:
    """`config.json` as transformers has it, of a liuhaotian checkpoint.

    Args:
        token: the id of `<image>`; the tables grow where they have no such row (`grown_rows`).
        what: the checkpoint, as an error names it.

    Raises:
        ValueError: the layout cannot say what this config says.
    """
    text = dataclasses.replace(config.text, vocab_size=grown_rows(config.text.vocab_size, token))
    config = config.replace(text=text)
    anyres = config.image_aspect_ratio == "anyres"
    source = config.source or config.to_hf()
    mistral = "mistral" in (source["model_type"] + str(source.get("architectures"))).lower()
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    out = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "ignore_index": IGNORE_INDEX,
        "image_token_index": token,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings,
        **layouts.write_llava_hf(fields, {"text_config": {}}),
    }
    out["vision_config"]["model_type"] = "clip_vision_model"
    out["text_config"]["model_type"] = "mistral" if mistral else "llama"
    if mistral:
        out["text_config"]["sliding_window"] = None  # transformers' default is a window
    if not anyres:
        del out["image_grid_pinpoints"]
    again = layouts.read_llava_hf(out)
    pixels = {name: getattr(config.vision, name) for name in ("image_mean", "image_std")}  # in preprocessor_config.json
    _check("llava-hf", config, again | {"vision": dataclasses.replace(again["vision"], **pixels)}, what)
    return out


def _check(layout: str, config: LlavaConfig, again: dict, what: str) -> None:
    """ValueError unless the essential fields, read again, are the config's."""
    ignored = () if config.image_aspect_ratio == "anyres" else ("image_grid_pinpoints",)
    lost = [n for n in ESSENTIAL if n not in ignored and again.get(n, False) != getattr(config, n)]
    if lost:
        told = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"{what}: the {layout} layout cannot express {told}; export it in the layout it came in")


# ---- the token of llava-hf's images


def image_token(config: LlavaConfig, directory: Path) -> int:
    """The id of `<image>` in a checkpoint's tokenizer files, or the one that it gets there."""
    slow, fast = (read_if_there(directory / name) or {} for name in ("tokenizer_config.json", "tokenizer.json"))
    listed = {token["content"]: int(i) for i, token in (slow.get("added_tokens_decoder") or {}).items()}
    listed |= read_if_there(directory / "added_tokens.json") or {}
    listed |= {token["content"]: token["id"] for token in fast.get("added_tokens") or []}
    if DEFAULT_IMAGE_TOKEN in listed:
        return listed[DEFAULT_IMAGE_TOKEN]
    return len(load_tokenizer(directory, config.name, config.reading))


def grown_rows(vocab_size: int, token: int) -> int:
    """How many rows the embedding and the head need, so that `token` has one."""
    return vocab_size if token < vocab_size else -(-(token + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE


def add_image_token(directory: Path, token: int) -> None:
    """List `<image>` as this id in the tokenizer files of `directory`, where it is not listed yet."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    entry = {"content": DEFAULT_IMAGE_TOKEN, **flags, "special": True}
    settings, added, fast = (
        directory / name for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
    )
    config = read_if_there(settings) or {}
    if config.get("added_tokens_decoder") is not None:
        config["added_tokens_decoder"].setdefault(str(token), entry)
        write_json(settings, config)
    write_json(added, {DEFAULT_IMAGE_TOKEN: token, **(read_if_there(added) or {})})
    content = read_if_there(fast)
    others = (content or {}).get("added_tokens") or []
    if content is not None and all(other["content"] != DEFAULT_IMAGE_TOKEN for other in others):
        write_json(fast, content | {"added_tokens": [*others, {"id": token, **entry}]})


# ---- what transformers prepares the inputs with


def write_processor(directory: Path, config: LlavaConfig) -> None:
    """`preprocessor_config.json` and `processor_config.json` as transformers 4 and 5 read them."""
    anyres, size = config.image_aspect_ratio == "anyres", config.vision.image_size
    steps = ("do_center_crop", "do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize")
    preprocessor: dict[str, Any] = {
        "image_processor_type": "LlavaNextImageProcessor" if anyres else "LlavaImageProcessor",
        "processor_class": "LlavaNextProcessor" if anyres else "LlavaProcessor",
        **dict.fromkeys(steps, True),
        "crop_size": {"height": size, "width": size},
        "image_mean": list(config.vision.image_mean),
        "image_std": list(config.vision.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    if anyres:
        preprocessor["aspect_ratio_setting"] = "anyres"
        preprocessor["image_grid_pinpoints"] = [list(pair) for pair in config.image_grid_pinpoints]
    processor = {
        "processor_class": preprocessor["processor_class"],
        "image_token": DEFAULT_IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "default" if config.mm_vision_select_feature == "patch" else "full",
    }
    write_json(directory / "preprocessor_config.json", preprocessor)
    write_json(directory / "processor_config.json", processor)
