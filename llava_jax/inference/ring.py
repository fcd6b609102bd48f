"""Writing into rows' suffixes, whose S slots are rings: behind the last comes the first again (see `rows`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llava_jax.inference.pool import by_shard
from llava_jax.models.cache_attention import row_major


def put(x: jax.Array, new: jax.Array, slots: jax.Array, row_ids: jax.Array, starts: jax.Array) -> jax.Array:
    """A suffix (donated) with positions of some of its rows: position i of a row is in its slot (start + i) mod S.

    What a row's other slots hold is not defined afterwards.

    Args:
        x: [G, K, R, S, D]; new: [B, K, n, Q, D], Q at most S.
        slots: int32 [B], a slot of each shard; row_ids: int32 [B, n], no two alike. Out of range: nothing changes.
        starts: int32 [B, n], any number.
    """
    arguments = x, new, slots, row_ids, starts % x.shape[3]
    return jax.lax.platform_dependent(*arguments, default=by_position, tpu=by_block)


def by_position(x, new, slots, row_ids, starts):
    """Each position to its slot: the fewest bytes, where memory has no tiles."""
    at = (starts[..., None] + jnp.arange(new.shape[3])) % x.shape[3]
    return _scatter(x, new.transpose(0, 2, 3, 1, 4), slots, row_ids[..., None], at)


def by_block(x, new, slots, row_ids, starts):
    """The one or two blocks of Q slots in which positions lie, whole: a TPU writes tiles of slots, and has to turn the
    positions to fit. It does so fastest by a product with ones and zeros, which is exact."""
    *of_rows, size, width = x.shape
    block = new.shape[3] if size % new.shape[3] == 0 else size
    blocks = row_major(x.reshape(*of_rows, size // block, block, width))
    for n in range(min(2, size // block)):
        which = (starts // block + n) % (size // block)
        of_slot = (which[..., None] * block + jnp.arange(block) - starts[..., None]) % size  # [B, n, block]
        is_there = (of_slot[..., None] == jnp.arange(new.shape[3])).astype(new.dtype)
        turned = jnp.einsum("bnsq,bknqd->bnksd", is_there, new, precision="highest")
        blocks = row_major(_scatter(blocks, turned, slots, row_ids, which))
    return blocks.reshape(x.shape)


def _scatter(x, new, slots, *places):
    """x [G, K, …] with `new` in a slot of each shard, as [:, *places] of it; the others have B in front."""

    def scatter(x, new, slot, *places):
        return x.at[(slot, slice(None), *places)].set(new, mode="drop", unique_indices=True)  # else a GPU locks each

    return jax.vmap(scatter)(by_shard(len(slots), x), new, slots, *places).reshape(x.shape)
