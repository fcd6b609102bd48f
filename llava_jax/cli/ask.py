"""`llava-jax ask`: a question about pictures, answered at a terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys

from llava_jax.cli.flags import add_model_arguments, add_sampling_arguments, answer_options, check_options, load_model
from llava_jax.errors import shortened
from llava_jax.inputs.image import image_size, load_image
from llava_jax.inputs.sources import scheme_of
from llava_jax.inputs.text import check_text

DESCRIPTION = "Answer a question about one or more pictures, or none."
EXAMPLE = '--model-path llava-v1.6-vicuna-7b --image-file me.jpg --query "What is this?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--image-file",
        nargs="+",
        help="a path, URL or data URI; each of several is asked about alone, those with --sep between them together",
    )
    parser.add_argument("--query", required=True, help="the question; <image> may be placed by hand")
    parser.add_argument("--sep", default=",", help="between files that are shown together (%(default)r)")
    add_sampling_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each: image_file, query, answer")


def run(args: argparse.Namespace) -> int:
    """Answer one question about each picture. Of several, those that cannot be asked about are named on stderr, and the
    exit status is 3; an only one is an error, if possible before the model is loaded."""
    check_text(args.query, "--query")
    check_options(args)
    shown = args.image_file or [None]
    several, readable, answered = len(shown) > 1, [], 0
    for entry in shown:
        try:
            paths = _image_files(entry, args.sep)
            for path in paths:
                if not several or scheme_of(path) in ("", "data"):  # many URLs are fetched when their turn comes
                    image_size(path)
            readable.append((entry, paths))
        except (ValueError, OSError) as error:
            if not several:
                raise
            _print_failure(entry, error)
    if not readable:
        return 3
    llava, params = load_model(args)
    for entry, paths in readable:
        try:
            images = [load_image(path) for path in paths]
            pieces = llava.stream(params, images, args.query, **answer_options(args))
        except (ValueError, OSError) as error:
            if not several:
                raise
            _print_failure(entry, error)
            continue
        if args.json:
            print(json.dumps({"image_file": entry, "query": args.query, "answer": "".join(pieces)}), flush=True)
        else:
            print(f"{_printable(entry)}: " if several else "", end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
        answered += 1
    return 3 if answered < len(shown) else 0


def _print_failure(entry: str, error: Exception) -> None:
    print(f"llava-jax: error: {_printable(entry)}: {error}", file=sys.stderr)


def _printable(entry: str) -> str:
    """A file's name as it can be printed: not all of them are UTF-8, and a data URI may be a megabyte long."""
    return shortened(entry).encode(errors="backslashreplace").decode()


def _image_files(entry: str | None, sep: str) -> list[str]:
    """The reference's image_parser, but a file that has `sep` in its own name is one file, as a data URI is."""
    if entry is None:
        return []
    whole = os.path.exists(entry) or (sep == "," and scheme_of(entry) == "data")
    return [entry] if whole else entry.split(sep)
