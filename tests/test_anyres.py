"""Sizes alone, against tables made by the reference's own functions (golden/record.py)."""

import ast
import hashlib

import numpy as np
import pytest
from golden import checkpoints

from llava_jax.config import LlavaConfig
from llava_jax.inputs.anyres import (
    get_anyres_image_grid_shape,
    image_index,
    num_image_tokens,
    num_tiles,
    select_best_resolution,
    unpad_window,
)

TILE = {"published": (336, 24), "string384": (384, 27), "nine": (336, 24)}
PUBLISHED = LlavaConfig.preset("1.6-vicuna-7b")


@pytest.fixture(scope="module")
def tables(golden):
    return golden("tables")


@pytest.mark.parametrize("grid", TILE)
def test_best_resolution_and_grid(tables, grid):
    pinpoints = str(tables[f"{grid}/pinpoints"])
    if grid != "string384":  # the reference takes the string as it stands
        pinpoints = ast.literal_eval(pinpoints)
    pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    sizes = tables["sizes"].tolist()
    best = [select_best_resolution(size, pairs) for size in sizes]
    grids = [get_anyres_image_grid_shape(size, pinpoints, TILE[grid][0]) for size in sizes]
    np.testing.assert_array_equal(best, tables[f"{grid}/best"])
    np.testing.assert_array_equal(grids, tables[f"{grid}/grid"])


@pytest.mark.parametrize("grid", TILE)
def test_unpad_window(tables, grid):
    side = TILE[grid][1]
    across, down = tables[f"{grid}/grid"].astype(int).T * side
    ours = np.stack(unpad_window(tables["sizes"].astype(int).T, down, across), axis=-1)
    theirs = tables[f"{grid}/window"]
    extent = theirs[:, 1::2] - theirs[:, ::2]
    kept = extent.min(1) > 0  # where an empty slice stands is nowhere to be seen
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(ours[kept], theirs[kept])
    np.testing.assert_array_equal(ours[:, 1::2] - ours[:, ::2], extent)


def test_unpad_window_of_one_size():
    assert tuple(map(int, unpad_window((2000, 50), 24, 72))) == (11, 13, 0, 72)  # int(1.8) is 1, two rows survive
    assert tuple(map(int, unpad_window((4000, 20), 24, 72))) == (12, 12, 0, 72)  # none survives


def test_token_count_of_every_size(golden):
    """1x1 to 1600x1600 under the published pinpoints."""
    recorded, sides = golden("counts"), np.arange(1, 1601)
    counts = num_image_tokens(sides[:, None], sides[None, :], PUBLISHED).astype(np.int32)
    assert counts.shape == (1600, 1600)
    wrong = [np.flatnonzero(counts.sum(i) != recorded[k]) + 1 for i, k in ((1, "width_sums"), (0, "height_sums"))]
    assert not wrong[0].size and not wrong[1].size, f"differs at widths {wrong[0][:9]}, heights {wrong[1][:9]}"
    assert hashlib.sha256(np.ascontiguousarray(counts).tobytes()).hexdigest() == str(recorded["sha256"])


@pytest.mark.parametrize("variant", ["vicuna", "mistral", "llava15", "s2", "clspatch", "spatial"])
def test_index_agrees_with_recorded_counts(golden, variant):
    """The index has one entry for each merged position that the reference made, and names every kept cell once."""
    source = checkpoints.llava_config(variant, "tower")
    vision = {**checkpoints.VISION, "model_type": "clip_vision_model"}
    config, recorded = LlavaConfig.from_hf(source, vision), golden(variant)
    names = [key.split("/")[1] for key in recorded if key.endswith("/merged/shape")]
    assert names
    for name in names:
        size = tuple(golden("tiles")[f"{name}/size"].tolist())
        index = image_index(size, config)
        assert len(index) == recorded[f"image/{name}/merged/shape"][0] == num_image_tokens(*size, config), name
        cells = index[index >= 0]
        assert len(set(cells.tolist())) == len(cells), name
        tiles = 1 if config.s2 else recorded[f"image/{name}/selected/shape"][0]
        assert num_tiles(size, config) == tiles, name
        assert cells.max() < tiles * config.tokens_per_tile, name
