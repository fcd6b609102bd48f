"""The mesh, and one ordered table: parameter path → logical axes → mesh axes."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# The end of a parameter's path (regex) → one logical axis for each dimension. The first match wins; a parameter that
# no line names is replicated.
LOGICAL_AXES = (
    (r"language_model/embed_tokens/embedding", ("vocab", "embed")),
    (r"language_model/lm_head/kernel", ("embed", "vocab")),
    (r"vision_tower/.*/(q_proj|k_proj|v_proj|fc1)/kernel", ("embed", None)),  # each device works on its own tiles
    (r"vision_tower/.*/(out_proj|fc2)/kernel", (None, "embed")),
    (r"vision_tower/.*", ()),
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
LEAST_POSITIONS = 128  # of a device, where a sequence is divided: fewer are not worth a second collective


def make_mesh(devices=None, **axes: int) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh(data=2, tensor=4)`, of Auto axes: the compiler places the rest.

    Args:
        devices: the devices to choose from; None is `jax.devices()`.

    Raises:
        ValueError: no axis is given, a size is not positive, or there are fewer devices than the mesh needs.
    """
    mesh = "mesh " + ",".join(f"{name}={size}" for name, size in axes.items())
    if not axes or any(size < 1 for size in axes.values()):
        raise ValueError(f"{mesh}: must give a positive size for each axis, like data=2,tensor=4")
    needed, devices = math.prod(axes.values()), devices or jax.devices()
    if needed > len(devices):
        raise ValueError(f"{mesh}: needs {needed} devices, and here are {len(devices)} ({devices[0]}, …)")
    kinds = (AxisType.Auto,) * len(axes)  # jax's default, Explicit, breaks Flax Linen
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:needed])


def default_axes(devices: int, kv_heads: int, params: float, memory: float) -> dict[str, int]:
    """Axes for this many devices by default: `tensor` as small as leaves half of their memory to caches, then `data`.

    Devices that divide rows say nothing to each other; those that divide a layer do so twice in it. By libtpu's
    estimate of a 7B (no measurement; `tests/benchmarks/meshes.py`), no mesh that fits answers sooner on v4, v5e, v5p
    and v6e.

    Args:
        params: bytes of all parameters.
        memory: bytes of one device.
    """
    most = math.gcd(devices, kv_heads)
    tensor = next((n for n in range(1, most) if most % n == 0 and params <= n * memory / 2), most)
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


def constrain_sequence(x: jax.Array) -> jax.Array:
    """x [B, L, E] as `constrain_batch` has it, and L divided over `tensor`, where that leaves enough to each device.

    It is for what stands between the products of layers whose heads are divided. Each device normalizes and adds its
    own positions alone, and the products' partial sums meet in a reduce-scatter and an all-gather, which together move
    what one all-reduce moves (sequence parallelism, arXiv:2205.05198).
    """
    mesh = jax.sharding.get_abstract_mesh()
    positions = None if mesh.empty else dividing_axes(mesh, ("tensor",), x.shape[1])
    if positions is None or len(x) * x.shape[1] // row_shards(len(x)) // mesh.shape["tensor"] < LEAST_POSITIONS:
        return constrain_batch(x)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(dividing_axes(mesh, BATCH_AXES, len(x)), positions))


def each_its_own(function, x: jax.Array) -> jax.Array:
    """function(x), the rows of x divided over all devices of the mesh of `jax.set_mesh`, whatever their number.

    Args:
        function: [n, ...] → [n, ...], each row by itself; it has `constrain_rows` between its layers, and its weights
            are whole on every device.
        x: [n, ...], the shards of a batch one after another. Each gets rows of zeros until its devices divide it.

    Returns:
        as `constrain_batch` has it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(x)
    shards = row_shards(len(x))
    divided = x.reshape(shards, -1, *x.shape[1:])
    count, devices = divided.shape[1], mesh.size // shards
    padding = [(0, 0), (0, -count % devices), *[(0, 0)] * (x.ndim - 1)]
    out = function(constrain_rows(jnp.pad(divided, padding).reshape(-1, *x.shape[1:])))
    return constrain_batch(out.reshape(shards, -1, *out.shape[1:])[:, :count].reshape(len(x), *out.shape[1:]))


def constrain_rows(x: jax.Array) -> jax.Array:
    """x, its leading axis sharded over all axes of the mesh, or over the batch axes where not all divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = None if mesh.empty else dividing_axes(mesh, (*BATCH_AXES, "tensor"), len(x))
    return constrain_batch(x) if rows is None else jax.lax.with_sharding_constraint(x, PartitionSpec(rows))


def constrain_params(params):
    """The tree, each leaf sharded over the mesh of `jax.set_mesh` by the table, before any of them is used.

    Without the barrier, an all-reduced gradient stays whole on every device until it is used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(params, param_shardings(params, mesh)))
