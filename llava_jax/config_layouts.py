"""`config.json` as published, read into dataclasses' fields and written back: one reader and one writer a layout."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

from llava_jax import config_parts as parts
from llava_jax import config_schema as schema
from llava_jax.fields import an_object, kinds_of, one_of, optional, or_null, require, shown
from llava_jax.records import read_json_object


def overlay(source: dict, before: dict, after: dict) -> dict:
    """A copy of `source` with the keys that differ between `before` and `after` set to their value in `after`."""
    out = copy.deepcopy(source)
    for key, value in after.items():
        if key in ("text_config", "vision_config"):
            out[key] = overlay(source.get(key) or {}, before[key], value)
        elif before.get(key) != value:
            out[key] = value
    return out


# ---- what a key of their files may be: what its dataclass says; null, where transformers and the original write that

_ROPE, _DECODER = schema.all_of(optional, kinds_of(parts.RopeScaling)), kinds_of(parts.TextConfig)
_NULL_IN_DECODER = ("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "tie_word_embeddings")
DECODER = {
    **schema.all_of(optional, _DECODER),
    **{key: or_null(_DECODER[key]) for key in _NULL_IN_DECODER},
    "pad_token_id": or_null(schema.PAD),
    "mlp_bias": optional(one_of(False)),
    "rope_scaling": or_null(_ROPE),
    "rope_parameters": or_null({**_ROPE, "rope_theta": optional(_DECODER["rope_theta"])}),  # transformers 5
}
TOWER = schema.all_of(optional, kinds_of(parts.VisionConfig))
CLIP = an_object(TOWER)
LLAVA_HF = an_object(
    {
        "model_type": one_of("llava", "llava_next"),
        "text_config": {**DECODER, "model_type": optional(one_of("llama", "mistral"))},
        "vision_config": or_null({**TOWER, "model_type": optional(one_of("clip_vision_model"))}),
        "image_grid_pinpoints": or_null(schema.PINPOINTS),
        "vision_feature_select_strategy": optional(one_of("default", "full")),
        "projector_hidden_act": optional(one_of("gelu")),
        "multimodal_projector_bias": optional(one_of(True)),
        "tie_word_embeddings": or_null(schema.FLAG),
    }
)
PREPROCESSOR = an_object({key: TOWER[key] for key in ("image_mean", "image_std")})
_TOKEN_IDS = {"eos_token_id": or_null(schema.IDS), "pad_token_id": or_null(schema.PAD)}
GENERATION = an_object({**schema.all_of(or_null, kinds_of(parts.GenerationDefaults)), **_TOKEN_IDS})


# ---- the two layouts, read


def tower_of(vision_config: Any) -> Any:
    """A CLIP's `vision_config`, of its whole `config.json` or alone; not checked yet."""
    whole = isinstance(vision_config, dict) and vision_config.get("vision_config")
    return whole or vision_config


# What transformers' CLIPVisionConfig means by a key that a file leaves out (it is ViT-B/32's shape).
_CLIP_DEFAULTS = parts.VisionConfig(768, 3072, 12, 12, 224, 32)


def read_vision(vision_config: dict | None, tower: str | None) -> parts.VisionConfig:
    if vision_config is None:
        if tower in parts.KNOWN_TOWERS:
            return parts.KNOWN_TOWERS[tower]
        path = os.path.join(os.path.expanduser(tower or ""), "config.json")
        if not tower or not os.path.isfile(path):
            return parts.VisionConfig()  # mm_hidden_size is checked against it
        vision_config = read_json_object(path)
    inner = tower_of(vision_config)
    require(inner, CLIP, tower or "config", name="vision_config")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in inner.items() if k in TOWER}
    return dataclasses.replace(_CLIP_DEFAULTS, **values)


# Where transformers' MistralConfig differs from LlamaConfig for a key that a file leaves out.
_MISTRAL_DEFAULTS = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32)


def _read_text(config: dict, mistral: bool) -> parts.TextConfig:
    values = {f.name: config[f.name] for f in dataclasses.fields(parts.TextConfig) if config.get(f.name) is not None}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in config:
            values[key] = tuple(config[key]) if isinstance(config[key], list) else config[key]
    if values.get("pad_token_id") == -1:
        values["pad_token_id"] = None
    if mistral:
        values = {**_MISTRAL_DEFAULTS, **values}
        if config.get("sliding_window") is not None:
            raise ValueError(f"config: sliding_window={config['sliding_window']!r} is not supported; supported: null")
    heads = values.get("num_attention_heads", parts.TextConfig.num_attention_heads)
    values.setdefault("num_key_value_heads", heads)
    if "head_dim" not in values:
        hidden_size = values.get("hidden_size", parts.TextConfig.hidden_size)
        parts.divides("hidden_size", hidden_size, "num_attention_heads", heads)
        values["head_dim"] = hidden_size // heads
    rope = config.get("rope_parameters") or {}
    values["rope_theta"] = float(rope.get("rope_theta", values.get("rope_theta", parts.TextConfig.rope_theta)))
    values["rope_scaling"] = _read_rope(config.get("rope_scaling") or rope)
    return parts.TextConfig(**values)


def _read_rope(rope: dict) -> parts.RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if not parts.ROPE_TYPE.problems("", kind) and "factor" not in rope:
        raise ValueError(f"config: rope_scaling={shown(rope)} has no 'factor'")
    return parts.RopeScaling(kind, **{"factor": 1.0, **{k: v for k, v in rope.items() if k in _ROPE}})


def _given(config: dict, key: str, default):
    """What a key says; null says nothing."""
    value = config.get(key)
    return default if value is None else value


def read_liuhaotian(config: dict) -> dict:
    kind = (config.get("architectures") or [config["model_type"]])[0].lower()
    return dict(
        text=_read_text(config, mistral="mistral" in kind),
        mm_vision_tower=config.get("mm_vision_tower", config.get("vision_tower")),
        mm_vision_select_layer=config.get("mm_vision_select_layer", -2),
        mm_vision_select_feature=_given(config, "mm_vision_select_feature", "patch"),
        mm_projector_type=_given(config, "mm_projector_type", "linear"),
        mm_hidden_size=config.get("mm_hidden_size"),
        mm_patch_merge_type=_given(config, "mm_patch_merge_type", "flat"),
        image_aspect_ratio=_given(config, "image_aspect_ratio", "square"),
        image_grid_pinpoints=schema.read_pinpoints(config.get("image_grid_pinpoints")),
        mm_use_im_start_end=_given(config, "mm_use_im_start_end", False),
        mm_use_im_patch_token=_given(config, "mm_use_im_patch_token", True),
        tokenizer_padding_side=_given(config, "tokenizer_padding_side", "right"),
        tokenizer_model_max_length=config.get("tokenizer_model_max_length"),
        s2=_given(config, "s2", False),
        s2_scales=schema.read_scales(_given(config, "s2_scales", "336,672,1008")),
        unfreeze_mm_vision_tower=_given(config, "unfreeze_mm_vision_tower", False),
    )


def read_llava_hf(config: dict) -> dict:
    strategy = config.get("vision_feature_select_strategy", "default")
    anyres = config["model_type"] == "llava_next"
    text = dict(config["text_config"])
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    vision_config = config.get("vision_config") or {}
    read_text = _read_text(text, text.get("model_type") == "mistral")
    pinpoints = config.get("image_grid_pinpoints") or (parts.PINPOINTS_336 if anyres else ())
    return dict(
        text=read_text,
        vision=read_vision(vision_config, None),
        mm_vision_tower=None,
        mm_vision_select_layer=config.get("vision_feature_layer", -2),
        mm_vision_select_feature="patch" if strategy == "default" else "cls_patch",
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=None,
        mm_patch_merge_type="spatial_unpad" if anyres else "flat",
        image_aspect_ratio="anyres" if anyres else "pad",  # the original's 1.5 pads; llava-hf's processor crops
        image_grid_pinpoints=schema.read_pinpoints(pinpoints),
        tokenizer_model_max_length=read_text.max_position_embeddings if anyres else None,
        s2=False,
        s2_scales=(336, 672, 1008),
        unfreeze_mm_vision_tower=anyres,
    )


def read_generation(generation: dict | None, text: parts.TextConfig) -> parts.GenerationDefaults:
    """transformers takes `generation_config.json` whole, and the config's own token ids only where there is none."""
    if generation is None:
        generation = {"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    eos = generation.get("eos_token_id")
    eos = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    pad = generation.get("pad_token_id")
    if pad in (None, -1):
        pad = eos[0] if eos else 0  # as transformers' generate does
    top_p, top_k = generation.get("top_p"), generation.get("top_k")
    return parts.GenerationDefaults(eos, pad, 1.0 if top_p is None else top_p, 50 if top_k is None else top_k)


# ---- and written


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _write_text(text: parts.TextConfig, like: dict) -> dict:
    """The decoder's keys, its rotary settings under the names that `like` uses."""
    out = {name: _plain(value) for name, value in vars(text).items()}
    scaling = dataclasses.asdict(text.rope_scaling) if text.rope_scaling else None
    if scaling and scaling["rope_type"] != "llama3":
        scaling = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    out["rope_scaling"] = scaling
    if like.get("rope_parameters"):  # transformers 5
        del out["rope_scaling"]
        kind = {"rope_type": "default"} if scaling is None else {"rope_type": scaling.pop("type", "llama3"), **scaling}
        out["rope_parameters"] = {"rope_theta": out.pop("rope_theta"), **kind}
    return out


def write_liuhaotian(fields: dict, like: dict) -> dict:
    """`LlavaConfig`'s fields as the original's flat keys."""
    skip = {"vision", "text", "reading", "generation", "name", "conv_mode", "source"}
    own = {name: _plain(value) for name, value in fields.items() if name not in skip}
    own["s2_scales"] = ",".join(map(str, fields["s2_scales"]))
    return {**own, **_write_text(fields["text"], like)}


def write_new(fields: dict) -> dict:
    """A whole `config.json` in the original's layout, for a config that was not read from one."""
    out = {"use_mm_proj": True, **write_liuhaotian(fields, {})}
    if not out["s2"]:
        del out["s2"], out["s2_scales"]
    if "mistral" in fields["name"]:
        out["sliding_window"] = None
        return {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", **out}
    return {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **out}


def write_llava_hf(fields: dict, like: dict) -> dict:
    """`LlavaConfig`'s fields as llava-hf's keys."""
    pixels = ("image_mean", "image_std")  # they stand in preprocessor_config.json
    return {
        "text_config": _write_text(fields["text"], like["text_config"]),
        "vision_config": {name: value for name, value in vars(fields["vision"]).items() if name not in pixels},
        "vision_feature_layer": fields["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default" if fields["mm_vision_select_feature"] == "patch" else "full",
        "image_grid_pinpoints": _plain(fields["image_grid_pinpoints"]),
    }
