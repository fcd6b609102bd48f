"""The processes of a pod, one on each host, which run the same program in step. Alone, all of this is nothing."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llava_jax.sharding import num_shards, rows_sharding


def is_first() -> bool:
    """Whether this process is the one that writes what only one can."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Until every process has come to the place of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest(values: Sequence[int]) -> list[int]:
    """Of each value, the largest that any process has."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.array(values, np.int32)).max(0).tolist()


def any_of(value: bool) -> bool:
    """Whether it is so in any process."""
    return bool(largest([value])[0])


def local_shards(mesh: Mesh) -> list[int]:
    """Which shards of a batch's rows this process has devices for, in order."""
    placed = rows_sharding(mesh).addressable_devices_indices_map((num_shards(mesh),))
    return sorted({rows.start or 0 for (rows,) in placed.values()})


def place_rows(batch, mesh: Mesh):
    """A tree of arrays that hold this process's shards, as the whole of them, over the mesh."""
    sharding, here = rows_sharding(mesh), local_shards(mesh)

    def place(local: np.ndarray) -> jax.Array:
        rows = len(local) // len(here)

        def part(index):
            at = here.index((index[0].start or 0) // rows) * rows
            return local[at : at + rows]

        return jax.make_array_from_callback((num_shards(mesh) * rows, *local.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
