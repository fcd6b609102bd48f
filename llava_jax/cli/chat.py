"""`llava-jax chat`: a conversation at a terminal."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
from typing import TYPE_CHECKING

from llava_jax.cli.flags import add_model_arguments, add_sampling_arguments, answer_options, check_options, load_model
from llava_jax.inputs.image import load_image

if TYPE_CHECKING:
    from llava_jax.inference.chat import Chat

DESCRIPTION = "Talk about a picture, or about none: each turn knows those before it, and answers come as they are made."
EXAMPLE = "--model-path llava-v1.6-vicuna-7b --image-file me.jpg"
HELP = """/image FILE shows it another picture (without FILE: none) and begins anew; /reset begins anew with the same
picture; /quit or Ctrl-D ends; Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--image-file", nargs="+", help="the picture, or several, as paths, URLs or data URIs")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """A conversation of several turns, read from standard input."""
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
