"""Any-resolution images by their sizes alone: the canvas, the unpad window, the token count, the gather index.

Sizes are (width, height) throughout, as in the original. Everything is float64 arithmetic in the original's order,
because `int()` of a product decides how many rows survive; every function takes scalars or NumPy arrays.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.config_schema import read_pinpoints

NEWLINE = -1  # in an image's index: the learned `image_newline` row


def _truncate(x) -> np.ndarray:
    return np.trunc(x).astype(np.int64)  # Python's int()


def best_resolution_index(widths, heights, possible_resolutions) -> np.ndarray:
    """Which of the (width, height) pairs suits each size in pixels: an int array of the shape of widths and heights.

    The vectorised `select_best_resolution`: most effective pixels first, then least waste, then the first listed.

    Raises:
        ValueError: a size without pixels.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    if np.any(widths < 1) or np.any(heights < 1):
        raise ValueError(f"image size: {widths.min()} x {heights.min()} pixels; both must be above 0")
    scores = []
    for width, height in possible_resolutions:
        scale = np.minimum(width / widths, height / heights)
        effective = np.minimum(_truncate(widths * scale) * _truncate(heights * scale), widths * heights)
        scores.append((width * height - effective, -effective))
    return np.lexsort(np.stack(scores, axis=1), axis=0)[0]  # by the last of a pair first; stable


def select_best_resolution(original_size: tuple[int, int], possible_resolutions) -> tuple[int, int]:
    """The canvas (width, height) for an image of `original_size` (llava.mm_utils.select_best_resolution)."""
    width, height = possible_resolutions[int(best_resolution_index(*original_size, possible_resolutions))]
    return int(width), int(height)


def fit_on_canvas(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A picture as large as fits on a canvas, centred: its (width, height) there, and its (left, top) corner.

    Source: the arithmetic of llava.mm_utils.resize_and_pad_image.
    """
    scale_w, scale_h = canvas[0] / size[0], canvas[1] / size[1]
    if scale_w < scale_h:
        fitted = canvas[0], min(math.ceil(size[1] * scale_w), canvas[1])
    else:
        fitted = min(math.ceil(size[0] * scale_h), canvas[0]), canvas[1]
    return fitted, ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2)


def get_anyres_image_grid_shape(image_size: tuple[int, int], grid_pinpoints, patch_size: int) -> tuple[int, int]:
    """Tiles across and down, (grid_width, grid_height), of the canvas chosen for `image_size`.

    `grid_pinpoints` is a list of (width, height) or that list as a string; `patch_size` is a tile's side in pixels
    (llava.mm_utils.get_anyres_image_grid_shape).
    """
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def unpad_window(image_size, current_height, current_width, rounded: bool = False):
    """The cells of a padded grid that the picture covers (llava.model.llava_arch.unpad_image).

    Args:
        image_size: (width, height) in pixels, scalars or arrays.
        current_height, current_width: the whole canvas in feature cells.
        rounded: round to 7 digits before truncating, as llava-hf does.

    Returns:
        (top, bottom, left, right) of the slice `grid[top:bottom, left:right]`; it may be empty, and keeps one cell
        more than the exact size where the padding is odd, as in the original.
    """
    width, height = np.asarray(image_size[0], np.int64), np.asarray(image_size[1], np.int64)
    current_height, current_width = np.asarray(current_height), np.asarray(current_width)
    wide = width / height > current_width / current_height
    kept = np.where(wide, height * (current_width / width), width * (current_height / height))
    kept = _truncate(np.round(kept, 7) if rounded else kept)
    padding = (np.where(wide, current_height, current_width) - kept) // 2
    top, left = np.where(wide, padding, 0), np.where(wide, 0, padding)
    return top, current_height - top, left, current_width - left


def pinpoints(config: LlavaConfig) -> tuple[tuple[int, int], ...]:
    """The config's canvases as (width, height); llava-hf reads the same pairs as (height, width)."""
    if config.reading == "llava-hf":
        return tuple((w, h) for h, w in config.image_grid_pinpoints)
    return config.image_grid_pinpoints


def _grid(widths, heights, config: LlavaConfig):
    """(tiles down, tiles across) of each size's canvas."""
    choices = np.asarray(pinpoints(config)) // config.vision.image_size
    across, down = choices[best_resolution_index(widths, heights, pinpoints(config))].T
    return down.T, across.T


def num_image_tokens(widths, heights, config: LlavaConfig) -> np.ndarray:
    """How many positions an image takes in the sequence: an int array of the shape of widths and heights, in pixels."""
    shape = np.broadcast(np.asarray(widths), np.asarray(heights)).shape
    if config.image_aspect_ratio != "anyres":
        return np.full(shape, config.tokens_per_tile)
    down, across = _grid(widths, heights, config)
    if not config.has_image_newline:
        return config.tokens_per_tile * (1 + down * across)
    side = config.vision.num_patches_per_side
    rounded = config.reading == "llava-hf"
    top, bottom, left, right = unpad_window((widths, heights), down * side, across * side, rounded)
    return config.tokens_per_tile + (bottom - top) * (right - left + 1)


@functools.lru_cache(maxsize=4096)
def image_length(width: int, height: int, config: LlavaConfig) -> int:
    """`num_image_tokens` of one image, kept, since each of its questions asks."""
    return int(num_image_tokens(width, height, config))


def num_tiles(image_size: tuple[int, int], config: LlavaConfig) -> int:
    """How many tiles `process_images` makes of an image of `image_size` (width, height)."""
    if config.image_aspect_ratio != "anyres":
        return 1
    down, across = _grid(*image_size, config)
    return 1 + int(down * across)


def image_index(image_size: tuple[int, int], config: LlavaConfig) -> np.ndarray:
    """Which feature stands at each of an image's positions: the merge of `prepare_inputs_labels_for_multimodal`.

    int32 [n], n = `num_image_tokens`: `tile * tokens_per_tile + patch`, or NEWLINE.
    """
    per_tile = config.tokens_per_tile
    if config.image_aspect_ratio != "anyres" or config.mm_patch_merge_type == "flat":
        return np.arange(num_tiles(image_size, config) * per_tile, dtype=np.int32)
    down, across = (int(n) for n in _grid(*image_size, config))
    side = config.vision.num_patches_per_side
    cells: np.ndarray = per_tile + np.arange(down * across * per_tile).reshape(down, across, side, side)
    cells = cells.transpose(0, 2, 1, 3).reshape(down * side, across * side)
    if config.has_image_newline:
        rounded = config.reading == "llava-hf"
        top, bottom, left, right = unpad_window(image_size, down * side, across * side, rounded)
        cells = np.pad(cells[top:bottom, left:right], ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([np.arange(per_tile), cells.ravel()]).astype(np.int32)
