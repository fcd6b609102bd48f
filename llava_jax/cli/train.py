"""`llava-jax train`: a flag for each field of `TrainOptions`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from llava_jax.cli.flags import add_distributed_argument, initialize, mesh_axes, options_from
from llava_jax.training.train_options import TrainOptions

DESCRIPTION = (
    "Train a converted checkpoint on LLaVA's own data files. A killed run, started again with the same flags, goes "
    "on where it was saved."
)
EXAMPLE = (
    "--stage finetune --model-path llava-v1.6-vicuna-7b --data-path llava_v1_5_mix665k.json --image-folder data "
    "--output-dir tuned --bf16 --mesh fsdp=8"
)
TYPES: dict[Any, type] = {"str": str, "int": int, "float": float, "str | None": str, "float | None": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each with dashes or underscores."""
    for field in dataclasses.fields(TrainOptions):
        flags = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        shown = "" if field.default in (None, "", ()) else " (%(default)s)"
        told: dict[str, Any] = dict(dest=field.name, default=field.default, help=field.metadata["help"] + shown)
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


def run(args: argparse.Namespace) -> None:
    options = options_from(TrainOptions, args)
    initialize(args)
    from llava_jax.training.train import train

    print(f"wrote {train(options)}")
