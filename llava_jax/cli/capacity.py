"""`llava-jax capacity`, or `llava-jax ahead`."""

from __future__ import annotations

import argparse
import json
import os

from llava_jax.capacity.report import ASSUMED, NO_TPU, compiler_is_there, describe, measure
from llava_jax.capacity.roofline import GPUS, SLICES, TOPOLOGIES, Precision
from llava_jax.cli.flags import add_int8_arguments, mesh_axes
from llava_jax.config import PRESETS, LlavaConfig
from llava_jax.parallel.mesh_axes import check_axes

DESCRIPTION = (
    "Compile batch evaluation's programs for TPU slices and GPUs that are not there, with their compilers alone, and "
    "say what fits, what is moved and copied, and how fast it is at best. Minutes for each."
)
EXAMPLE = "--topology v5e-1 --quantize int8 --int8-prefix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", choices=PRESETS, default="1.6-vicuna-7b", help="published shapes (%(default)s)")
    model.add_argument("--model-path", help="a converted checkpoint, of which the config alone is read")
    whole = "TPU slices, and GPUs (all whose compiler is installed)"
    parser.add_argument("--topology", nargs="+", choices=TOPOLOGIES, default=[], help=whole)
    parser.add_argument("--mesh", type=mesh_axes, default=(), metavar="AXIS=N,…", help="(as llava-jax evaluate)")
    parser.add_argument("--prefix", type=int, default=3072, help="positions of a prefix, padded (%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="questions on each prefix (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="(%(default)s)")
    add_int8_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each slice")


def run(args: argparse.Namespace) -> None:
    for name in ("prefix", "rows", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be above 0")
    check_axes(args.mesh, "data", "tensor")
    if args.int8_activations and args.quantize is None:
        raise ValueError("--int8-activations needs --quantize int8")
    topologies = _topologies(args.topology)
    os.environ.update(NO_TPU)  # before JAX is imported and libtpu is loaded
    config = LlavaConfig.preset(args.model)
    if args.model_path:
        from llava_jax.checkpoint import load_config

        config = load_config(args.model_path)
    precision = Precision(args.quantize, args.int8_prefix, args.int8_activations)
    for name in topologies:
        report = measure(config, name, dict(args.mesh), args.prefix, args.rows, args.max_new_tokens, precision)
        print(json.dumps(report) if args.json else describe(report), flush=True)
    if not args.json:
        print(ASSUMED)


def _topologies(asked: list[str]) -> list[str]:
    """Those that are asked for, or all that can be compiled for; ValueError where a compiler is missing."""
    tpu, cuda = compiler_is_there("tpu"), compiler_is_there("cuda")
    names = asked or [*(SLICES if tpu else ()), *(GPUS if cuda else ())]
    if not tpu and (not names or any(name in SLICES for name in names)):
        raise ValueError("the compiler for TPUs is not there: pip install libtpu")
    if not cuda and any(name in GPUS for name in names):
        raise ValueError("the compiler for GPUs is not there: pip install 'llava-jax[cuda-ahead]'")
    return names
