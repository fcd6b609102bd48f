"""A model that compiles in a second or two, and random weights of any configuration without a compiled program."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import PINPOINTS_336, LlavaConfig, TextConfig, VisionConfig
from llava_jax.inference.llava import Llava
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.models.llava_llama import param_shapes


def small_model():
    """(llava, params) of one layer each, with real tiles and canvases."""
    tokenizer = load_tokenizer(Path(__file__).parent / "golden" / "tokenizers" / "small")
    config = LlavaConfig(
        vision=VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1),
        text=TextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            pad_token_id=0,
        ),
        mm_hidden_size=16,
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS_336,
        tokenizer_model_max_length=4096,
        unfreeze_mm_vision_tower=True,
        name="llava-v1.6-random",
    )
    return Llava(config, tokenizer), random_params(config)


def random_params(config, seed=0):
    """The tree that `init_params` would fill, in float32: normal values about as large, scales of 1, no biases."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, name == "scale", jnp.float32)
        inputs = leaf.shape[-1] if name == "embedding" else np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.float32(inputs) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))
