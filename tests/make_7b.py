"""A random checkpoint of full size in the published liuhaotian layout, and what its conversion costs.

    python tests/make_7b.py /tmp/7b

writes /tmp/7b/llava-v1.6-vicuna-7b (14 GB of bfloat16 safetensors, tuned tower included). Three times in turn it
copies those files, converts them and exports what came of it, each in a process of its own and on the disk before the
clock stops, and prints wall times and the peak of anonymous memory. It needs 45 GB of disk; the checkpoint and its
conversion stay there: delete the directory afterwards. The names stand here in full, so that tests which write small
checkpoints with the functions below do not rest on the table that they test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from llava_jax.config import LlavaConfig

SHARD_BYTES = 2 << 30
ROUNDS = 3
ROOT = Path(__file__).resolve().parents[1]


def tower_shapes(vision, prefix: str) -> dict[str, tuple[int, ...]]:
    width, hidden, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (vision.num_patches + 1, width),
        "pre_layrnorm.weight": (width,),
        "pre_layrnorm.bias": (width,),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for i in range(vision.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"encoder.layers.{i}.self_attn.{name}.weight"] = (width, width)
            shapes[f"encoder.layers.{i}.self_attn.{name}.bias"] = (width,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"encoder.layers.{i}.{name}.weight"] = shapes[f"encoder.layers.{i}.{name}.bias"] = (width,)
        shapes[f"encoder.layers.{i}.mlp.fc1.weight"] = (hidden, width)
        shapes[f"encoder.layers.{i}.mlp.fc1.bias"] = (hidden,)
        shapes[f"encoder.layers.{i}.mlp.fc2.weight"] = (width, hidden)
        shapes[f"encoder.layers.{i}.mlp.fc2.bias"] = (width,)
    return {prefix + name: shape for name, shape in shapes.items()}


def decoder_shapes(text, prefix: str = "model.", head: str | None = "") -> dict[str, tuple[int, ...]]:
    """The decoder under `prefix`, and `lm_head` under the prefix `head` (None: it is tied)."""
    width, hidden = text.hidden_size, text.intermediate_size
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    shapes = {f"{prefix}embed_tokens.weight": (text.vocab_size, width), f"{prefix}norm.weight": (width,)}
    if head is not None:
        shapes[f"{head}lm_head.weight"] = (text.vocab_size, width)
    for i in range(text.num_hidden_layers):
        layer = f"{prefix}layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (width,), f"{layer}post_attention_layernorm.weight": (width,)}
        for name, out, into in (("q", q, width), ("k", kv, width), ("v", kv, width), ("o", width, q)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, into)
            if text.attention_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, hidden)
    return shapes


def projector_shapes(config, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The projector's linear layers under `names`."""
    shapes, into, out = {}, config.mm_hidden_size, config.text.hidden_size
    for name in names:
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
        into = out
    return shapes


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16 of random sign and mantissa, between 2^-7 and 2^-6 in size: cheap, and no two alike."""
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    return ((bits & 0x807F) | 0x3C00).view(ml_dtypes.bfloat16)


def write_shards(directory: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: int, seed: int = 0) -> None:
    """Random bfloat16 tensors as sharded safetensors with an index, one shard in memory at a time."""
    rng, shards, held = np.random.default_rng(seed), [[]], 0
    for name, shape in shapes.items():
        if shards[-1] and held + 2 * math.prod(shape) > shard_bytes:
            shards, held = [*shards, []], 0
        shards[-1].append(name)
        held += 2 * math.prod(shape)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: random_tensor(rng, shapes[name]) for name in names}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(command: list[str]) -> tuple[float, int]:
    """Wall time in seconds until all is on the disk, and the largest RssAnon in bytes, of a command."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command} failed")
    os.sync()
    return time.monotonic() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write; 45 GB")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers, to try it on less")
    args = parser.parse_args()
    config = LlavaConfig.preset("1.6-vicuna-7b")
    config = config.replace(text=dataclasses.replace(config.text, num_hidden_layers=args.layers))
    source = args.directory / config.name
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config.to_hf(), indent=2))
    shutil.copyfile(ROOT / "tests" / "golden" / "tokenizers" / "llama" / "tokenizer.model", source / "tokenizer.model")
    tower = tower_shapes(config.vision, "model.vision_tower.vision_tower.vision_model.")
    projector = projector_shapes(config, ("model.mm_projector.0", "model.mm_projector.2"))
    newline = {"model.image_newline": (config.text.hidden_size,)}
    write_shards(source, {**decoder_shapes(config.text), **tower, **projector, **newline}, SHARD_BYTES)
    size = sum(f.stat().st_size for f in source.iterdir())
    print(f"{source}: {size / 1e9:.1f} GB")
    places = {name: args.directory / name for name in ("copied", "converted", "exported")}
    scripts = {name: str(ROOT / "convert" / f"{name}.py") for name in ("from_hf", "to_hf")}
    commands = {
        "copied": ["cp", "-r", str(source), str(places["copied"])],
        "converted": [sys.executable, scripts["from_hf"], str(source), "--output", str(places["converted"])],
        "exported": [sys.executable, scripts["to_hf"], str(places["converted"]), "--output", str(places["exported"])],
    }
    times = {name: [] for name in commands}
    for _ in range(ROUNDS):
        shutil.rmtree(places["converted"], ignore_errors=True)
        for name, command in commands.items():
            seconds, peak = measure(command)
            times[name].append(seconds)
            print(f"{name} in {seconds:.1f} s, peak anonymous memory {peak / 2**30:.2f} GiB", flush=True)
            if name != "converted":
                shutil.rmtree(places[name])
    for name in ("converted", "exported"):
        ratios = sorted(mine / copy for mine, copy in zip(times[name], times["copied"], strict=True))
        print(f"{name}: {ratios[ROUNDS // 2]:.2f} times the time of a copy (median of {ROUNDS})")


if __name__ == "__main__":
    main()
