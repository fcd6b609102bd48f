"""The pixels that the model sees, under whichever Pillow is installed: those that the original gave under Pillow 12."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from golden.images import THIN, in_mode
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.inputs.anyres import num_image_tokens, select_best_resolution
from llava_jax.inputs.image import LONGEST_SIDE, expand2square, process_images, resize
from llava_jax.inputs.resample import Axis, resample

CONFIGS = {
    "anyres": LlavaConfig.preset("1.6-vicuna-7b"),
    "pad": LlavaConfig.preset("1.5-7b"),
    "square": LlavaConfig.preset("1.5-7b").replace(image_aspect_ratio="square"),
    "s2": LlavaConfig.preset("1.5-7b").replace(s2=True, mm_hidden_size=3072),
}


def test_tiles_of_every_mode_and_shape_are_the_originals(golden):
    """ScienceQA and MMBench are read without `.convert("RGB")`: a mode resizes in its own way."""
    recorded = {key: str(value) for key, value in golden("modes").items() if key != "versions"}
    assert len(recorded) > 100
    for key, expected in recorded.items():
        mode, size, aspect = key.split("/")
        size = tuple(map(int, size.split("x")))
        (tiles,) = process_images([in_mode(mode, *size, seed=sum(size))], CONFIGS[aspect])
        assert hashlib.sha256(tiles).hexdigest() == expected, key


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (2, 700), (700, 2)])
def test_resizing_leaves_the_mode_the_palette_and_an_unchanged_picture(size):
    for mode in ("RGBA", "LA", "P", "1", "I;16"):
        image = in_mode(mode, *size, seed=0)
        assert resize(image, size).tobytes() == image.tobytes(), mode  # not premultiplied and back
        small = resize(image, (20, 10))
        assert (small.mode, small.size, small.getpalette()) == (mode, (20, 10), image.getpalette())


# ---- thin pictures


@pytest.mark.parametrize("size", [*THIN, (400, 399), (600, 50)])
@pytest.mark.parametrize("side", [28, 336])
def test_a_part_of_a_resized_canvas_is_that_part(size, side):
    image, background = in_mode("RGB", *size, seed=1), (122, 116, 104)
    longest = max(size)
    padded = resize(expand2square(image, background), (side, side))
    axes = (Axis(longest, (longest - pixels) // 2, pixels, side, range(side)) for pixels in size)
    assert np.array_equal(resample(np.asarray(image), *axes, background), padded)
    wide = 3 * side, 5 * side
    kept = range(side + 7, 2 * side), range(2 * side, 4 * side - 1)
    cropped = resize(image, wide).crop((kept[0].start, kept[1].start, kept[0].stop, kept[1].stop))
    axes = (Axis(pixels, 0, pixels, target, part) for pixels, target, part in zip(size, wide, kept, strict=True))
    assert np.array_equal(resample(np.asarray(image), *axes, 0), cropped)


MEMORY = """
import sys
from PIL import Image
from llava_jax.config import LlavaConfig
from llava_jax.inputs.image import process_images

def peak():  # MiB
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

config = LlavaConfig.preset("1.6-vicuna-7b").replace(image_aspect_ratio=sys.argv[1])
sizes = [(13, 20011), (20011, 13), (3, 60000), (60000, 3), (1, 60000), (60000, 1)]
images = [Image.new("RGB", size, (200, 30, 60)) for size in sizes]
process_images([Image.new("RGB", (600, 400))], config)  # what is imported on the way
before = peak()
for image in images:
    process_images([image], config)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("aspect", ["pad", "square", "anyres"])
def test_thin_pictures_take_little_memory(aspect):
    run = subprocess.run([sys.executable, "-c", MEMORY, aspect], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200, "MiB"


# ---- pictures without pixels, and endless ones


@pytest.mark.parametrize("aspect", CONFIGS)
def test_pictures_that_cannot_be_resized_are_refused(aspect):
    for size in ((0, 0), (0, 7), (7, 0), (1, LONGEST_SIDE + 1)):
        with pytest.raises(ValueError, match=rf"^image: {size[0]} x {size[1]} pixels; sides must be from 1 to"):
            process_images([Image.new("RGB", size)], CONFIGS[aspect])


def test_a_size_without_pixels_has_no_tokens_and_no_canvas():
    for size in ((0, 0), (0, 7), (7, -1)):
        with pytest.raises(ValueError, match=f"image size: {size[0]} x {size[1]} pixels"):
            num_image_tokens(*size, CONFIGS["anyres"])
        with pytest.raises(ValueError, match=f"image size: {size[0]} x {size[1]} pixels"):
            select_best_resolution(size, CONFIGS["anyres"].image_grid_pinpoints)
