"""The flags of the way in and out, apart from the code, so that `--help` need not import JAX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from llava_jax.constants import DTYPES
from llava_jax.failures import exit_status
from llava_jax.inputs.conversation import conv_templates

LAYOUTS = ("liuhaotian", "llava-hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `convert/from_hf.py` and of `llava-jax convert`."""
    parser.add_argument("source", help="a local directory or a hub id, e.g. liuhaotian/llava-v1.6-vicuna-7b")
    parser.add_argument("--output", help="the directory to write (default: ./<last part of the source>)")
    parser.add_argument("--revision", help="a branch, tag or commit of the hub id")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as published")
    parser.add_argument("--vision-tower", help="a CLIP directory or hub id, instead of the config's mm_vision_tower")
    parser.add_argument("--model-base", help="the language model under a stage-1 mm_projector.bin")
    parser.add_argument(
        "--new-projector",
        metavar="mlp2x_gelu",
        help="make a LLaVA to be trained, of a plain Llama (the source), --vision-tower and a random projector",
    )
    parser.add_argument("--quantize", choices=("int8",), help="store kernels so, for inference on half the memory")
    parser.add_argument(
        "--quantize-also",
        nargs="+",
        default=(),
        choices=("lm_head", "mm_projector"),
        help="kernels that stay otherwise",
    )
    parser.add_argument(
        "--conv-mode",
        choices=sorted(conv_templates),
        help="prompt template (as its card, its chat_template or its name)",
    )
    parser.add_argument("--anyres", action="store_true", help="with --new-projector: see pictures as 1.6, not as 1.5")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `convert/to_hf.py` and of `llava-jax export`."""
    parser.add_argument("directory", help="what convert/from_hf.py or a training run wrote")
    parser.add_argument("--output", required=True, help="the directory to write")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: the one that the checkpoint came in")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--vision-tower", help="what config.json is to name as mm_vision_tower (liuhaotian)")
    parser.add_argument("--adapter", action="store_true", help="what a LoRA run trained, unmerged (a PEFT directory)")


def run_command(parser: argparse.ArgumentParser, run: Callable, argv: list[str] | None) -> NoReturn:
    """Parse and run one of the scripts in convert/, and end with its status."""
    sys.exit(exit_status("", lambda: run(parser.parse_args(argv)), own_process=argv is None))
