"""The settings that a `LlavaConfig` consists of: the tower's, the decoder's and those of generation."""

from __future__ import annotations

from dataclasses import dataclass

from llava_jax import config_schema as schema
from llava_jax.fields import require

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

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        schema.check_fields(self, schema.TOWER_FILE, "vision_config")
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
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        require(self.rope_type, schema.ROPE_TYPE, "config", name="rope_scaling.type")
        schema.check_fields(self, schema.ROPE, "rope_scaling")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"config: rope_scaling.low_freq_factor={self.low_freq_factor} must be under "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class TextConfig:
    """The Llama-family decoder. Defaults are those of transformers' LlamaConfig."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self):
        schema.check_fields(self, schema.DECODER)
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
    top_p: float = 1.0
    top_k: int = 50

    def __post_init__(self):
        schema.check_fields(self, schema.SAMPLING, "generation_config")
