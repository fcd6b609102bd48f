"""Compilation as a visible cost: a line when it happens, and a cache on disk so that it happens once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from llava_jax.inputs.types import Batch, Questions

# Products by Triton, which reads int8 kernels as they are; and no kernels above 16 MB that are copied side by side at
# every step, to be multiplied at once.
GPU_COMPILER_OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": True, "xla_gpu_dot_merger_threshold_mb": 16}

# Nothing goes back from a core's own memory to HBM, where XLA would update whole suffixes and write them back.
TPU_SUFFIX_OPTIONS = {"xla_msa_max_outstanding_evictions": 0}


def compiler_options(mesh: Mesh | None = None, updates_suffix: bool = False) -> dict[str, bool | int]:
    """What to tell XLA of a program for the mesh's devices, or this process's: of the options above, those it knows.

    Args:
        updates_suffix: whether the program writes into suffixes, as the decode loop does.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options: dict[str, bool | int] = {}
    if platform == "gpu":
        options |= GPU_COMPILER_OPTIONS
    if platform == "tpu" and updates_suffix:
        options |= TPU_SUFFIX_OPTIONS
    where = mesh if platform == "tpu" else None  # any XLA knows the options for GPUs, and only a TPU's those for TPUs
    return {name: value for name, value in options.items() if _is_option(name, value, where)}


@functools.cache
def _is_option(name: str, value: bool | int, mesh: Mesh | None) -> bool:
    """XLA renames its options from time to time, and refuses a program with one that it does not know."""
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    try:
        jax.jit(lambda: 0, out_shardings=where, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def stop_keeping() -> None:
    """What is compiled from now on goes into no cache: whoever is about to end the process leaves no half of a file."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


class LoggedJit:
    """A jitted function that says on stderr when it meets shapes for the first time, and how long that took.

    The time is that of compiling (or of reading the cache) and of the first run. It runs under the mesh, if there is
    one, for the kernels that must be told of it. Parameters keep their shapes and a cache's layers have like ones, so a
    call looks at a few arrays only.
    """

    def __init__(self, name: str, jitted, mesh: Mesh | None = None):
        self.name, self.jitted, self.mesh = name, jitted, mesh
        self.compiled_for: set = set()

    def __call__(self, *args):
        shapes = tuple(map(_shapes, args))
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if shapes in self.compiled_for:
                return self.jitted(*args)
            with tqdm.external_write_mode(file=sys.stderr):  # a progress bar makes way
                print(f"compiling {self.name} {_describe(args)}…", end="", file=sys.stderr, flush=True)
                began = time.perf_counter()
                out = jax.block_until_ready(self.jitted(*args))
                print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        self.compiled_for.add(shapes)
        return out


def _shapes(arg):
    """The shapes that can differ from call to call, of one argument."""
    if hasattr(arg, "shape"):
        return arg.shape, arg.dtype
    if isinstance(arg, dict):  # parameters, or the state of their training
        return None
    if isinstance(arg, list):  # one entry a layer
        return len(arg), _shapes(arg[0]) if arg else None
    if isinstance(arg, tuple):  # or a NamedTuple
        return type(arg), tuple(map(_shapes, arg))
    if dataclasses.is_dataclass(arg):
        return type(arg), tuple(_shapes(getattr(arg, field.name)) for field in dataclasses.fields(arg))
    return arg


def _describe(args) -> str:
    """The shapes that differ between programs: of the planned batch, or of the questions."""
    shown = next((arg for kind in (Batch, Questions) for arg in args if isinstance(arg, kind)), None)
    if isinstance(shown, Batch):
        return "for {} tiles, {} x {} positions ".format(len(shown.tiles), *shown.gather_indices.shape)
    return "for {} prefixes x {} questions of up to {} tokens ".format(*shown.ids.shape) if shown else ""


def enable_compilation_cache() -> None:
    """Let JAX keep compiled programs in LLAVA_JAX_CACHE_DIR, or in the user's cache directory; an empty value: nowhere.

    What JAX has been told already, by its own flag or JAX_COMPILATION_CACHE_DIR, is left as it is.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = os.environ.get("LLAVA_JAX_CACHE_DIR", str(home / "llava_jax" / "compiled"))
    if directory and jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", directory)
