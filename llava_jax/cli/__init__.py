"""The `llava-jax` command (`python -m llava_jax`). Flags carry the names of LLaVA's own scripts.

Each command is a module of its name: DESCRIPTION, EXAMPLE (what follows the command's name), `add_arguments(parser)`,
and `run(args)`, which may return an exit status. Only the one that is asked for is imported.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from llava_jax.cli.failures import exit_status

COMMANDS = {  # and their lines in `llava-jax --help`
    "ask": "answer a question about one or more pictures",
    "chat": "talk about a picture",
    "web": "talk about pictures in a browser",
    "serve": "answer clients of the OpenAI API, many at once",
    "convert": "turn a published checkpoint into an Orbax directory",
    "export": "write a converted or trained checkpoint in a published layout",
    "train": "LLaVA's training stages",
    "verify": "whether a converted checkpoint is the same model as the published one",
    "evaluate": "answer a benchmark's question file",
    "score": "score an answer file",
    "submit": "write an answer file in the form that a benchmark's server takes",
    "capacity": "what batch evaluation needs on TPUs and GPUs that are not there",
    "demo": "the whole path with the small model that the package bundles",
}
ALIASES = {"ahead": "capacity"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; an error is one line on stderr and status 1."""

    def run() -> int | None:
        args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
        from llava_jax.cli.flags import check_paths

        check_paths(vars(args))
        return args.run(args)

    return exit_status("llava-jax", run, own_process=argv is None)


def script(prog: str, command: str, argv: list[str] | None = None) -> NoReturn:
    """A command as a script of its own, such as `python convert/from_hf.py`; ends the process with its status."""
    parser = argparse.ArgumentParser(prog=prog)
    add_command(parser, command)

    def run() -> int | None:
        args = parser.parse_args(argv)
        return args.run(args)

    sys.exit(exit_status("", run, own_process=argv is None))


def add_command(parser: argparse.ArgumentParser, command: str) -> None:
    """Make it the parser of a command: its arguments, its help, and as `run` what runs it."""
    module = import_module(f"llava_jax.cli.{command}")
    parser.description, parser.epilog = module.DESCRIPTION, f"example: {parser.prog} {module.EXAMPLE}"
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command line. Of the commands, only the one that it names has arguments."""
    parser = argparse.ArgumentParser(prog="llava-jax", description="LLaVA-1.6 in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in words if word in COMMANDS or word in ALIASES), None)
    for name, line in COMMANDS.items():
        aliases = [alias for alias, command in ALIASES.items() if command == name]
        its = commands.add_parser(name, aliases=aliases, help=line)
        if asked in (name, *aliases):
            add_command(its, name)
    return parser
