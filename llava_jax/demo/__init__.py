"""The whole path on what the package bundles: a random checkpoint in the published layout, converted, and asked."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from llava_jax.config import PINPOINTS_336, LlavaConfig, TextConfig, VisionConfig

HERE = Path(__file__).parent
PHOTO = HERE / "photo.jpg"
QUESTION = "What is in this picture?"


def small_config(vocab_size: int) -> LlavaConfig:
    """LLaVA-1.6's architecture and geometry (336-pixel tiles, 576 patches, its canvases), a few layers deep."""
    return LlavaConfig(
        vision=VisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4),
        text=TextConfig(
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=16,
            vocab_size=vocab_size,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            pad_token_id=0,
        ),
        mm_hidden_size=64,
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS_336,
        tokenizer_model_max_length=4096,
        unfreeze_mm_vision_tower=True,
        name="llava-v1.6-random",
    )


def write_random_checkpoint(directory: Path) -> None:
    """A checkpoint with random weights in the layout of liuhaotian/llava-v1.6-vicuna-7b, and its tower's config."""
    from safetensors.numpy import save_file

    from llava_jax.conversion.key_table import invert_transform, liuhaotian_rules, published_name
    from llava_jax.inputs.tokenizer import load_tokenizer
    from llava_jax.models.llava import init_params

    tower = directory / "tower"
    tower.mkdir(parents=True)
    config = small_config(len(load_tokenizer(HERE))).replace(mm_vision_tower=str(tower))
    vision = dataclasses.asdict(config.vision)
    statistics = {name: vision.pop(name) for name in ("image_mean", "image_std")}
    _write_json(tower / "config.json", {"model_type": "clip_vision_model", **vision})
    _write_json(tower / "preprocessor_config.json", {"size": config.vision.image_size, **statistics})
    _write_json(directory / "config.json", config.to_hf())
    shutil.copy(HERE / "tokenizer.model", directory)
    _write_json(directory / "tokenizer_config.json", {"legacy": False, "tokenizer_class": "LlamaTokenizer"})

    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    tensors = {}
    for path, value in flatten_dict(params, sep="/").items():
        name, transform = published_name(path, liuhaotian_rules(config))
        tensors[name] = np.ascontiguousarray(invert_transform(transform, np.asarray(value)))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run(output: str | None = None) -> None:
    """The bundled model on scenes that it has not seen, or a random one while there is none; each step is announced."""
    from llava_jax.demo import show

    if (show.MODEL / "config.json").exists():
        show.show(output)
    else:
        _run_random(output)


def _run_random(output: str | None) -> None:
    """Write, convert, load, ask."""
    import llava_jax
    from llava_jax.conversion.from_hf import convert

    with tempfile.TemporaryDirectory() as scratch:
        published = Path(scratch) / "llava-v1.6-random"
        print("1. writing a small checkpoint with random weights in the published layout")
        write_random_checkpoint(published)
        directory = Path(output) if output else Path(scratch) / "converted"
        print("2. converting it")
        convert(published, output=directory)
        print("3. loading it, and asking about the bundled photograph")
        llava, params = llava_jax.load(directory)
        print(f"   {QUESTION}")
        answer = llava.generate(params, PHOTO, QUESTION, max_new_tokens=32)
        print(f"   {answer!r}")
        print("   (the weights are random, so this is noise: convert a real checkpoint for real answers)")
