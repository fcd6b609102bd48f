"""Pictures in, uint8 tiles out, with Pillow alone: what the original does, up to rescale and normalise."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from llava_jax.config import LlavaConfig
from llava_jax.errors import reason_of
from llava_jax.inputs.anyres import fit_on_canvas, pinpoints, select_best_resolution
from llava_jax.inputs.resample import Axis, resample
from llava_jax.inputs.sources import open_source, source_name, stands_alone
from llava_jax.inputs.types import ProcessedImage

MAX_PIXELS = 178_956_970  # of a file, before it is decoded: Pillow's own limit
LONGEST_SIDE = 2**17  # pixels; resizing makes up to a tile's side times as many
LARGE_PIXELS = 2**24  # pixels, 64 MiB

# What Pillow remarks about a file is an error below or no matter. For the whole process: pictures are opened in several
# threads, and `warnings.catch_warnings` would change the filters of all of them. A caller's own filter comes first.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
logging.getLogger("PIL").addHandler(logging.NullHandler())


def load_image(source, exif: bool = True, rgb: bool = True) -> Image.Image:
    """One picture as RGB, as the original's `.convert("RGB")` gives it (an animation's first frame).

    Args:
        source: a path, a URL (http, https, file, gs), a data URI, the bytes of a file, a PIL image, or a uint8 array
            [H, W], [H, W, 3] or [H, W, 4].
        exif: turn a file upright by its EXIF orientation. The original ignores it, so evaluation passes False.
        rgb: False leaves a file, or a PIL image, in its own mode, as some of the original's programs do.

    Raises:
        FileNotFoundError: no such file, or one that cannot be read.
        ValueError: not a picture, a damaged one, one of more than `MAX_PIXELS`, a URL that could not be fetched (see
            `fetch.MAX_BYTES` and `MAX_SECONDS`), or an array of another type or shape; the message names it.
    """
    if isinstance(source, str | os.PathLike | bytes | bytearray):
        with _opened(source) as image:
            as_shown = upright(image) if exif else image
            return as_shown.convert("RGB") if rgb else as_shown.copy()
    if isinstance(source, Image.Image):
        with _faults_of("image: a PIL image"):
            _check_size(source.size, most=None)
            return source.convert("RGB") if rgb else source.copy()
    array = np.asarray(source)
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        forms = "a path, URL, data URI, bytes, PIL image or uint8 array [H, W], [H, W, 3] or [H, W, 4]"
        got = f"{type(source).__name__} of dtype {array.dtype} and shape {array.shape}"
        raise ValueError(f"image: expected {forms}; got {got}")
    return Image.fromarray(array).convert("RGB")


def image_size(source) -> tuple[int, int]:
    """(width, height) of a picture's file (a path, URL, data URI or bytes); of a path, only the beginning is read.

    Raises:
        FileNotFoundError, ValueError: as `load_image`.
    """
    with _opened(source) as image:
        return image.size


def image_source(name: str, folder: str) -> str:
    """What `load_image` takes for a picture that a question or a training sample names, relative to a folder (local or
    gs://) unless by an absolute path, a URL or a data URI.

    Raises:
        ValueError: a relative name that leads out of the folder.
    """
    if stands_alone(name):
        return name
    if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{source_name(name)} leads out of the image folder {folder!r}; name it by its absolute path")
    return os.path.join(folder, name)


@contextlib.contextmanager
def _opened(source) -> Iterator[Image.Image]:
    with open_source(source) as file, open_picture(file, source_name(source), MAX_PIXELS) as image:
        yield image


@contextlib.contextmanager
def open_picture(
    file: IO[bytes], name: str, max_pixels: int, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Pillow's image of an open file, decoded only within.

    Args:
        name: what errors call it.
        max_pixels: more are refused before they are decoded.
        formats: those that may be tried, as Pillow names them; None for all.

    Raises:
        ValueError: whatever is wrong with the picture, within the block too.
    """
    with _faults_of(name, formats), Image.open(file, formats=formats) as image:
        _check_size(image.size, max_pixels)
        yield image


@contextlib.contextmanager
def _faults_of(name: str, formats: tuple[str, ...] | None = None) -> Iterator[None]:
    """Whatever Pillow and its decoders raise is the picture's fault: one ValueError that names it."""
    try:
        yield
    except Image.UnidentifiedImageError:
        kinds = f" as {', '.join(formats)}" if formats else ""
        raise ValueError(f"{name} is not a picture that Pillow can read{kinds}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {str(error).partition(', could be')[0]}") from None
    except Exception as error:  # NotImplementedError, RuntimeError, struct.error, KeyError, MemoryError … by the format
        raise ValueError(f"{name} is damaged: {reason_of(error)}") from error


def _check_size(size: tuple[int, int], most: int | None) -> None:
    width, height = size
    if not width * height:
        raise ValueError(f"it is {width}x{height} pixels")
    if most is not None and width * height > most:
        raise Image.DecompressionBombError(f"Image size ({width}x{height} pixels) exceeds limit of {most} pixels")


def upright(image: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation; as it stands where its EXIF cannot be read, as in any viewer."""
    image.load()  # what is wrong with the pixels themselves is to be raised
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # struct.error, SyntaxError, … by what is damaged in it
        return image


def as_image_list(images) -> list:
    """None, one picture, or a list of pictures, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at (width, height): bicubic, but for palettes and bilevel pictures, whose pixels are picked.

    Pillow below 13 resizes across before it resizes down, and so LLaVA was trained; 13 chooses by the picture. Two
    calls are the old order in any Pillow, to the bit.
    """
    premultiplied = {"LA": "La", "RGBA": "RGBa"}.get(image.mode)
    if premultiplied and image.size != size:  # once around both steps, as Pillow has it
        return resize(image.convert(premultiplied), size).convert(image.mode)
    across = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return across.resize(size, Image.Resampling.BICUBIC)


def resize_and_pad_image(image: Image.Image, target_resolution) -> Image.Image:
    """The picture as large as fits into (width, height), centred on black (llava.mm_utils.resize_and_pad_image)."""
    size, corner = fit_on_canvas(image.size, target_resolution)
    canvas = Image.new("RGB", target_resolution, (0, 0, 0))
    canvas.paste(resize(image, size), corner)
    return canvas


def expand2square(image: Image.Image, background_color) -> Image.Image:
    """The picture centred on a square of `background_color` (llava.mm_utils.expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _is_wasteful(image: Image.Image, made: int) -> bool:
    """Whether making that many pixels takes far more memory than the picture does.

    Then `resample` makes only the pixels that are kept, though five times slower for each pixel that it reads.
    """
    return made > max(LARGE_PIXELS, 2 * image.width * image.height)


def _pad(image: Image.Image, side: int, background: tuple[int, ...]) -> Image.Image:
    """`expand2square`, and the square at `side`."""
    longest = max(image.size)
    if not _is_wasteful(image, longest**2):
        return resize(expand2square(image, background), (side, side))
    across, down = (Axis(longest, (longest - pixels) // 2, pixels, side, range(side)) for pixels in image.size)
    return Image.fromarray(resample(np.asarray(image), across, down, background))


def _shortest_edge_and_crop(image: Image.Image, side: int) -> Image.Image:
    """Shortest edge to `side`, then the centre (CLIPImageProcessor's resize and centre crop)."""
    longest = int(side * max(image.size) / min(image.size))
    size = (side, longest) if image.width <= image.height else (longest, side)
    left, top = ((pixels - side) // 2 for pixels in size)
    if not _is_wasteful(image, size[0] * size[1]):
        return resize(image, size).crop((left, top, left + side, top + side))
    across = Axis(image.width, 0, image.width, size[0], range(left, left + side))
    down = Axis(image.height, 0, image.height, size[1], range(top, top + side))
    return Image.fromarray(resample(np.asarray(image), across, down, 0))


def _anyres_tiles(image: Image.Image, config: LlavaConfig) -> list[Image.Image]:
    """The whole picture squeezed into one tile, then the canvas tile by tile, row by row (process_anyres_image)."""
    side = config.tile_size
    canvas = resize_and_pad_image(image, select_best_resolution(image.size, pinpoints(config)))
    corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return [resize(image, (side, side))] + [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def process_images(images, config: LlavaConfig) -> list[np.ndarray]:
    """PIL images to tiles, by `config.image_aspect_ratio` (llava.mm_utils.process_images before normalising).

    Tiles of other modes than RGB are converted at the end, as in the original: a palette is then resized without
    smoothing, and transparent pixels weigh nothing.

    Returns:
        one uint8 [T, S, S, 3] for each image: anyres has the whole picture first, then the grid row by row;
        pad and square have T = 1; with S2, S is the largest scale.

    Raises:
        ValueError: a picture without pixels, or one with a side above `LONGEST_SIDE`.
    """
    mean_color = tuple(int(m * 255) for m in config.vision.image_mean)
    out = []
    for image in images:
        if not 0 < min(image.size) <= max(image.size) <= LONGEST_SIDE:
            width, height = image.size
            raise ValueError(f"image: {width} x {height} pixels; sides must be from 1 to {LONGEST_SIDE}")
        if config.image_aspect_ratio == "anyres":
            tiles = _anyres_tiles(image, config)
        elif config.image_aspect_ratio == "pad":
            tiles = [_pad(image.convert("RGB"), config.tile_size, mean_color)]
        else:
            tiles = [_shortest_edge_and_crop(image.convert("RGB"), config.tile_size)]
        out.append(np.stack([np.asarray(tile.convert("RGB")) for tile in tiles]))
    return out


def process_image(source, config: LlavaConfig) -> ProcessedImage:
    """A picture in any form, a `ProcessedImage` as it is.

    Raises:
        FileNotFoundError, ValueError: as `load_image` and `process_images`.
    """
    if isinstance(source, ProcessedImage):
        return source
    picture = load_image(source)
    (tiles,) = process_images([picture], config)
    return ProcessedImage(tiles, picture.size)
