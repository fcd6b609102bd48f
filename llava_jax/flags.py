"""What the flags of several commands have in common."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

import fsspec

from llava_jax.constants import DTYPES
from llava_jax.inputs.conversation import conv_templates


def mesh_axes(text: str) -> tuple[tuple[str, int], ...]:
    """A mesh as `--mesh` takes it, like data=2,fsdp=4."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return tuple((name, int(size)) for name, size in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like data=2,fsdp=4") from None


def check_axes(mesh: tuple[tuple[str, int], ...], *known: str) -> None:
    """ValueError if a mesh has another axis than these."""
    if unknown := {axis for axis, _ in mesh} - set(known):
        raise ValueError(f"--mesh: {', '.join(sorted(unknown))} is none of {', '.join(known)}")


def options_from(kind: type, args: argparse.Namespace):
    """The dataclass of a command's options, of the flags that are named like its fields.

    Raises:
        ValueError: one of them is wrong.
    """
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed", action="store_true", help="one of a pod's processes: call jax.distributed.initialize() first"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model is asked, and how it is held."""
    parser.add_argument("--model-path", required=True, help="a directory that convert/from_hf.py wrote")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="prompt template (by the checkpoint)")
    parser.add_argument("--dtype", choices=DTYPES, help="(float32 on CPU, bfloat16 elsewhere)")
    add_int8_arguments(parser)


def add_int8_arguments(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is held."""
    parser.add_argument("--quantize", choices=("int8",), help="hold the kernels so, whatever is stored (as stored)")
    parser.add_argument("--int8-prefix", action="store_true", help="cache prompts' keys and values as int8")


def check_paths(flags: Mapping[str, object]) -> None:
    """ValueError if one of them is a gs:// path, or has one, and there is nothing here to read it with."""
    values = [part for value in flags.values() for part in (value if isinstance(value, list) else [value])]
    if any(isinstance(value, str) and value.startswith("gs://") for value in values):
        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError:
            raise ValueError('gs:// paths need gcsfs: pip install "llava-jax[gcs]"') from None
