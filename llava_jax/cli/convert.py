"""`llava-jax convert` and `convert/from_hf.py`."""

from __future__ import annotations

import argparse

from llava_jax.constants import DTYPES
from llava_jax.inputs.conversation import conv_templates

DESCRIPTION = "Turn a published LLaVA checkpoint, local or on the hub, into an Orbax directory."
EXAMPLE = "liuhaotian/llava-v1.6-vicuna-7b --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
    import jax

    from llava_jax.conversion.from_hf import convert
    from llava_jax.conversion.orbax_reader import quiet_orbax

    jax.config.update("jax_platforms", "cpu")  # an accelerator is not needed, and may be somebody else's now
    quiet_orbax()
    given = args.revision, args.dtype, args.vision_tower, args.model_base, args.new_projector, args.anyres
    convert(args.source, args.output, *given, args.quantize, args.quantize_also, args.conv_mode)
