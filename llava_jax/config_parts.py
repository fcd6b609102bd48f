"""The settings that a `LlavaConfig` consists of: the tower's, the decoder's and those of generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llava_jax.config_schema import FLAG, ID, IDS, INT32, MAX_ROWS, MAX_SIDE, check_fields
from llava_jax.fields import a_list, number, one_of, or_null, require, whole

ROPE_TYPE = one_of("linear", "dynamic", "llama3")
PINPOINTS_336 = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def has_row(key: str, ids: int | tuple[int, ...] | None, rows: int) -> None:
    """ValueError unless the id (one of several: the model cannot give the others) has a row in the embedding table."""
    given = ids if isinstance(ids, tuple) else () if ids is None else (ids,)
    if given and min(given) >= rows:
        raise ValueError(f"config: {key}={ids} has no row in the embedding table of vocab_size={rows}")


def divides(key: str, value: int, by_key: str, by: int) -> None:
    if not by or value % by:
        raise ValueError(f"config: {key}={value} is not a multiple of {by_key}={by}")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's vision tower and its preprocessing (`vision_config` and `preprocessor_config.json` of the tower)."""

    hidden_size: Annotated[int, whole(1, 1 << 17)] = 1024
    intermediate_size: Annotated[int, whole(1, 1 << 20)] = 4096
    num_hidden_layers: Annotated[int, whole(1, 512)] = 24
    num_attention_heads: Annotated[int, whole(1, 1 << 12)] = 16
    image_size: Annotated[int, whole(1, MAX_SIDE)] = 336
    patch_size: Annotated[int, whole(1, MAX_SIDE)] = 14
    layer_norm_eps: Annotated[float, number(1e-12, 1)] = 1e-5
    hidden_act: Annotated[str, one_of("quick_gelu", "gelu")] = "quick_gelu"
    image_mean: Annotated[tuple[float, ...], a_list(number(-1000, 1000), 3)] = (0.48145466, 0.4578275, 0.40821073)
    image_std: Annotated[tuple[float, ...], a_list(number(1e-6, 1000), 3)] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        check_fields(self, "vision_config")
        divides("vision_config.hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.patch_size > self.image_size:
            raise ValueError(
                f"config: vision_config.patch_size={self.patch_size} is above image_size={self.image_size}"
            )

    @property
    def num_patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


# Towers named in published LLaVA configs, so that a config alone gives the shapes.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
}


@dataclass(frozen=True)
class RopeScaling:
    """`rope_scaling`: `linear` and `dynamic` (NTK) as in transformers 4.37, `llama3` as in Llama 3.1."""

    rope_type: str
    factor: Annotated[float, number(1, 1e6)]
    low_freq_factor: Annotated[float, number(1e-3, 1e6)] = 1.0
    high_freq_factor: Annotated[float, number(1e-3, 1e6)] = 4.0
    original_max_position_embeddings: Annotated[int, whole(1, INT32)] = 8192

    def __post_init__(self):
        require(self.rope_type, ROPE_TYPE, "config", name="rope_scaling.type")
        check_fields(self, "rope_scaling")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"config: rope_scaling.low_freq_factor={self.low_freq_factor} must be under "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class TextConfig:
    """The Llama-family decoder. Defaults are those of transformers' LlamaConfig."""

    hidden_size: Annotated[int, whole(1, 1 << 17)] = 4096
    intermediate_size: Annotated[int, whole(1, 1 << 20)] = 11008
    num_hidden_layers: Annotated[int, whole(1, 512)] = 32
    num_attention_heads: Annotated[int, whole(1, 1 << 12)] = 32
    num_key_value_heads: Annotated[int, whole(1, 1 << 12)] = 32
    head_dim: Annotated[int, whole(1, 1 << 12)] = 128
    vocab_size: Annotated[int, whole(1, MAX_ROWS)] = 32000
    max_position_embeddings: Annotated[int, whole(1, INT32)] = 2048
    rms_norm_eps: Annotated[float, number(1e-12, 1)] = 1e-6
    rope_theta: Annotated[float, number(1, 1e12)] = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: Annotated[bool, FLAG] = False
    attention_dropout: Annotated[float, number(0, 1)] = 0.0
    tie_word_embeddings: Annotated[bool, FLAG] = False
    hidden_act: Annotated[str, one_of("silu")] = "silu"
    bos_token_id: Annotated[int | None, or_null(ID)] = 1
    eos_token_id: Annotated[int | tuple[int, ...] | None, or_null(IDS)] = 2
    pad_token_id: Annotated[int | None, or_null(ID)] = None

    def __post_init__(self):
        check_fields(self)
        divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        divides("head_dim", self.head_dim, "the two halves that are rotated", 2)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            has_row(key, getattr(self, key), self.vocab_size)


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generate` takes where the caller says nothing: the checkpoint's `generation_config.json`,
    over transformers' own defaults (top_k is 50 there when sampling)."""

    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int = 0
    top_p: Annotated[float, number(0, 1)] = 1.0
    top_k: Annotated[int, whole(0, INT32)] = 50

    def __post_init__(self):
        check_fields(self, "generation_config")
