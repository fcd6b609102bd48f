"""The flags of `llava-jax train`: LLaVA's own, and `--stage` for the three scripts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from llava_jax.flags import add_distributed_argument, mesh_axes
from llava_jax.training.train_options import STAGES, TrainOptions

HELP = {
    "stage": f"{', '.join(STAGES)}: which parameters are trained",
    "model_path": "a directory that convert/from_hf.py wrote",
    "data_path": "LLaVA's JSON: id, image, conversations",
    "image_folder": "where the images named in it stand",
    "output_dir": "a new directory, or that of a killed run to go on with",
    "version": "the conversation template (plain for pretrain, else the checkpoint's)",
    "pretrain_mm_mlp_adapter": "a projector to start from: mm_projector.bin, or a pretrain run's output",
    "unfreeze_mm_vision_tower": "train the tower too",
    "mm_projector_lr": "learning rate of the projector (that of everything)",
    "mm_vision_tower_lr": "learning rate of the tower (that of everything)",
    "max_steps": "updates, instead of whole epochs",
    "per_device_train_batch_size": "rows for each device of the data and fsdp axes",
    "model_max_length": "positions, images included; what is longer is cut off on the right",
    "max_unlabelled_ratio": "the share of samples without any label (cut off, or never answered) that is let pass",
    "bf16": "compute in bfloat16; what is trained stays float32",
    "gradient_checkpointing": "compute each layer again in the backward pass, to save memory",
    "mesh": "devices, like data=2,fsdp=4 (one device)",
    "save_steps": "updates between saved states",
    "save_total_limit": "how many saved states are kept",
}
TYPES: dict[Any, type] = {"str": str, "int": int, "float": float, "str | None": str, "float | None": float}


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of TrainOptions, with dashes or underscores."""
    for field in dataclasses.fields(TrainOptions):
        flags = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        shown = "" if field.default in (None, "", ()) else " (%(default)s)"
        told: dict[str, Any] = dict(dest=field.name, default=field.default, help=HELP.get(field.name, "") + shown)
        if field.name == "mesh":
            parser.add_argument(*flags, type=mesh_axes, metavar="AXIS=N,…", **told)
        elif field.type == "bool":
            parser.add_argument(*flags, type=_boolean, nargs="?", const=True, metavar="True|False", **told)
        else:
            parser.add_argument(*flags, type=TYPES[field.type], metavar=field.type.split()[0].upper(), **told)
    add_distributed_argument(parser)


def _boolean(text: str) -> bool:
    """As transformers' argument parser takes them: `--bf16`, `--bf16 True`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"
