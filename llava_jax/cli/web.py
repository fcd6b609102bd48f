"""`llava-jax web`."""

from __future__ import annotations

import argparse

from llava_jax.cli.flags import add_model_arguments, add_server_arguments, check_server, load_served
from llava_jax.web.app import check_gradio, serve

DESCRIPTION = "Serve a page on which pictures are shown and talked about, to one browser or several."
EXAMPLE = "--model-path llava-v1.6-vicuna-7b --port 7860"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_server_arguments(parser, 7860)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    check_gradio()
    check_server(args)
    llava, params = load_served(args)
    serve(llava, params, args.host, args.port, args.conv_mode, args.max_model_len)
