"""Models that compile in a second or two, and random weights of any configuration without a compiled program."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llava_jax.config import PINPOINTS_336, LlavaConfig, TextConfig, VisionConfig
from llava_jax.demo.model import convert_published, scenes_config, write_published, write_tokenizer
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


def write_training(root):
    """A checkpoint that trains in seconds, and beside it eight pictures and data.json, all batches of one shape.

    Returns:
        the checkpoint's path within `root`
    """
    (root / "tokenizer").mkdir(parents=True)
    write_tokenizer(root / "tokenizer")
    config = scenes_config(len(load_tokenizer(root / "tokenizer")), image_aspect_ratio="pad")
    config = config.replace(
        vision=dataclasses.replace(config.vision, num_hidden_layers=2),
        text=dataclasses.replace(config.text, num_hidden_layers=1),
    )
    published = write_published(root / "published" / config.name, config, random_params(config), "float32")
    model = convert_published(published, root / "m")
    rng, examples = np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(root / f"{i}.png")
        turns = [("human", "<image>\nWhat colour is the star?"), ("gpt", ("red", "blue", "green")[i % 3])]
        turns = [{"from": role, "value": value} for role, value in turns]
        examples.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (root / "data.json").write_text(json.dumps(examples))
    return str(model.relative_to(root))
