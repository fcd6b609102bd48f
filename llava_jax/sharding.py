"""The mesh, and one ordered table: parameter path → logical axes → mesh axes."""

from __future__ import annotations

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Parameter path (regex, of the path's end) → one logical axis for each dimension. The first match wins; a parameter
# that no line names is held whole on every device.
LOGICAL_AXES = (
    (r"language_model/embed_tokens/embedding", ("vocab", "embed")),
    (r"language_model/lm_head/kernel", ("embed", "vocab")),
    (r".*/(q_proj|k_proj|v_proj)/kernel", ("embed", "heads")),
    (r".*/(q_proj|k_proj|v_proj)/bias", ("heads",)),
    (r".*/(o_proj|out_proj)/kernel", ("heads", "embed")),
    (r".*/(gate_proj|up_proj|fc1)/kernel", ("embed", "mlp")),
    (r".*/fc1/bias", ("mlp",)),
    (r".*/(down_proj|fc2)/kernel", ("mlp", "embed")),
    (r"mm_projector/linear_\d/kernel", (None, "embed")),
    (r".*/(q_proj|k_proj|v_proj)/b", (None, "heads")),  # a LoRA adapter is a [in, rank] and b [rank, out]
    (r".*/(gate_proj|up_proj)/b", (None, "mlp")),
    (r".*/o_proj/a", ("heads", None)),
    (r".*/down_proj/a", ("mlp", None)),
    (r".*_proj/a", ("embed", None)),
    (r".*_proj/b", (None, "embed")),
)

# Logical axis → mesh axis. `embed` is what layers add into: it is divided in storage only, on a mesh with `fsdp`.
MESH_AXES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", None: None}
BATCH_AXES = ("data", "fsdp")  # what divides the rows of a batch


def make_mesh(**axes: int) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh(data=2, tensor=4)`; the compiler places what is not placed.

    Raises:
        ValueError: no axis is given, a size is not positive, or there are fewer devices than the mesh needs.
    """
    if not axes or any(size < 1 for size in axes.values()):
        raise ValueError(f"make_mesh: axes={axes} must give a positive size for each axis, like data=2, tensor=4")
    needed, devices = math.prod(axes.values()), jax.devices()
    if needed > len(devices):
        raise ValueError(f"make_mesh: axes={axes} need {needed} devices; there are {len(devices)} ({devices[0]})")
    kinds = (AxisType.Auto,) * len(axes)  # jax's default, Explicit, breaks Flax Linen
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:needed])


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter lies on the mesh.

    An axis that the mesh lacks, or that does not divide the dimension, leaves that dimension whole: the same
    table then serves every mesh and every vocabulary (32,001 rows, say), at the price of memory, never of the result.
    """
    logical = next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(f"(.*/)?{pattern}", path)), ())
    names = [MESH_AXES[axis] for axis in logical]
    fits = [n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, shape, strict=False)]
    return PartitionSpec(*(n if fit else None for n, fit in zip(names, fits, strict=True)))


def param_shardings(shapes, mesh: Mesh):
    """The tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`s (see `partition_spec`).

    The tree may be one that holds trees of parameters, as an optimizer's state does.
    """

    def one(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, shapes)
