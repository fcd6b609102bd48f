"""Pictures in, uint8 tiles out, with Pillow alone: what the original does, up to rescale and normalise."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from llava_jax.config import LlavaConfig
from llava_jax.inputs.anyres import fit_on_canvas, pinpoints, select_best_resolution


def load_image(source, exif: bool = True, rgb: bool = True) -> Image.Image:
    """One picture as RGB, as the original's `.convert("RGB")` gives it (an animation's first frame).

    Args:
        source: a path, an http(s) or gs:// URL, the bytes of a file, a PIL image, or a uint8 array [H, W], [H, W, 3]
            or [H, W, 4].
        exif: turn a file upright by its EXIF orientation. The original ignores it, so evaluation passes False.
        rgb: False leaves a file in its own mode, as some of the original's programs do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, a damaged one, or an array of another type or shape; the message names it.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, str | os.PathLike | bytes | bytearray):
        with _opened(source) as image:
            upright = ImageOps.exif_transpose(image) if exif else image
            return upright.convert("RGB") if rgb else upright.copy()
    array = np.asarray(source)
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        raise ValueError(
            f"image: expected a path, URL, bytes, PIL image or a uint8 array [H, W], [H, W, 3] or [H, W, 4]; "
            f"got {type(source).__name__} of dtype {array.dtype} and shape {array.shape}"
        )
    return Image.fromarray(array).convert("RGB")


def image_size(source) -> tuple[int, int]:
    """(width, height) of a picture's file, of which no more than the beginning is read.

    Args:
        source: a path, an http(s) or gs:// URL, or the bytes of a file.

    Raises:
        FileNotFoundError, ValueError: as `load_image`.
    """
    with _opened(source) as image:
        return image.size


def image_source(name: str, folder: str) -> str:
    """What `load_image` takes for a picture that a question or a training sample names.

    Args:
        name: relative to the folder; or an absolute path, or a URL, which stand for themselves.
        folder: local or gs://.

    Raises:
        ValueError: a relative name that leads out of the folder.
    """
    if "://" in name or name.startswith("data:") or os.path.isabs(name):
        return name
    if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"image {name!r} leads out of the image folder {folder!r}; name it by its absolute path")
    return os.path.join(folder, name)


def _find(source) -> tuple[str | IO[bytes], str]:
    """Something that Pillow opens, and the name to call it by in an error."""
    if isinstance(source, bytes | bytearray):
        return BytesIO(source), f"image: {len(source)} bytes"
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(name, timeout=30) as reply:
                return BytesIO(reply.read()), f"image {name!r}"
        except (urllib.error.URLError, TimeoutError) as error:
            raise ValueError(f"image {name!r} could not be fetched: {error}") from error
    if "://" in name:
        from etils import epath

        try:
            return epath.Path(name).open("rb"), f"image {name!r}"
        except OSError as error:
            raise FileNotFoundError(f"image {name!r}: cannot be read ({error})") from error
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image {name!r}: no such file")
    return path, f"image {name!r}"


@contextlib.contextmanager
def _opened(source) -> Iterator[Image.Image]:
    """Pillow's image of a file; what is wrong with it is one ValueError that names it."""
    file, name = _find(source)
    try:
        with contextlib.nullcontext() if isinstance(file, str) else file, Image.open(file) as image:
            yield image
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is damaged or too large: {error}") from error


def as_image_list(images) -> list:
    """None, one picture, or a list of pictures, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def resize_and_pad_image(image: Image.Image, target_resolution) -> Image.Image:
    """The picture as large as fits into (width, height), centred on black (llava.mm_utils.resize_and_pad_image)."""
    size, corner = fit_on_canvas(image.size, target_resolution)
    canvas = Image.new("RGB", target_resolution, (0, 0, 0))
    canvas.paste(image.resize(size), corner)
    return canvas


def expand2square(image: Image.Image, background_color) -> Image.Image:
    """The picture centred on a square of `background_color` (llava.mm_utils.expand2square)."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _shortest_edge_and_crop(image: Image.Image, side: int) -> Image.Image:
    """Shortest edge to `side`, then the centre (CLIPImageProcessor's resize and centre crop)."""
    width, height = image.size
    longest = int(side * max(width, height) / min(width, height))
    width, height = (side, longest) if width <= height else (longest, side)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def _anyres_tiles(image: Image.Image, config: LlavaConfig) -> list[Image.Image]:
    """The whole picture squeezed into one tile, then the canvas tile by tile, row by row (process_anyres_image)."""
    side = config.tile_size
    canvas = resize_and_pad_image(image, select_best_resolution(image.size, pinpoints(config)))
    corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return [image.resize((side, side))] + [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def process_images(images, config: LlavaConfig) -> list[np.ndarray]:
    """RGB pictures to tiles, by `config.image_aspect_ratio` (llava.mm_utils.process_images before normalising).

    Args:
        images: PIL images. Tiles of other modes than RGB are converted at the end, as in the original: a palette
            is then resized without smoothing, and transparent pixels weigh nothing.

    Returns:
        one uint8 [T, S, S, 3] for each image: anyres has the whole picture first, then the grid row by row;
        pad and square have T = 1; with S2, S is the largest scale.
    """
    mean_color = tuple(int(m * 255) for m in config.vision.image_mean)
    out = []
    for image in images:
        if config.image_aspect_ratio == "anyres":
            tiles = _anyres_tiles(image, config)
        elif config.image_aspect_ratio == "pad":
            tiles = [_shortest_edge_and_crop(expand2square(image.convert("RGB"), mean_color), config.tile_size)]
        else:
            tiles = [_shortest_edge_and_crop(image.convert("RGB"), config.tile_size)]
        out.append(np.stack([np.asarray(tile.convert("RGB")) for tile in tiles]))
    return out
