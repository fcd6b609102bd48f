"""The prefix pool on the device: slots for prefixes that many rows read, filled a chunk at a time.

Pure functions. A pool is each layer's k and v, [G, K, P, D], its G slots divided among `shards` devices (the mesh's
batch axes). A program works on one slot of every shard at once: B = shards, and an index, int32 [B], is of a slot among
its shard's own G / shards. One that is out of range writes nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llava_jax.config import TextConfig
from llava_jax.inference.cache import KeysValues, Prefix
from llava_jax.inference.generate import apply
from llava_jax.models.cache_attention import row_major
from llava_jax.models.quantize import Int8

Pool = list[KeysValues]  # for each layer, k and v [G, K, P, D]; arrays or Int8


def empty_pool(config: TextConfig, groups: int, capacity: int, dtype, int8_prefix: bool) -> Pool:
    """Room for `groups` prefixes of up to `capacity` positions."""
    shape = groups, config.num_key_value_heads, capacity, config.head_dim

    def empty():
        return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1])) if int8_prefix else jnp.zeros(shape, dtype)

    return [(empty(), empty()) for _ in range(config.num_hidden_layers)]


def by_shard(shards: int, x: jax.Array) -> jax.Array:
    """[G, ...] → [shards, G / shards, ...]."""
    return x.reshape(shards, -1, *x.shape[1:])


def read_slots(pool: Pool, shards: int, slots: jax.Array) -> Pool:
    """The prefixes of a slot of each shard, [B, K, P, D] a layer. Out of range: those of some slot."""

    def read(x):
        return jax.vmap(lambda x, slot: x.at[slot].get(mode="clip"))(by_shard(shards, x), slots)

    return jax.tree.map(read, pool)


def _write(pool: Pool, chunk: Pool, slots: jax.Array, starts: jax.Array) -> Pool:
    """The pool (donated) with a chunk [B, K, C, D] a layer in those slots, from position `starts`, int32 [B], on."""

    def at(new, slot, start):
        return slot, 0, start, *[0] * (new.ndim - 2)

    def read_one(x, new, slot, start):  # of one shard
        return jax.lax.dynamic_slice(x, at(new, slot, start), (1, *new.shape))[0]

    def write_one(x, new, slot, start):
        return jax.lax.dynamic_update_slice(x, new[None], at(new, slot, start))

    def write(x, new):
        slots_of = by_shard(len(slots), x)
        here = (slots < slots_of.shape[1]).reshape(-1, *[1] * (new.ndim - 1))
        old = row_major(jax.vmap(read_one)(slots_of, new, slots, starts))
        new = row_major(jnp.where(here, new, old))  # else a TPU turns all slots round to write one
        return jax.vmap(write_one)(slots_of, new, slots, starts).reshape(x.shape)

    return jax.tree.map(write, pool, chunk)


def copy_slot(pool: Pool, shards: int, sources: jax.Array, targets: jax.Array) -> Pool:
    """The pool (donated) with what is in one slot of each shard in another one too."""
    return _write(pool, read_slots(pool, shards, sources), targets, jnp.zeros_like(targets))


# ---- prefill


def embed_text(model, params, text_ids: jax.Array) -> jax.Array:
    """int32 [B, P], any id where an image goes → [B, P, E]."""
    return apply(model, params, text_ids, method="embed_tokens")


def place_image(model, params, embeds: jax.Array, tiles: jax.Array, indices: jax.Array) -> jax.Array:
    """Embedded prefixes [B, P, E] (donated) with a picture in each, of T of the tiles, uint8 [B * T, S, S, 3].

    indices: int32 [B, P], which row of [the picture's projected tiles | image_newline] stands at a position; -1: what
    is there stays.
    """
    return apply(model, params, embeds, tiles, indices, method="place_images")


def prefill_first(
    model, chunk: int, params, pool: Pool, embeds: jax.Array, slots: jax.Array, lengths: jax.Array
) -> Pool:
    """The pool (donated) with the first `chunk` positions of embedded prefixes [B, P, E].

    lengths: int32 [B], of the whole prefixes.
    """
    embeds, most = embeds[:, :chunk], embeds.shape[1]
    positions = jnp.broadcast_to(jnp.arange(chunk), embeds.shape[:2])
    new = apply(model, params, embeds, positions, lengths, most, method="prefill_chunk")
    return _write(pool, new, slots, jnp.zeros_like(slots))


def prefill_next(
    model, chunk: int, params, pool: Pool, embeds: jax.Array, slots: jax.Array, starts: jax.Array, lengths: jax.Array
) -> Pool:
    """The pool (donated) with `chunk` more positions, from `starts` on, int32 [B]: all before them are there already.

    A chunk that would reach beyond P begins earlier, and writes what was there again.
    """
    most = embeds.shape[1]
    starts = jnp.minimum(starts, most - chunk)
    before = Prefix(read_slots(pool, len(slots), slots), starts)
    embeds = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk))(embeds, starts)
    positions = starts[:, None] + jnp.arange(chunk)
    new = apply(model, params, embeds, positions, lengths, most, before, method="prefill_chunk")
    return _write(pool, new, slots, starts)
