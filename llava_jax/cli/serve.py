"""`llava-jax serve`."""

from __future__ import annotations

import argparse

from llava_jax.cli.flags import add_model_arguments, add_server_arguments, check_server, load_served
from llava_jax.inference.batch_shape import MAX_NUM_SEQS

DESCRIPTION = "Serve a model to every client that speaks the OpenAI API, many at once."
EXAMPLE = "--model-path llava-v1.6-vicuna-7b --port 8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_server_arguments(parser, 8000)
    parser.add_argument("--api-key", help="what clients must give, for everything but /health (nothing)")
    parser.add_argument("--served-model-name", help="what clients call the model (the checkpoint's name)")
    parser.add_argument(
        "--max-num-seqs", type=int, default=MAX_NUM_SEQS, help="answers that decode at once (%(default)s)"
    )
    parser.add_argument("--max-queue", type=int, default=256, help="requests that wait; more get 429 (%(default)s)")
    parser.add_argument(
        "--allowed-media-domains", nargs="+", default=[], metavar="HOST", help="hosts of http(s) pictures (none)"
    )
    parser.add_argument("--allowed-media-path", metavar="DIR", help="folder of file:// pictures (none)")
    parser.add_argument(
        "--shutdown-timeout", type=float, default=30.0, help="seconds for what runs when it is to end (%(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from llava_jax.serve import server

    server.check_packages()
    policy = server.media_policy(args.allowed_media_domains, args.allowed_media_path)
    options = server.ServeOptions(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        served_model_name=args.served_model_name,
        conv_mode=args.conv_mode,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_queue=args.max_queue,
        shutdown_timeout=args.shutdown_timeout,
        media=policy,
    )
    check_server(args)
    server.log_requests()
    llava, params = load_served(args)
    server.serve(llava, params, options)
