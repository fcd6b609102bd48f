"""What each patch of a tile shows: the labels from which the tower learns to see, before it meets a decoder."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IGNORE_INDEX
from llava_jax.demo.scenes import CHARACTERS, COLORS, SHAPES, SIGN, Scene, draw
from llava_jax.inputs.anyres import fit_on_canvas, pinpoints, select_best_resolution
from llava_jax.inputs.image import process_images

KINDS = ("", *SHAPES, SIGN)
HUES = ("", *COLORS)
CLEAR, HIDDEN = 0.25, 0.06  # the share of a patch above which an item is its subject, and under which it is not there


class Truths(NamedTuple):
    """For each tile and patch a class number, -100 where it is not clear; and where its subject is."""

    kind: np.ndarray  # int32 [T, N], of the item that covers most of the patch; of KINDS
    color: np.ndarray  # int32 [T, N], of HUES
    middle_kind: np.ndarray  # int32 [T, N], of the item whose middle lies in the patch
    middle_color: np.ndarray  # int32 [T, N]
    character: np.ndarray  # int32 [T, N], whose middle lies in the patch: 0, or 1 + its place in CHARACTERS
    turn: np.ndarray  # int32 [T, N], 1 or 2 where that is a sign's first or second, -100 where the tile lacks the first
    offset: np.ndarray  # float32 [T, N, 2], in patches, to the middle of the subject; 0 where there is none
    place: np.ndarray  # float32 [T, N, 2], of that middle in the tile, from -1 to 1


CLASSES = {
    "kind": len(KINDS),
    "color": len(HUES),
    "middle_kind": len(KINDS),
    "middle_color": len(HUES),
    "character": len(CHARACTERS) + 1,
    "turn": 3,
}


def seen_tiles(scene: Scene, config: LlavaConfig) -> np.ndarray:
    """The tiles [T, S, S, 3] of a scene under anyres, and last the one that `image_aspect_ratio="pad"` makes of it."""
    image = draw(scene)
    return np.concatenate(
        [process_images([image], config.replace(image_aspect_ratio=ratio))[0] for ratio in ("anyres", "pad")]
    )


def tile_views(size: tuple[int, int], config: LlavaConfig) -> list[tuple[float, float, float, float]]:
    """(scale x, scale y, shift x, shift y) from a picture of `size` to each of its `seen_tiles`."""
    (width, height), side = size, config.tile_size
    base = (side / width, side / height, 0.0, 0.0)
    across, down = select_best_resolution(size, pinpoints(config))
    fitted, (left, top) = fit_on_canvas(size, (across, down))
    scales = fitted[0] / width, fitted[1] / height
    grid = [(*scales, left - x, top - y) for y in range(0, down, side) for x in range(0, across, side)]
    longest = max(size)
    shrunk = side / longest
    padded = (shrunk, shrunk, (longest - width) // 2 * shrunk, (longest - height) // 2 * shrunk)
    return [base, *grid, padded]


def patch_truths(scene: Scene, config: LlavaConfig) -> Truths:
    """The labels of a scene's `seen_tiles`."""
    views = tile_views((scene.width, scene.height), config)
    return Truths(*map(np.stack, zip(*(_of_view(scene, view, config) for view in views), strict=True)))


def _of_view(scene: Scene, view, config: LlavaConfig) -> Truths:
    patch, side = config.vision.patch_size, config.vision.num_patches_per_side
    scale, shift = np.array(view[:2]), np.array(view[2:])
    middles = np.array([(item.x, item.y) for item in scene.items]) * scale + shift  # [I, 2] in the tile's pixels
    halves = np.array([(item.width, item.height) for item in scene.items]) * scale / 2
    corner = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 1, 2) * patch  # [N, 1, 2]
    overlap = np.minimum(middles + halves, corner + patch) - np.maximum(middles - halves, corner)
    share = np.prod(np.maximum(overlap, 0), axis=-1) / patch**2  # [N, I]
    # In a squeezed tile an item may be smaller than a patch: then what counts is how much of the item is there.
    share /= np.minimum(1, np.prod(2 * halves, axis=-1) / patch**2)
    best, most = share.argmax(1), share.max(1)
    kinds = np.array([KINDS.index(item.kind) for item in scene.items])
    hues = np.array([HUES.index(item.color) for item in scene.items])

    def subject(classes):
        return np.where(most >= CLEAR, classes[best], np.where(most < HIDDEN, 0, IGNORE_INDEX)).astype(np.int32)

    written, classes, turns = _characters(scene, scale, shift, corner, patch)
    seen = (turns == 1) | np.roll(written.any(0), 1)  # the first is a second one's neighbour in the list
    inside = np.all((middles >= corner) & (middles < corner + patch), axis=-1)  # [N, I]
    offset = np.clip((middles[best] - corner[:, 0] - patch / 2) / patch, -2, 2) * (most >= CLEAR)[:, None]
    place = (corner[:, 0] / patch + 0.5 + offset) * (2 / side) - 1
    return Truths(
        kind=subject(kinds),
        color=subject(hues),
        middle_kind=_inside(inside, kinds),
        middle_color=_inside(inside, hues),
        character=_inside(written, classes),
        turn=_inside(written, np.where(seen, turns, IGNORE_INDEX)),
        offset=offset.astype(np.float32),
        place=place.astype(np.float32),
    )


def _characters(scene: Scene, scale, shift, corner, patch: int):
    """(which characters' middles lie in which patch [N, C], their classes [C], which of its sign each is [C])."""
    shown = [shown for item in scene.items for shown in item.characters()]
    turns = np.array([turn for item in scene.items for turn, _ in enumerate(item.characters(), 1)], int)
    at = np.array([(x, y) for _, x, y in shown]).reshape(-1, 2) * scale + shift
    classes = np.array([CHARACTERS.index(character) + 1 for character, _, _ in shown], int)
    return np.all((at >= corner) & (at < corner + patch), axis=-1), classes, turns


def _inside(inside: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class of the one thing in each patch, 0 for none, -100 for several."""
    count = inside.sum(1)
    return np.where(count > 1, IGNORE_INDEX, inside @ classes).astype(np.int32)
