"""The settings of a LLaVA checkpoint, as frozen dataclasses read from, and written back to, its `config.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from llava_jax import config_layouts as layouts
from llava_jax import config_schema as schema
from llava_jax.config_parts import KNOWN_TOWERS as KNOWN_TOWERS
from llava_jax.config_parts import PINPOINTS_336, GenerationDefaults, TextConfig, VisionConfig, has_row
from llava_jax.config_parts import RopeScaling as RopeScaling
from llava_jax.fields import an_object, kinds_of, one_of, or_null, refuse, require, whole


def check_one_of(key: str, value: Any, supported) -> None:
    require(value, one_of(*supported), "config", name=key)


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA model: tower, projector, decoder, and how an image becomes tokens.

    `from_hf` reads both published layouts; `to_hf` gives back every key that was read, changed only where a
    field was changed. `reading="llava-hf"` asks for transformers' reading of the same weights instead of the
    original's: pinpoints as (height, width), rounding in unpad, legacy token ids after a special token.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mm_vision_tower: Annotated[str | None, or_null(schema.TEXT)] = "openai/clip-vit-large-patch14-336"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: Annotated[str, one_of("patch", "cls_patch")] = "patch"
    mm_projector_type: Annotated[str, schema.PROJECTOR] = "mlp2x_gelu"
    mm_hidden_size: Annotated[int, whole(1, 1 << 20)] = 1024
    mm_patch_merge_type: Annotated[str, one_of("flat", "spatial", "spatial_unpad")] = "flat"
    image_aspect_ratio: Annotated[str, one_of("anyres", "pad", "square")] = "square"
    image_grid_pinpoints: Annotated[tuple[tuple[int, int], ...], schema.PINPOINTS] = ()
    mm_use_im_start_end: Annotated[bool, schema.FLAG] = False
    mm_use_im_patch_token: Annotated[bool, schema.FLAG] = False
    tokenizer_padding_side: Annotated[str, one_of("right", "left")] = "right"
    tokenizer_model_max_length: Annotated[int | None, or_null(whole(1, schema.INT32))] = None
    s2: Annotated[bool, schema.FLAG] = False
    s2_scales: Annotated[tuple[int, ...], schema.SCALES] = (336, 672, 1008)
    unfreeze_mm_vision_tower: Annotated[bool, schema.FLAG] = False
    reading: str = "original"
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    name: str = ""  # the checkpoint's, as in the reference: its folder's, or the last part of its hub id
    conv_mode: str | None = None  # its prompt template, chosen when it was converted; None: by its name
    source: dict | None = field(default=None, compare=False, repr=False)  # the config.json that was read

    def __post_init__(self):
        schema.check_fields(self)
        check_one_of("reading", self.reading, schema.READINGS)
        for key in ("eos_token_ids", "pad_token_id"):
            has_row(f"generation_config.{key.removesuffix('s')}", getattr(self.generation, key), self.text.vocab_size)
        layers = self.vision.num_hidden_layers
        check_one_of("mm_vision_select_layer", self.mm_vision_select_layer, range(-layers - 1, layers + 1))
        self._check_images()
        if self.mm_hidden_size != self.feature_size:
            raise ValueError(
                f"config: mm_hidden_size={self.mm_hidden_size}, but the vision tower {self.mm_vision_tower!r} gives "
                f"features of {self.feature_size}; give the tower's own config (vision_config) or correct the key"
            )
        if self.mm_projector_type == "identity" and self.feature_size != self.text.hidden_size:
            raise ValueError(
                f"config: mm_projector_type='identity' needs mm_hidden_size={self.mm_hidden_size} to equal "
                f"hidden_size={self.text.hidden_size}"
            )

    def _check_images(self) -> None:
        size = self.vision.image_size
        if self.image_aspect_ratio == "anyres":
            bad = [p for p in self.image_grid_pinpoints if len(p) != 2 or p[0] % size or p[1] % size or min(p) <= 0]
            if bad or not self.image_grid_pinpoints:
                raise ValueError(
                    f"config: image_grid_pinpoints={list(self.image_grid_pinpoints)!r} must list (width, height) pairs "
                    f"that are multiples of the tower's image_size={size} for image_aspect_ratio='anyres'"
                )
            if self.mm_patch_merge_type != "flat" and self.mm_vision_select_feature == "cls_patch":
                raise ValueError(
                    f"config: mm_vision_select_feature='cls_patch' has no grid to merge as "
                    f"mm_patch_merge_type={self.mm_patch_merge_type!r}; only 'flat' works with it"
                )
        if self.s2:
            if self.image_aspect_ratio == "anyres":
                raise ValueError("config: s2=True is not supported with image_aspect_ratio='anyres'; use pad or square")
            if self.s2_scales[0] != size or any(s % size for s in self.s2_scales):
                raise ValueError(
                    f"config: s2_scales={self.s2_scales} must be multiples of the tower's image_size={size}, "
                    "the smallest equal to it"
                )
            if self.mm_vision_select_feature == "cls_patch":
                raise ValueError(
                    "config: mm_vision_select_feature='cls_patch' is not supported with s2=True; use 'patch'"
                )

    # ---- what follows from the settings

    @property
    def projector_depth(self) -> int:
        """Number of linear layers in the projector: 0 for identity."""
        mlp = schema.PROJECTOR_MLP.fullmatch(self.mm_projector_type)
        return int(mlp.group(1)) if mlp else {"identity": 0, "linear": 1}[self.mm_projector_type]

    @property
    def feature_size(self) -> int:
        """Channels of a tower feature: the tower's `hidden_size`, once for each S2 scale."""
        return self.vision.hidden_size * (len(self.s2_scales) if self.s2 else 1)

    @property
    def tokens_per_tile(self) -> int:
        return self.vision.num_patches + (self.mm_vision_select_feature == "cls_patch")

    @property
    def tile_size(self) -> int:
        """Side, in pixels, of the tiles that the host prepares: S2 splits a large square on the device."""
        return self.s2_scales[-1] if self.s2 else self.vision.image_size

    @property
    def has_image_newline(self) -> bool:
        return "unpad" in self.mm_patch_merge_type

    @property
    def context_length(self) -> int:
        """The most positions that a prompt may take: what it was trained with, or where nothing says, what its rotary
        positions were made for (`linear` and `dynamic` scaling stretch them; llama3's are counted stretched)."""
        if self.tokenizer_model_max_length is not None:
            return self.tokenizer_model_max_length
        scaling, length = self.text.rope_scaling, self.text.max_position_embeddings
        return int(length * scaling.factor) if scaling and scaling.rope_type in ("linear", "dynamic") else length

    @property
    def max_tiles_per_image(self) -> int:
        if self.image_aspect_ratio != "anyres":
            return 1
        return 1 + max(w * h for w, h in self.image_grid_pinpoints) // self.vision.image_size**2

    @property
    def digest(self) -> str:
        """The SHA-256 of all settings: answers that were kept are those of the same ones."""
        return hashlib.sha256(repr(self).encode(errors="backslashreplace")).hexdigest()

    def replace(self, **changes) -> LlavaConfig:
        """A copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)

    # ---- published layouts

    @classmethod
    def from_hf(
        cls,
        config: dict,
        vision_config: dict | None = None,
        preprocessor_config: dict | None = None,
        generation_config: dict | None = None,
        name: str = "",
    ) -> LlavaConfig:
        """Read a published `config.json`, of either layout.

        Args:
            config: the parsed `config.json`: liuhaotian (`llava`, `llava_llama`, `llava_mistral`) or llava-hf
                (`llava`, `llava_next` with nested `text_config` and `vision_config`).
            vision_config: the tower's own `config.json` (or its `vision_config`). The liuhaotian layout names
                the tower only; the published towers are known, and a local directory is read.
            preprocessor_config: the tower's, for the pixel mean and deviation.
            name: the checkpoint's name, from which the conversation template is picked.

        Raises:
            ValueError: values are not supported; the message names their keys, the values and what is supported.
        """
        check_files(config, vision_config, preprocessor_config, generation_config)
        fields = layouts.read_llava_hf(config) if "text_config" in config else layouts.read_liuhaotian(config)
        if vision_config is not None or "vision" not in fields:
            fields["vision"] = layouts.read_vision(vision_config, fields["mm_vision_tower"])
        if preprocessor_config:
            stats = {k: tuple(preprocessor_config[k]) for k in ("image_mean", "image_std") if k in preprocessor_config}
            fields["vision"] = dataclasses.replace(fields["vision"], **stats)
        if fields["mm_hidden_size"] is None:
            scales = len(fields["s2_scales"]) if fields["s2"] else 1
            fields["mm_hidden_size"] = fields["vision"].hidden_size * scales
        fields["generation"] = layouts.read_generation(generation_config, fields["text"])
        return cls(**fields, name=name, source=json.loads(json.dumps(config)))

    def to_hf(self) -> dict:
        """The published `config.json`: what was read, key for key, updated where a field has changed since."""
        after = dict(vars(self))
        if self.source is None:
            return layouts.write_new(after)
        nested = "text_config" in self.source
        before = layouts.read_llava_hf(self.source) if nested else layouts.read_liuhaotian(self.source)
        if before["mm_hidden_size"] is None and self.mm_hidden_size == self.feature_size:
            after["mm_hidden_size"] = None  # it was not given, and still follows from the tower
        write = layouts.write_llava_hf if nested else layouts.write_liuhaotian
        return layouts.overlay(self.source, write(before, self.source), write(after, self.source))

    @classmethod
    def preset(cls, name: str) -> LlavaConfig:
        """The published shapes under a short name: 1.5-7b, 1.5-13b, 1.6-vicuna-7b, 1.6-vicuna-13b, 1.6-mistral-7b,
        1.6-34b, llama3-llava-next-8b. Nothing is downloaded."""
        check_one_of("preset", name, PRESETS)
        return PRESETS[name]


# ---- files

LIUHAOTIAN = an_object(
    {
        **layouts.DECODER,
        **schema.all_of(or_null, kinds_of(LlavaConfig)),
        "model_type": one_of("llava", "llava_llama", "llava_mistral", "llava_next"),
        "architectures": or_null([schema.TEXT]),
        "vision_tower": or_null(schema.TEXT),
    }
)


def check_files(config: dict, vision: dict | None, preprocessor: dict | None, generation: dict | None) -> None:
    """ValueError for all keys that are wrong in a checkpoint's files, together (`LlavaConfig.from_hf`'s arguments)."""
    layout = layouts.LLAVA_HF if isinstance(config, dict) and "text_config" in config else LIUHAOTIAN
    problems = layout.problems("", config)
    if vision is not None:
        problems += layouts.CLIP.problems("vision_config", layouts.tower_of(vision))
    if preprocessor is not None:
        problems += layouts.PREPROCESSOR.problems("preprocessor_config", preprocessor)
    if generation is not None:
        problems += layouts.GENERATION.problems("generation_config", generation)
    refuse(problems, "config")


# ---- presets


def _preset(name: str, text: dict, **mm) -> LlavaConfig:
    defaults = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 2, "pad_token_id": 0}
    fields: dict[str, Any] = {**defaults, **text}
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads", 32))
    generation = GenerationDefaults((fields["eos_token_id"],), 0)
    return LlavaConfig(text=TextConfig(**fields), generation=generation, name=name, **mm)


_V15: dict[str, Any] = dict(image_aspect_ratio="pad")
_V16: dict[str, Any] = dict(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad")
_V16 |= dict(image_grid_pinpoints=PINPOINTS_336, tokenizer_model_max_length=4096, unfreeze_mm_vision_tower=True)
_13B = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
_GQA: dict[str, Any] = dict(intermediate_size=14336, num_key_value_heads=8)
_MISTRAL = dict(**_GQA, max_position_embeddings=32768, rope_theta=1e6)
_LLAMA3 = dict(**_GQA, vocab_size=128256, max_position_embeddings=8192, rope_theta=5e5)
_LLAMA3 |= dict(bos_token_id=128000, eos_token_id=128001)
_YI_34B: dict[str, Any] = dict(hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56)
_YI_34B |= dict(num_key_value_heads=8, vocab_size=64000, rope_theta=5e6, eos_token_id=7)

PRESETS = {
    "1.5-7b": _preset("llava-v1.5-7b", {}, **_V15),
    "1.5-13b": _preset("llava-v1.5-13b", _13B, **_V15),
    "1.6-vicuna-7b": _preset("llava-v1.6-vicuna-7b", {}, **_V16),
    "1.6-vicuna-13b": _preset("llava-v1.6-vicuna-13b", _13B, **_V16),
    "1.6-mistral-7b": _preset("llava-v1.6-mistral-7b", _MISTRAL, **_V16),
    "1.6-34b": _preset("llava-v1.6-34b", _YI_34B, **_V16),
    "llama3-llava-next-8b": _preset("llama3-llava-next-8b", _LLAMA3, **{**_V16, "tokenizer_model_max_length": 8192}),
}
