"""`llava-jax ask` and `llava-jax chat`: the model at a terminal."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_jax.flags import add_model_arguments
from llava_jax.inputs.image import image_size, load_image
from llava_jax.inputs.sources import scheme_of
from llava_jax.inputs.text import check_text, shortened

if TYPE_CHECKING:
    from llava_jax.inference.chat import Chat

HELP = """/image FILE shows it another picture (without FILE: none) and begins anew; /reset begins anew with the same
picture; /quit or Ctrl-D ends; Ctrl-C stops an answer."""


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How it answers."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s; the original: 0.2)")
    parser.add_argument("--top_p", type=float, help="(as the checkpoint's generation_config.json, or 1)")
    parser.add_argument("--top_k", type=int, help="0 is off (as the checkpoint's generation_config.json, or 50)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")


def load_model(args: argparse.Namespace) -> tuple:
    """(Llava, params), as `add_model_arguments` has it."""
    import llava_jax  # JAX is imported once the command line is known to be good

    return llava_jax.load(args.model_path, args.dtype, quantize=args.quantize, int8_prefix=args.int8_prefix)


def answer_options(args: argparse.Namespace) -> dict:
    """What `add_sampling_arguments` gave, and the template, as `Llava.stream` takes them."""
    names = ("conv_mode", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    return {name: getattr(args, name) for name in names}


def check_options(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError if the model cannot be asked so, or is not there: before it is loaded."""
    from llava_jax.checkpoint import load_config
    from llava_jax.inference.generation_options import generation_options

    options = answer_options(args)
    del options["conv_mode"]
    generation_options(load_config(args.model_path).generation, **options)


# ---- ask


def add_ask_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `llava-jax ask`."""
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


def ask(args: argparse.Namespace) -> int:
    """Answers one question about each picture. Of several, those that cannot be asked about are named, and make it 3.

    Raises:
        FileNotFoundError, ValueError: the only picture is missing or none, seen before the model is loaded; or the
            only prompt cannot be asked.
    """
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
            _print_stream(pieces)
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


def _print_stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


# ---- chat


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `llava-jax chat`."""
    add_model_arguments(parser)
    parser.add_argument("--image-file", nargs="+", help="the picture, or several, as paths, URLs or data URIs")
    add_sampling_arguments(parser)


def chat(args: argparse.Namespace) -> None:
    """A conversation of several turns, read from standard input.

    Raises:
        FileNotFoundError, ValueError: the first picture or the model cannot be read.
    """
    images = [load_image(path) for path in args.image_file or ()]
    check_options(args)
    llava, params = load_model(args)

    def begin(images):
        return llava.chat(params, images, **answer_options(args))

    _compile(begin(images))
    talk = begin(images)
    print(HELP)
    while (line := _read_line()) is not None:
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/image":
                file = rest.strip().strip("'\"")
                shown = [load_image(file)] if file else []
                talk, images = begin(shown), shown
            elif command == "/reset":
                talk = begin(images)
            elif command.startswith("/"):
                print(HELP)
            elif line:
                _print_answer(talk, line)
        except (ValueError, OSError) as error:
            print(error)


def _compile(talk: Chat) -> None:
    """Beforehand what every turn runs, or the lines that announce it would stand in the middle of the first answer."""
    with contextlib.closing(talk.stream("What is in this image?")) as pieces:
        for _ in itertools.islice(pieces, 2):
            pass


def _read_line() -> str | None:
    """What was typed; None at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its editing and history)
    try:
        return input("USER: ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(/quit or Ctrl-D ends)")
        return ""


def _print_answer(talk: Chat, question: str) -> None:
    """As it comes, until Ctrl-C, which takes effect at the next token; a second one does not wait for that."""
    pressed: list[int] = []

    def stop(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, stop)
    try:
        with contextlib.closing(talk.stream(question)) as pieces:  # what was read is the answer that the next turn sees
            print("ASSISTANT: ", end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
                if pressed:
                    break
            print(" (stopped)" if pressed else "")
    finally:
        signal.signal(signal.SIGINT, before)
