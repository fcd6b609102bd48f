"""What a picture becomes, drawn: its tiles, its tokens in their order, attention on its pixels, sheets of answers.

Needs no JAX. Drawing needs matplotlib (`pip install "llava-jax[plot]"`), except for the sheet, which Pillow draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_jax.config import LlavaConfig
from llava_jax.inputs.anyres import NEWLINE, fit_on_canvas, get_anyres_image_grid_shape, image_index, pinpoints
from llava_jax.inputs.image import load_image, process_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

BASE_COLOR, GRID_COLOR = "#d55e00", "#0072b2"
DRAWN = 1000  # larger pictures are drawn with their longer side reduced to so many pixels
NUMBERED = 200  # more cells than that have no room for their numbers
PANELS = 4  # of attention, beside each other
SHEET_WIDTH, SHEET_MARGIN, SHEET_LINE = 380, 20, 19
SHEET_COLORS = {None: (24, 70, 140), True: (24, 120, 60), False: (190, 40, 40)}
SHEET_TEXT = (40, 42, 54)


# ---- where each token looks from


class ImageTokens(NamedTuple):
    """For each position that a picture takes in the sequence, what stands there."""

    tile: np.ndarray  # int [n], 0 for the first tile, 1, 2, … for the grid's; -1 for image_newline
    patch: np.ndarray  # int [n], row by row in the tile; -1 for the class token and image_newline
    rectangles: np.ndarray  # float64 [n, 4], x0, y0, x1, y1 in the picture's pixels; NaN where none of it is seen


def tile_rectangles(size: tuple[int, int], config: LlavaConfig) -> np.ndarray:
    """Which part of a picture of this (width, height) each of its tiles shows: the inverse of `process_images`.

    float64 [T, 4], x0, y0, x1, y1 in the picture's pixels; where a tile has padding, they lie outside of it.
    """
    (width, height), side = size, config.tile_size
    if config.image_aspect_ratio == "pad":
        longest = max(size)
        left, top = (longest - width) // 2, (longest - height) // 2
        return np.array([[-left, -top, longest - left, longest - top]], np.float64)
    if config.image_aspect_ratio == "square":
        longest = int(side * max(size) / min(size))
        resized = (side, longest) if width <= height else (longest, side)
        corner = np.array([(resized[0] - side) // 2, (resized[1] - side) // 2])
        return (np.array([*corner, *(corner + side)]) * np.tile(np.divide(size, resized), 2))[None]
    across, down = get_anyres_image_grid_shape(size, pinpoints(config), side)
    fitted, offset = fit_on_canvas(size, (across * side, down * side))
    corners = np.array([(x, y) for y in range(0, down * side, side) for x in range(0, across * side, side)])
    scale = np.divide(size, fitted)
    grid = np.concatenate([(corners - offset) * scale, (corners + side - offset) * scale], axis=1)
    return np.concatenate([[[0, 0, width, height]], grid]).astype(np.float64)


def image_tokens(size: tuple[int, int], config: LlavaConfig) -> ImageTokens:
    """Which tile, patch and rectangle of a picture of this (width, height) each of its positions in the sequence sees.

    The first tile sees the whole picture, squeezed; the grid's tiles see it again, in larger. A class token sees its
    tile. Rectangles are cut off at the picture's edge: what lies in the padding sees nothing of it.
    """
    index = image_index(size, config)
    newline = index == NEWLINE
    tile = np.where(newline, -1, index // config.tokens_per_tile)
    patch = np.where(newline, -1, index % config.tokens_per_tile - (config.tokens_per_tile - config.vision.num_patches))
    side, share = config.vision.num_patches_per_side, config.vision.patch_size / config.vision.image_size
    row, column = patch // side, patch % side
    parts = np.stack([column, row, column + 1, row + 1], axis=1) * share
    parts[patch < 0] = 0, 0, 1, 1
    views = tile_rectangles(size, config)[tile]
    corner, extent = np.tile(views[:, :2], 2), np.tile(views[:, 2:] - views[:, :2], 2)
    rectangles = np.clip(corner + parts * extent, 0, np.tile(size, 2))
    seen = (rectangles[:, 2:] > rectangles[:, :2]).all(1) & ~newline
    return ImageTokens(tile, patch, np.where(seen[:, None], rectangles, np.nan))


def pixel_map(weights: np.ndarray, size: tuple[int, int], config: LlavaConfig) -> np.ndarray:
    """Weights [n] of the positions of a picture of this (width, height), spread over the pixels that each sees.

    Returns:
        float32 [height, width]. It sums to the weights of the positions that see a part of the picture.

    Raises:
        ValueError: there are more or fewer weights than positions.
    """
    return _spread(weights, image_tokens(size, config), size, size)


def _spread(weights, tokens: ImageTokens, size, drawn) -> np.ndarray:
    """`pixel_map` on a picture that is drawn with another size than its own."""
    if (shape := np.shape(weights)) != tokens.tile.shape:
        raise ValueError(f"weights: got shape {shape} for the {len(tokens.tile)} positions of a {size} picture")
    scaled = tokens.rectangles * np.tile(np.divide(drawn, size), 2)
    out = np.zeros((drawn[1], drawn[0]), np.float32)
    for weight, rectangle in zip(weights, scaled, strict=True):
        if not np.isnan(rectangle[0]):
            left, top, right, bottom = np.round(rectangle).astype(int)
            left, top = min(left, drawn[0] - 1), min(top, drawn[1] - 1)  # at least one pixel, however narrow
            right, bottom = max(right, left + 1), max(bottom, top + 1)
            out[top:bottom, left:right] += weight / ((right - left) * (bottom - top))
    return out


# ---- matplotlib


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "llava-jax[plot]"') from error
    return Figure((width, height), dpi=100, layout="constrained")


def _reduced(image: Image.Image) -> Image.Image:
    """The picture, not larger than it is drawn."""
    small = image.copy()
    small.thumbnail((DRAWN, DRAWN))
    return small


def _show(axes: Axes, image, title: str, extent: tuple[float, float, float, float] | None = None) -> None:
    """A picture without ticks; `extent` (left, right, bottom, top) gives its coordinates."""
    axes.imshow(image, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, parse_math=False)  # a word may have dollar signs


def _outline(axes: Axes, rectangle, color: str, **style) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = rectangle
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, edgecolor=color, clip_on=False, **style))


def draw_tiles(image, config: LlavaConfig) -> Figure:
    """The borders of a picture's tiles over it (in any form), and each tile as the model sees it."""
    picture = load_image(image)
    (tiles,) = process_images([picture], config)
    views = tile_rectangles(picture.size, config)
    anyres = len(views) > 1
    grid, color = (views[1:], GRID_COLOR) if anyres else (views, BASE_COLOR)
    across = len(np.unique(grid[:, 0]))
    ratio = min(max(across**2 / len(grid), 0.7), 2)
    figure = _new_figure(9.6, min(9.6 / (2 * ratio + 1), 3.2) + 0.5)
    axes = figure.subplots(1, 3 if anyres else 2, width_ratios=[ratio, 1, ratio][: 2 + anyres])
    _borders(axes[0], picture, grid, 1 if anyres else 0, color, "black" if anyres else config.vision.image_mean)
    _side_by_side(axes[1], tiles[:1], 1, BASE_COLOR)
    axes[1].set_title("tile 0, the whole picture" if anyres else f"the tile, {config.image_aspect_ratio}", fontsize=9)
    if anyres:
        _side_by_side(axes[2], tiles[1:], across, GRID_COLOR)
        axes[2].set_title(f"tiles 1 to {len(grid)}", fontsize=9)
    return figure


def _borders(axes: Axes, picture: Image.Image, grid: np.ndarray, first: int, color: str, padding) -> None:
    """The picture and the padding around it, with the borders of its tiles, numbered from `first`."""
    width, height = picture.size
    (x0, y0), (x1, y1) = grid[:, :2].min(0), grid[:, 2:].max(0)
    _outline(axes, (x0, y0, x1, y1), "none", facecolor=padding, zorder=-1)
    _show(axes, _reduced(picture), f"the picture, {width} x {height}, and its tiles", (0, width, height, 0))
    for number, view in enumerate(grid, first):
        _outline(axes, view, color, facecolor="none", linewidth=2)
        badge = dict(boxstyle="square", facecolor=color, linewidth=0)
        axes.text(view[0], view[1], str(number), color="white", ha="left", va="top", fontsize=8, bbox=badge)
    axes.set(xlim=(min(x0, 0), max(x1, width)), ylim=(max(y1, height), min(y0, 0)), frame_on=False)


def _side_by_side(axes: Axes, tiles: np.ndarray, across: int, color: str) -> None:
    """Tiles row by row with gaps between them."""
    side = tiles.shape[1]
    step = 1.06 * side
    for number, tile in enumerate(tiles):
        x, y = number % across * step, number // across * step
        _show(axes, tile, "", (x, x + side, y + side, y))
        _outline(axes, (x, y, x + side, y + side), color, facecolor="none", linewidth=2)
    axes.set(xlim=(0, across * step), ylim=(len(tiles) // across * step, 0), frame_on=False)


def draw_token_grid(image, config: LlavaConfig) -> Figure:
    """Every position that a picture takes in the sequence, over the part of the picture that it sees.

    Colours follow the order in the sequence, and numbers where there is room; the newlines stand at the ends of their
    rows. The first tile and the grid are drawn apart, for both see all of the picture.
    """
    picture = load_image(image)
    (width, height), tokens = picture.size, image_tokens(picture.size, config)
    gray = np.asarray(_reduced(picture).convert("L").convert("RGB"))
    parts = [np.flatnonzero(tokens.tile == 0), np.flatnonzero(tokens.tile != 0)]
    parts = [part for part in parts if len(part)]
    figure = _new_figure(4.8 * len(parts), min(max(4 * height / width, 2), 5) + 0.4)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(0, max(1, len(tokens.tile) - 1)), "viridis")  # of a position
    for number, (axes, part) in enumerate(zip(np.ravel(figure.subplots(1, len(parts))), parts, strict=True)):
        name = "the grid" if number else "the first tile"
        _show(axes, gray, f"{name}: positions {part[0]} to {part[-1]}", (0, width, height, 0))
        _cells(axes, tokens, part, width, colors)
        axes.set_frame_on(False)
    bar = figure.colorbar(colors, ax=list(figure.axes), pad=0.02)
    bar.set_label("position in the picture's part of the sequence", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _cells(axes: Axes, tokens: ImageTokens, part: np.ndarray, width: int, colors: ScalarMappable) -> None:
    """The positions of one part as coloured cells; a newline is a narrow cell beside the end of its row."""
    from matplotlib.patheffects import withStroke

    beside, edge = 0.07 * width, [withStroke(linewidth=1.5, foreground="black")]  # round a number
    for position in part:
        newline = tokens.tile[position] < 0
        if not newline and tokens.patch[position] < 0:
            continue  # a class token
        rectangle = tokens.rectangles[position]
        if newline and tokens.tile[position - 1] > 0:  # else the padding took the whole row
            _, y0, _, y1 = tokens.rectangles[position - 1]
            rectangle = width + 0.3 * beside, y0, width + 1.3 * beside, y1
        if np.isnan(rectangle).any():
            continue  # all of it is padding
        color = colors.to_rgba(position, alpha=1 if newline else 0.5)
        _outline(axes, rectangle, "white", facecolor=color, linewidth=0.5)
        if len(part) <= NUMBERED:
            middle = (rectangle[0] + rectangle[2]) / 2, (rectangle[1] + rectangle[3]) / 2
            axes.text(*middle, str(position), fontsize=7, color="white", ha="center", va="center", path_effects=edge)
    axes.set_xlim(0, width + 1.5 * beside)


def draw_attention(image, config: LlavaConfig, weights: np.ndarray, words: Sequence[str]) -> Figure:
    """Where each word looks on the picture (in any form): a panel a word, bright where it looks.

    All panels have one scale. In half of them the brightest place reaches the full light of the picture.

    Args:
        weights: float [words, n], n the picture's positions: `looks.weights[layer].mean(0)[:, looks.pictures[0]]`, say.
        words: their titles; each has the sum of its weights beside it.

    Raises:
        ValueError: weights of another shape.
    """
    picture = load_image(image)
    if len(weights) != len(words) or not len(words):
        raise ValueError(f"weights: got {len(weights)} rows for {len(words)} words; give one for each, at least one")
    tokens, small = image_tokens(picture.size, config), _reduced(picture)
    maps = [_spread(row, tokens, picture.size, small.size) for row in weights]
    full = float(np.median([heat.max() for heat in maps])) or 1.0
    pixels = np.asarray(small, np.float32) / 255
    panels = [(pixels, "the picture")]
    for heat, row, word in zip(maps, weights, words, strict=True):
        light = np.sqrt(np.minimum(heat / full, 1))[..., None]  # the root, so that small weights can be seen
        panels.append((pixels * (0.2 + 0.8 * light), f"{word.strip()}  {np.sum(row):.0%}"))
    rows = -(-len(panels) // PANELS)
    tall = min(max(small.height / small.width, 0.3), 2)
    figure = _new_figure(9.6, rows * (9.6 / PANELS * tall + 0.3))
    axes = np.ravel(figure.subplots(rows, PANELS))
    for each in axes:
        each.set_axis_off()
    for each, (panel, title) in zip(axes, panels, strict=False):
        _show(each, panel, title)
    return figure


# ---- a sheet


def draw_answers(
    shown: Sequence[tuple[object, Sequence[tuple[str, str, bool | None]]]], columns: int = 3, width: int = SHEET_WIDTH
) -> Image.Image:
    """Pictures in columns, each with its questions and answers under it: an RGB picture.

    Args:
        shown: (picture in any form, its (question, answer, right) triples); `right` makes the answer green or red,
            None leaves it blue.
        width: of a column in pixels; wider pictures are reduced.

    Raises:
        ValueError: there is nothing to show.
    """
    if not shown:
        raise ValueError("shown: there are no pictures to draw")
    cells = [_cell(load_image(image), answered, width) for image, answered in shown]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    margin = SHEET_MARGIN
    across = min(columns, len(cells)) * (width + margin) + margin
    sheet = Image.new("RGB", (across, sum(heights) + margin * (len(rows) + 1)), "white")
    for i, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (margin + column * (width + margin), sum(heights[:i]) + margin * (i + 1)))
    return sheet


def _cell(image: Image.Image, answered, width: int) -> Image.Image:
    """One picture, and under it the questions with their answers."""
    font = ImageFont.load_default(14)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    lines = []
    for question, answer, right in answered:
        lines += [(text, SHEET_TEXT) for text in _wrapped(question, font, width)]
        lines += [(text, SHEET_COLORS[right]) for text in _wrapped(answer, font, width)]
    cell = Image.new("RGB", (width, image.height + 8 + SHEET_LINE * len(lines)), "white")
    cell.paste(image, (0, 0))
    pen = ImageDraw.Draw(cell)
    for i, (text, color) in enumerate(lines):
        pen.text((0, image.height + 8 + SHEET_LINE * i), text, fill=color, font=font)
    return cell


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines that fit a column."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
