"""Programs compiled for chips that are not there.

libtpu alone is needed for TPUs, and JAX's CUDA plugin for GPUs. Neither may look for its chips: see NO_TPU in
`llava_jax.capacity.report`.
"""

from __future__ import annotations

import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh

from llava_jax.capacity.roofline import Gpus, Slice
from llava_jax.config import LlavaConfig
from llava_jax.models.llava_llama import param_shapes
from llava_jax.models.quantize import is_quantized, with_scales
from llava_jax.parallel.sharding import make_mesh, param_shardings
from llava_jax.parallel.target import default_dtype


def slice_mesh(where: Slice | Gpus, **axes: int) -> Mesh:
    """A mesh over a slice's chips, e.g. `slice_mesh(SLICES["v5e-8"], data=1, tensor=8)`, or over a machine's GPUs."""
    return make_mesh(topologies.get_topology_desc(**where.description).devices, **axes)


def abstract_array(sharding, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_params(config: LlavaConfig, mesh: Mesh, quantize: str | None = None):
    """The parameters as `ShapeDtypeStruct`s in the dtype that `load` chooses, or int8, divided by the rules table."""
    dtype = default_dtype(mesh.devices.flat[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), param_shapes(config))
    if quantize is not None:
        shapes = with_scales(shapes, [path for path in flatten_dict(shapes, sep="/") if is_quantized(path)])
    placed = param_shardings(shapes, mesh)
    return jax.tree.map(lambda x, at: abstract_array(at, *x.shape, dtype=x.dtype), shapes, placed)


def chip_bytes(tree) -> int:
    """What one chip holds of a tree of placed arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Compiled(NamedTuple):
    """What `compile_for` gives."""

    executable: Any  # a jax.stages.Compiled
    text: str  # its HLO
    out: Any  # its results, abstract, placed as the compiler placed them
    seconds: float  # of compiling


def compile_for(mesh: Mesh, jitted, *arguments) -> Compiled:
    """A jitted function for abstract arguments."""
    thread = ThreadPoolExecutor(1)  # of its own: the compiler holds the one that calls it for minutes, deaf to Ctrl-C
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return thread.submit(_compile_for, folder, mesh, jitted, *arguments).result()


def _compile_for(folder: str, mesh: Mesh, jitted, *arguments) -> Compiled:
    began = time.perf_counter()
    precision = jax.default_matmul_precision("default")  # "highest" has no splash in bfloat16
    with jax.set_mesh(mesh), precision:
        lowered = jitted.lower(*arguments)
        if mesh.devices.flat[0].platform == "tpu":  # as_text() cannot parse all that libtpu writes
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            text = next(Path(folder).glob("*.after_codegen.txt")).read_text()
        else:
            compiled = lowered.compile()
            text = compiled.as_text() or ""
    placed = jax.tree.map(
        lambda x, at: abstract_array(at, *x.shape, dtype=x.dtype), lowered.out_info, compiled.output_shardings
    )
    return Compiled(compiled, text, placed, time.perf_counter() - began)


def compile_if_it_fits(mesh: Mesh, jitted, *arguments) -> Compiled | None:
    """`compile_for`, or None where the compiler finds that a chip has no room for the program."""
    try:
        return compile_for(mesh, jitted, *arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
