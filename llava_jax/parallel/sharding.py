"""The mesh, and one ordered table: parameter path → logical axes → mesh axes."""

from __future__ import annotations

import math
import re

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# The end of a parameter's path (regex) → one logical axis for each dimension. The first match wins; a parameter that
# no line names is replicated.
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

# Logical axis → mesh axis. `embed` (the residual stream) and `rank` are sharded in storage only, and only over `fsdp`.
MESH_AXES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", "rank": "fsdp", None: None}
BATCH_AXES = ("data", "fsdp")  # over which a batch's rows are sharded


def make_mesh(devices=None, **axes: int) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh(data=2, tensor=4)`, of Auto axes: the compiler places the rest.

    Args:
        devices: the devices to choose from; None is `jax.devices()`.

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
    """Axes for this many devices by default: `tensor` as far as it divides the kv heads, `data` for the rest."""
    tensor = math.gcd(devices, kv_heads)
    return {"data": devices // tensor, "tensor": tensor}


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How one parameter is sharded over the mesh.

    A dimension stays whole where the mesh lacks the axis, or the axis does not divide it: one table then serves every
    mesh and every vocabulary (32,001 rows, say), at the price of memory, never of the result.
    """
    logical = next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(f"(.*/)?{pattern}", path)), ())
    names = [MESH_AXES[axis] for axis in logical]
    fits = [n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, shape, strict=False)]
    return PartitionSpec(*(n if fit else None for n, fit in zip(names, fits, strict=True)))


def param_shardings(shapes, mesh: Mesh | AbstractMesh):
    """The tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`s (see `partition_spec`).

    It may also be an optimizer's state, which holds trees of parameters.
    """

    def one(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, shapes)


def num_batch_shards(mesh: Mesh | None) -> int:
    """Into how many shards the mesh divides a batch's rows."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is a batch's rows, or its shards."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in BATCH_AXES if name in mesh.shape) or None))


def dividing_axes(mesh, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The axes that the mesh has of these, or None where they do not divide `size`."""
    names = tuple(name for name in names if name in mesh.shape)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def row_shards(rows: int) -> int:
    """Into how many shards the mesh of `jax.set_mesh` divides this many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in dividing_axes(mesh, BATCH_AXES, rows) or ())


def constrain_batch(x: jax.Array) -> jax.Array:
    """x, its leading axis sharded over the batch axes of the mesh of `jax.set_mesh`, its other axes whole.

    Without this constraint the compiler may give activations the storage sharding of the weights that they multiply.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(dividing_axes(mesh, BATCH_AXES, len(x))))


def constrain_params(params):
    """The tree, each leaf sharded over the mesh of `jax.set_mesh` by the table, before any of them is used.

    Without the barrier, an all-reduced gradient stays whole on every device until it is used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(params, param_shardings(params, mesh)))
