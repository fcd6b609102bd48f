"""`llava-jax web`."""

from __future__ import annotations

import argparse

from llava_jax.cli.flags import add_model_arguments, load_model
from llava_jax.web.app import check_address, check_gradio, serve

DESCRIPTION = "Serve a page on which pictures are shown and talked about, to one browser or several."
EXAMPLE = "--model-path llava-v1.6-vicuna-7b --port 7860"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument("--max-model-len", type=int, help="positions of a conversation (as the model takes)")


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    check_address(args.host, args.port)
    check_gradio()
    from llava_jax.checkpoint import load_config
    from llava_jax.inference.batch_shape import model_len

    model_len(load_config(args.model_path), args.max_model_len)
    llava, params = load_model(args)
    serve(llava, params, args.host, args.port, args.conv_mode, args.max_model_len)
