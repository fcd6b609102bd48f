"""A plain Llama and a CLIP tower as a LLaVA that is yet to be trained (the original's initialize_vision_modules)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import PINPOINTS_336, LlavaConfig, check_one_of
from llava_jax.config_layouts import read_vision
from llava_jax.conversion import key_table
from llava_jax.conversion.published_files import Tensor
from llava_jax.models.llava_llama import flat_param_shapes

SEED = 0


def llava_config(base: dict, kind: str, tower: str | None, vision: dict | None, anyres: bool) -> dict:
    """`config.json` of a new LLaVA in the original's layout: the language model's keys, and LLaVA's after them.

    Args:
        base: the language model's config.json.
        kind: `mm_projector_type`.
        tower: what is to be `mm_vision_tower`.
        vision: that tower's vision_config.
        anyres: as 1.6 sees pictures (published canvases, in tiles of this tower's size; spatial_unpad); else as 1.5.

    Raises:
        ValueError: `base` is no plain Llama or Mistral.
    """
    if "mm_projector_type" in base:
        raise ValueError("--new-projector is for a plain language model, and this has a projector; leave the flag out")
    check_one_of("model_type", base.get("model_type"), ("llama", "mistral"))
    mistral, tower_config = base["model_type"] == "mistral", read_vision(vision, None)
    side = tower_config.image_size
    images: dict[str, Any] = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
    if anyres:
        images = {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[w // 336 * side, h // 336 * side] for w, h in PINPOINTS_336],
            "mm_patch_merge_type": "spatial_unpad",
        }
    return {
        **base,
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if mistral else "llava",
        "use_mm_proj": True,
        "mm_projector_type": kind,
        "mm_hidden_size": tower_config.hidden_size,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": False,
        **images,
    }


def new_tensors(config: LlavaConfig) -> dict[str, Tensor]:
    """The projector and `image_newline`, float32, under the original's names, drawn as torch draws them there.

    nn.Linear's weight and bias are uniform within 1 / sqrt(inputs); `image_newline` is normal, 1 / sqrt(E) wide.
    """
    rules, rng = key_table.liuhaotian_rules(config), np.random.default_rng(SEED)
    shapes = flat_param_shapes(config)
    out = {}
    for path, shape in shapes.items():
        if path == "image_newline":
            array = rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[0]))
        elif path.startswith("mm_projector/"):
            bound = shapes[path.rpartition("/")[0] + "/kernel"][0] ** -0.5
            array = rng.uniform(-bound, bound, shape).astype(np.float32)
        else:
            continue
        name, transform = key_table.published_name(path, rules)
        array = key_table.invert_transform(transform, array)
        out[name] = Tensor(array.shape, "float32", Path(), lambda _=None, array=array: array)
    return out
