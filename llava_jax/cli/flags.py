"""The flags that several commands have, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llava_jax.constants import DTYPES
from llava_jax.inputs.conversation import conv_templates
from llava_jax.parallel.mesh_axes import check_axes, parse_axes

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llava_jax.inference.llava import Llava


def mesh_axes(text: str) -> tuple[tuple[str, int], ...]:
    """A mesh as `--mesh` takes it, like data=2,fsdp=4."""
    try:
        return parse_axes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def options_from(kind: type, args: argparse.Namespace):
    """The dataclass of a command's options, of the flags that are named like its fields; ValueError if one is wrong."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def check_paths(flags: Mapping[str, object]) -> None:
    """ValueError if one of them is a gs:// path, or has one, and there is nothing here to read it with."""
    values = [part for value in flags.values() for part in (value if isinstance(value, list) else [value])]
    if any(isinstance(value, str) and value.startswith("gs://") for value in values):
        import fsspec  # slow to import

        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError:
            raise ValueError('gs:// paths need gcsfs: pip install "llava-jax[gcs]"') from None


# ---- several processes


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed", action="store_true", help="one of a pod's processes: call jax.distributed.initialize() first"
    )


def initialize(args: argparse.Namespace) -> None:
    """Join the pod, if `--distributed` is given."""
    if args.distributed:
        import jax

        jax.distributed.initialize()


# ---- a model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model is asked, and how it is held."""
    parser.add_argument("--model-path", required=True, help="a directory that convert/from_hf.py wrote")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="prompt template (by the checkpoint)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="(float32 on CPU, float16 on GPUs before Ampere, else bfloat16)"
    )
    add_int8_arguments(parser)


def add_int8_arguments(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is held."""
    parser.add_argument("--quantize", choices=("int8",), help="hold the kernels so, whatever is stored (as stored)")
    parser.add_argument("--int8-prefix", action="store_true", help="cache prompts' keys and values as int8")
    parser.add_argument("--int8-activations", action="store_true", help="prefill by products of int8 by int8 (W8A8)")


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """On which devices it works."""
    parser.add_argument("--mesh", type=mesh_axes, default=(), metavar="AXIS=N,…", help="of this host's devices (all)")


def load_model(args: argparse.Namespace, mesh: Mesh | None = None) -> tuple[Llava, dict]:
    """(Llava, params), as `add_model_arguments` has it."""
    import llava_jax  # JAX is imported once the command line is known to be good

    int8 = dict(quantize=args.quantize, int8_prefix=args.int8_prefix, int8_activations=args.int8_activations)
    return llava_jax.load(args.model_path, args.dtype, mesh, **int8)


# ---- its answers to others


def add_server_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Where it is asked, and for how much."""
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    parser.add_argument("--port", type=int, default=port, help="(%(default)s)")
    parser.add_argument("--max-model-len", type=int, help="positions of a prompt and its answer (as the model takes)")
    add_mesh_argument(parser)


def check_server(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: nothing can listen there, or the model is not there or does not take so much."""
    from llava_jax.checkpoint import load_config
    from llava_jax.inference.batch_shape import model_len

    check_axes(args.mesh, "data", "tensor")
    host, port = args.host, args.port
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} must be from 1 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is already in use; choose another") from None
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    model_len(load_config(args.model_path), args.max_model_len)


def load_served(args: argparse.Namespace) -> tuple[Llava, dict]:
    """As `load_model`, on the mesh that `--mesh` asks for.

    Raises:
        ValueError: there are fewer devices.
    """
    from llava_jax.checkpoint import load_config
    from llava_jax.inference.batching import local_mesh

    config = load_config(args.model_path)
    return load_model(args, local_mesh(dict(args.mesh), config, args.dtype, args.quantize))


# ---- its answers at a terminal


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How it answers."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s; the original: 0.2)")
    parser.add_argument("--top_p", type=float, help="(as the checkpoint's generation_config.json, or 1)")
    parser.add_argument("--top_k", type=int, help="0 is off (as the checkpoint's generation_config.json, or 50)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")


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
