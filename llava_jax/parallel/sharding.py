"""The mesh, and one ordered table: parameter path → logical axes → mesh axes."""

from __future__ import annotations

import math
import re

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
    (r"language_model/lm_head/kernel_scale", ("vocab",)),
    (r".*/(q_proj|k_proj|v_proj)/kernel_scale", ("heads",)),
    (r".*/(gate_proj|up_proj|fc1)/kernel_scale", ("mlp",)),
    (r"mm_projector/linear_\d/kernel", (None, "embed")),
    (r".*/(q_proj|k_proj|v_proj)/b", ("rank", "heads")),  # a LoRA adapter is a [in, rank] and b [rank, out]
    (r".*/(gate_proj|up_proj)/b", ("rank", "mlp")),
    (r".*/o_proj/a", ("heads", "rank")),
    (r".*/down_proj/a", ("mlp", "rank")),
    (r".*_proj/a", ("embed", None)),
    (r".*_proj/b", (None, "embed")),
)

# Logical axis → mesh axis. `embed`, what layers add into, and `rank` are divided in storage only, if there is `fsdp`.
MESH_AXES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", "rank": "fsdp", None: None}
BATCH_AXES = ("data", "fsdp")  # what divides the rows of a batch


def make_mesh(devices=None, **axes: int) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh(data=2, tensor=4)`; the compiler places what is not placed.

    Args:
        devices: to take them from; None is `jax.devices()`.

    Raises:
        ValueError: no axis is given, a size is not positive, or there are fewer devices than the mesh needs.
    """
    if not axes or any(size < 1 for size in axes.values()):
        raise ValueError(f"make_mesh: axes={axes} must give a positive size for each axis, like data=2, tensor=4")
    needed, devices = math.prod(axes.values()), devices or jax.devices()
    if needed > len(devices):
        raise ValueError(f"make_mesh: axes={axes} need {needed} devices; there are {len(devices)} ({devices[0]})")
    kinds = (AxisType.Auto,) * len(axes)  # jax's default, Explicit, breaks Flax Linen
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:needed])


def default_axes(devices: int, kv_heads: int) -> dict[str, int]:
    """Axes for so many devices, where nobody says it: `tensor` as far as it divides the heads, `data` the rest."""
    tensor = math.gcd(devices, kv_heads)
    return {"data": devices // tensor, "tensor": tensor}


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How one parameter lies on the mesh.

    An axis that the mesh lacks, or that does not divide the dimension, leaves that dimension whole: the same
    table then serves every mesh and every vocabulary (32,001 rows, say), at the price of memory, never of the result.
    """
    logical = next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(f"(.*/)?{pattern}", path)), ())
    names = [MESH_AXES[axis] for axis in logical]
    fits = [n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, shape, strict=False)]
    return PartitionSpec(*(n if fit else None for n, fit in zip(names, fits, strict=True)))


def param_shardings(shapes, mesh: Mesh | AbstractMesh):
    """The tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`s (see `partition_spec`).

    The tree may be one that holds trees of parameters, as an optimizer's state does.
    """

    def one(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, shapes)


def num_batch_shards(mesh: Mesh | None) -> int:
    """How many devices divide a batch's rows among themselves."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of whatever has a batch's rows, or its shards, in front."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in BATCH_AXES if name in mesh.shape) or None))


def dividing_axes(mesh, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the axes that the mesh has, or None where they do not divide `size`."""
    names = tuple(name for name in names if name in mesh.shape)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def row_shards(rows: int) -> int:
    """Into how many parts the mesh that `jax.set_mesh` names divides that many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in dividing_axes(mesh, BATCH_AXES, rows) or ())


def constrain_batch(x: jax.Array) -> jax.Array:
    """x with its leading axis over the batch axes of the mesh that `jax.set_mesh` names, and whole otherwise.

    Without being told, the compiler may divide activations as the weights that they meet are divided in storage.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(dividing_axes(mesh, BATCH_AXES, len(x))))


def constrain_params(params):
    """The tree, each leaf divided on that mesh as the rules table has it, before anything is done with any of them.

    Without the barrier, a gradient that all devices add up to stays whole on each of them until it is used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(params, param_shardings(params, mesh)))
