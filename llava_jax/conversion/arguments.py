"""The flags of the way in, apart from the code, so that `--help` need not import JAX."""

from __future__ import annotations

import argparse

from llava_jax.constants import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `convert/from_hf.py` and of `llava-jax convert`."""
    parser.add_argument("source", help="a local directory or a hub id, e.g. liuhaotian/llava-v1.6-vicuna-7b")
    parser.add_argument("--output", help="the directory to write (default: ./<last part of the source>)")
    parser.add_argument("--revision", help="a branch, tag or commit of the hub id")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as published")
    parser.add_argument("--vision-tower", help="a CLIP directory or hub id, instead of the config's mm_vision_tower")
    parser.add_argument("--model-base", help="the language model under a stage-1 mm_projector.bin")
