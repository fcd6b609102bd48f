"""Pictures of random shapes and modes: the tiles are those of the plain way, or the picture is refused."""

import math

import numpy as np
from fuzz.odd import cases, generator, refusal_of
from PIL import Image

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.inputs import image as pixels
from llava_jax.inputs.anyres import num_tiles, pinpoints, select_best_resolution
from llava_jax.inputs.image import process_image, process_images, resize_and_pad_image

SIDE = 28
SMALL = LlavaConfig.preset("1.6-vicuna-7b").replace(
    vision=VisionConfig(image_size=SIDE, patch_size=14),
    image_grid_pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)),
)
ASPECTS = ("anyres", "pad", "square")
MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"),
    *("I", "F", "I;16", "I;16B"),
)
TYPES = ("bool", "int8", "uint16", "int64", "float16", "float32", "complex64", "object", "str", "datetime64[s]")


def random_size(rng, longest):
    """(width, height); small and large sides are as likely, and so are thin pictures."""
    return tuple(int(math.exp(rng.uniform(0, math.log(longest)))) for _ in range(2))


def random_image(rng, mode, size):
    """Noise, sometimes of black and white alone, in a mode of Pillow's."""
    if 0 in size:
        return Image.new(mode, size)
    image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    if rng.random() < 0.3:
        image = image.point(lambda value: 255 * (value > 127))
    if mode in ("PA", "La", "RGBa"):
        return image.convert({"PA": "P", "La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "LAB":
        return Image.merge(mode, image.split())
    return image.convert("I").convert(mode) if mode.startswith("I;16") else image.convert(mode)


def plain_tile(image, aspect):
    """One tile of an RGB picture by way of the whole square, or of the whole picture resized."""
    width, height = image.size
    longest = max(image.size)
    if aspect == "pad":
        background = tuple(int(mean * 255) for mean in SMALL.vision.image_mean)
        square = Image.new("RGB", (longest, longest), background)
        square.paste(image, ((longest - width) // 2, (longest - height) // 2))
        return square.resize((SIDE, longest), 3).resize((SIDE, SIDE), 3)
    longest = int(SIDE * longest / min(image.size))
    size = (SIDE, longest) if width <= height else (longest, SIDE)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return image.resize((size[0], height), 3).resize(size, 3).crop((left, top, left + SIDE, top + SIDE))


@cases(150, 3000)
def test_tiles_are_those_of_the_plain_way(numbers, monkeypatch):
    for number in numbers:
        rng = generator("pixels", number)
        image = random_image(rng, "RGB", random_size(rng, 1200))
        config = SMALL.replace(image_aspect_ratio=rng.choice(ASPECTS))
        monkeypatch.setattr(pixels, "LARGE_PIXELS", rng.choice((0, 10_000, 2**24)))  # with and without the whole canvas
        (tiles,) = process_images([image], config)
        where = f"case {number}: {image.size}, {config.image_aspect_ratio}"
        assert tiles.dtype == np.uint8 and tiles.shape == (num_tiles(image.size, config), SIDE, SIDE, 3), where
        if config.image_aspect_ratio != "anyres":
            assert np.array_equal(tiles[0], plain_tile(image, config.image_aspect_ratio)), where
            continue
        whole = image.resize((SIDE, image.height), 3).resize((SIDE, SIDE), 3)
        canvas = resize_and_pad_image(image, select_best_resolution(image.size, pinpoints(config)))
        down, across = canvas.height // SIDE, canvas.width // SIDE
        grid = tiles[1:].reshape(down, across, SIDE, SIDE, 3).swapaxes(1, 2).reshape(canvas.height, canvas.width, 3)
        assert np.array_equal(tiles[0], whole) and np.array_equal(grid, canvas), where


@cases(150, 3000)
def test_pictures_in_any_mode_become_tiles_or_are_refused(numbers):
    refused = 0
    for number in numbers:
        rng = generator("modes", number)
        mode, size = rng.choice(MODES), random_size(rng, 200)
        if rng.random() < 0.1:
            size = rng.choice(((0, 0), (0, size[1]), (size[0], 0)))
        image, config = random_image(rng, mode, size), SMALL.replace(image_aspect_ratio=rng.choice(ASPECTS))
        error = refusal_of(process_images, [image], config)
        assert error is None or 0 in size or "conversion from" in str(error), f"case {number}: {mode} {size}: {error}"
        assert error is not None or 0 not in size, f"case {number}: {mode} {size} has no pixels"
        refused += error is not None
    assert 0 < refused < len(numbers) / 2


@cases(150, 3000)
def test_arrays_are_taken_or_refused(numbers):
    for number in numbers:
        rng = generator("arrays", number)
        shape = [rng.randrange(4) if rng.random() < 0.3 else rng.randrange(1, 40) for _ in range(rng.randrange(5))]
        shape += [rng.choice((1, 2, 3, 4))] if rng.random() < 0.5 else []
        dtype = rng.choice(("uint8", rng.choice(TYPES)))
        array = np.zeros(shape, dtype)
        array = rng.choice((array, array[..., ::-1] if array.ndim else array, array.T, np.asfortranarray(array)))
        good = dtype == "uint8" and array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4)))
        error = refusal_of(process_image, array, SMALL)
        assert (error is None) == bool(good), f"case {number}: {dtype} {array.shape}: {error}"
