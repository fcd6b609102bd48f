"""`llava-jax export` and `convert/to_hf.py`."""

from __future__ import annotations

import argparse

from llava_jax.constants import DTYPES
from llava_jax.conversion.key_table import RULES

DESCRIPTION = "Write a converted or trained checkpoint as safetensors in a published layout."
EXAMPLE = "llava-v1.6-vicuna-7b --output exported --layout llava-hf --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="what convert/from_hf.py or a training run wrote")
    parser.add_argument("--output", required=True, help="the directory to write")
    parser.add_argument("--layout", choices=RULES, help="default: the one that the checkpoint came in")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--vision-tower", help="what config.json is to name as mm_vision_tower (liuhaotian)")
    parser.add_argument("--adapter", action="store_true", help="what a LoRA run trained, unmerged (a PEFT directory)")


def run(args: argparse.Namespace) -> None:
    import jax

    from llava_jax.conversion.adapter import export_adapter
    from llava_jax.conversion.orbax_reader import quiet_orbax
    from llava_jax.conversion.to_hf import export

    jax.config.update("jax_platforms", "cpu")  # an accelerator is not needed, and may be somebody else's now
    if args.adapter and (args.layout == "llava-hf" or args.vision_tower is not None):
        raise ValueError("--adapter goes with neither --layout llava-hf nor --vision-tower")
    quiet_orbax()
    if args.adapter:
        export_adapter(args.directory, args.output, args.dtype)
    else:
        export(args.directory, args.output, args.layout, args.dtype, args.vision_tower)
