"""Damaged pictures of every format that Pillow writes here: taken, or refused with one line, and nothing printed."""

import functools
import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
from fuzz import odd
from PIL import Image, features

from llava_jax.inputs.image import image_size, image_source, load_image

EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned
WAYS = [  # mode, format, options
    ("RGB", "BMP", {}),
    ("P", "BMP", {}),
    ("1", "MSP", {}),
    ("RGBA", "DDS", {}),
    *(("RGBA", "DDS", {"pixel_format": kind}) for kind in ("DXT1", "DXT3", "DXT5", "BC2", "BC3")),
    ("RGB", "DDS", {"pixel_format": "BC5"}),
    ("P", "GIF", {"save_all": True, "append_images": True}),
    ("RGBA", "ICO", {}),
    ("RGBA", "ICO", {"bitmap_format": "bmp"}),
    ("RGB", "IM", {}),
    ("RGB", "JPEG", {"exif": EXIF}),
    ("CMYK", "JPEG", {"progressive": True}),
    ("RGB", "MPO", {"save_all": True, "append_images": True}),
    ("P", "PCX", {}),
    ("RGB", "PNG", {"exif": EXIF}),
    ("P", "PNG", {"transparency": bytes(range(64))}),
    ("RGBA", "PNG", {"save_all": True, "append_images": True}),
    ("I;16", "PNG", {}),
    ("RGB", "PPM", {}),
    ("I;16", "PPM", {}),
    ("P", "BLP", {}),
    ("RGB", "QOI", {}),
    ("RGB", "SGI", {}),
    ("F", "SPIDER", {}),
    ("RGB", "TGA", {"compression": "tga_rle"}),
    ("F", "TIFF", {}),
    ("RGB", "TIFF", {"exif": EXIF}),
    ("LA", "TIFF", {"save_all": True, "append_images": True}),
    *(("RGB", "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    ("1", "TIFF", {"compression": "group4"}),
    ("1", "XBM", {}),
]
WAYS += [("RGB", "AVIF", {})] * features.check("avif")
WAYS += [("RGB", "JPEG2000", {}), ("RGBA", "JPEG2000", {"num_resolutions": 2})] * features.check("jpg_2000")
WAYS += [("RGB", "WEBP", {"exif": EXIF}), ("RGBA", "WEBP", {"save_all": True})] * features.check("webp")


@functools.cache
def saved(way: int) -> bytes:
    mode, format, options = WAYS[way]
    pixels = np.random.default_rng(way).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    pixels[4:16, 5:20] = 80  # so that runs are packed
    image = Image.fromarray(pixels).convert("L" if mode in ("I;16", "F") else mode).convert(mode)
    if "append_images" in options:
        options = options | {"append_images": [image.rotate(90)]}
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # that a format will be gone from a later Pillow
        image.save(file, format, **options)
    return file.getvalue()


def load(number: int) -> None:
    """One case: a damaged picture is taken or refused."""
    rng = odd.generator("pictures", number)
    data = odd.damaged(rng, saved(number % len(WAYS)))
    if rng.random() < 0.3:
        data = odd.damaged(rng, data)
    odd.refusal_of(image_size, data)
    odd.refusal_of(load_image, data, exif=rng.random() < 0.7, rgb=rng.random() < 0.7)


def by_libtiff(number: int) -> bool:
    """Whether it may be unpacked by libtiff, which writes to stderr past Pillow and Python."""
    return WAYS[number % len(WAYS)][1] == "TIFF"


def test_each_way_gives_a_picture():
    for way in range(len(WAYS)):
        with Image.open(io.BytesIO(saved(way))) as image:
            assert image_size(saved(way)) == image.size, WAYS[way]
            assert sorted(load_image(saved(way)).size) == sorted(image.size), WAYS[way]


@odd.cases(250, 5000)
def test_damaged_pictures(numbers, capfd):
    for number in numbers:
        try:
            load(number)
        except BaseException as error:
            raise AssertionError(f"case {number}, {WAYS[number % len(WAYS)]}") from error
        printed = capfd.readouterr()
        assert by_libtiff(number) or printed == ("", ""), f"case {number}, {WAYS[number % len(WAYS)]}"


BEGINNINGS = ("", "./", "../", "/", "~", "data:", "data:,", "data:;base64,", "file://", "http://127.0.0.1:1/", "foo://")


@odd.cases(100, 3000)
def test_odd_names(numbers, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for number in numbers:
        rng = odd.generator("names", number)
        name = rng.choice(BEGINNINGS) + odd.text(rng) + rng.choice(("", ".png", "=", "%", "%zz", "?#"))
        try:
            assert odd.refusal_of(image_size, name)
            assert odd.refusal_of(lambda name: load_image(image_source(name, str(tmp_path))), name)
        except BaseException as error:
            raise AssertionError(f"case {number}, {name[:100]!a}") from error


def test_nothing_is_printed_about_them():
    """In a process of its own, for pytest has warnings go elsewhere; two seconds, most of them to import."""
    code = """
from fuzz.test_fuzz_pictures import *
for number in range(100):
    if not by_libtiff(number):
        load(number)
large = bytearray(saved(WAYS.index(("RGB", "BMP", {}))))
large[18:26] = b"".join(side.to_bytes(4, "little") for side in (10_000, 12_000))  # Pillow warns of such a size
assert image_size(bytes(large)) == (10_000, 12_000)
"""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
