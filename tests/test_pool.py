"""The prefix pool: prefixes prefilled whole or in chunks, in slots of their own."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import small_model

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference import pool as device
from llava_jax.inference.engine import Engine
from llava_jax.inputs.anyres import NEWLINE, image_index
from llava_jax.inputs.batch import pack

POSITIONS = 3072  # of the pool
TILES = 5  # a picture
CHUNK = 1100  # the last one begins early: 3 · 1100 are more than 3072
SIZES = {"five tiles": [(700, 690)], "two": [(700, 20), (500, 10)], "text": []}


@cache
def model():
    """(llava, params, engine with an int8 prefix)"""
    llava, params = small_model()
    return llava, params, Engine(llava.config, int8_prefix=True)


@cache
def programs(int8=False):
    llava, _, int8_engine = model()
    of = (int8_engine if int8 else llava.engine).model
    return SimpleNamespace(
        embed_text=jax.jit(partial(device.embed_text, of)),
        place_image=jax.jit(partial(device.place_image, of), donate_argnums=1),
        first=jax.jit(partial(device.prefill_first, of), static_argnums=0, donate_argnums=2),
        next=jax.jit(partial(device.prefill_next, of), static_argnums=0, donate_argnums=2),
        copy=jax.jit(device.copy_slot, static_argnums=1, donate_argnums=0),
        read=jax.jit(device.read_slots, static_argnums=1),
    )


@cache
def images(name):
    rng = np.random.default_rng(len(name))
    return model()[0].load_images([rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in SIZES[name]] or None)


@cache
def prompt(name, text="What is it?"):
    return np.array(model()[0].prompt_ids(text, SIZES[name]))


def laid_out(ids, pictures, config):
    """(text ids [P], for each picture int32 [P], how many positions): what a host makes of a prefix."""
    text, places, at = np.zeros(POSITIONS, np.int32), [], 0
    left = iter(pictures)
    for token in ids:
        if token == IMAGE_TOKEN_INDEX:
            cells = image_index(next(left).size, config)
            places.append(np.full(POSITIONS, -1, np.int32))
            places[-1][at : at + len(cells)] = np.where(cells == NEWLINE, TILES * config.tokens_per_tile, cells)
            at += len(cells)
        else:
            text[at], at = token, at + 1
    return text, places, at


def prefilled(pool, params, prefixes, slots, chunk, int8=False):
    """(the pool with the prefixes, (ids, pictures) or None for each shard, in these slots; their lengths)"""
    run, config = programs(int8), model()[0].config
    laid = [laid_out(*(prefix or ([0], [])), config) for prefix in prefixes]
    embeds = run.embed_text(params, np.stack([text for text, _, _ in laid]))
    for i in range(max(len(places) for _, places, _ in laid)):
        tiles = np.zeros((len(prefixes), TILES, config.tile_size, config.tile_size, 3), np.uint8)
        indices = np.full((len(prefixes), POSITIONS), -1, np.int32)
        for lane, (prefix, (_, places, _)) in enumerate(zip(prefixes, laid, strict=True)):
            if i < len(places):
                tiles[lane, : len(prefix[1][i].tiles)], indices[lane] = prefix[1][i].tiles, places[i]
        embeds = run.place_image(params, embeds, tiles.reshape(-1, *tiles.shape[2:]), indices)
    lengths, slots = np.array([at for _, _, at in laid], np.int32), np.array(slots, np.int32)
    pool = run.first(chunk, params, pool, embeds, slots, lengths)
    for start in range(chunk, max(lengths), chunk):
        more = np.where(start < lengths, slots, 1 << 20).astype(np.int32)
        pool = run.next(chunk, params, pool, embeds, more, np.full_like(slots, start), lengths)
    return pool, lengths


def filled(groups, int8=False):
    """A pool that is not empty."""
    empty = device.empty_pool(model()[0].config.text, groups, POSITIONS, np.float32, int8)
    return jax.tree.map(lambda x: x + 3, empty)


def as_numpy(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", [*SIZES])
@pytest.mark.parametrize("chunk", [CHUNK, POSITIONS])
def test_a_prefix_in_a_slot_is_what_prefill_gives(name, chunk):
    """And the other slots, of this shard and of one that has nothing to do, are as they were."""
    llava, params, _ = model()
    ids, pictures = prompt(name)[:-4], images(name)
    assert name != "five tiles" or len(pictures[0].tiles) == TILES
    wanted, _ = llava.engine.prefill(params, pack([ids], pictures, llava.config))
    pool = filled(4)
    before = as_numpy(pool)
    pool, lengths = prefilled(pool, params, [None, (ids, pictures)], [2, 1], chunk)
    assert lengths[1] == wanted.lengths[0]
    for got, old, (expected,) in zip(as_numpy(pool), before, as_numpy(wanted.keys_values), strict=True):
        assert np.array_equal(got[:3], old[:3])
        np.testing.assert_allclose(got[3, :, : lengths[1]], expected[:, : lengths[1]], atol=2e-6)


def test_a_copied_slot():
    pool = device.empty_pool(model()[0].config.text, 6, 8, np.float32, True)
    pool = jax.tree.map(lambda x: (x.T + np.arange(6)).T.astype(x.dtype), pool)
    whole = as_numpy(pool)
    for got, old in zip(as_numpy(programs().read(pool, 2, np.array([2, 1]))), whole, strict=True):
        assert np.array_equal(got, old[[2, 4]])
    pool = programs().copy(pool, 2, np.array([2, 1]), np.array([0, 3]))
    for got, old in zip(as_numpy(pool), whole, strict=True):
        assert np.array_equal(got, old[[2, 1, 2, 3, 4, 5]])


@pytest.mark.long
def test_an_int8_pool():
    """The first chunk is bit for bit what prefill gives; others have seen int8 keys before them."""
    llava, params, engine = model()
    ids, pictures = prompt("five tiles")[:-4], images("five tiles")
    wanted, _ = engine.prefill(params, pack([ids], pictures, llava.config))
    whole, (length,) = prefilled(filled(1, True), params, [(ids, pictures)], [0], POSITIONS, int8=True)
    chunked, _ = prefilled(filled(1, True), params, [(ids, pictures)], [0], CHUNK, int8=True)
    for a, b, expected in zip(*map(as_numpy, (whole, chunked, wanted.keys_values)), strict=True):
        assert np.array_equal(a[:, :, :length], expected[:, :, :length])
        assert np.array_equal(b[:, :, :CHUNK], expected[:, :, :CHUNK])
