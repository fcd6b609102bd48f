"""Deterministic test pictures: three photographs, and synthetic ones drawn by code, each in a file of its kind."""

import os

import numpy as np
from PIL import Image

PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "photos")

# name -> (width, height); the comments say why each is here.
SYNTHETIC = {
    "wide_1200x400": (1200, 400),
    "wide_1200x200": (1200, 200),
    "tall_300x900": (300, 900),
    "tall_150x900": (150, 900),
    "photo_640x427": (640, 427),
    "square_512": (512, 512),
    "exact_336x336": (336, 336),  # two pinpoints tie: the first one listed wins
    "exact_672x672": (672, 672),  # no resize, no padding, nothing to unpad
    "exact_1008x336": (1008, 336),
    "odd_333x500": (333, 500),  # odd padding: one row or column more survives than int() says
    "odd_501x337": (501, 337),
    "tiny_20x13": (20, 13),
    "tiny_1x1": (1, 1),
    "large_2100x1575": (2100, 1575),
    "sliver_2000x50": (2000, 50),  # int(1.8) is 1, and two rows survive
    "sliver_50x2000": (50, 2000),
    "sliver_4000x20": (4000, 20),  # int(0.36) is 0, and no row survives
    "float_88x99": (88, 99),  # the exact product is a whole number, the float product a little less
    "float_235x1128": (235, 1128),
    "float_376x799": (376, 799),
}
OTHER_MODES = {
    "gray_500x375": "png",
    "rgba_640x480": "png",
    "palette_400x300": "png",
    "la_300x200": "png",
    "bilevel_120x90": "png",
    "sixteen_bit_200x160": "png",
    "cmyk_240x320": "tiff",
    "animated_320x240": "gif",
    "exif_rotated_400x240": "jpg",  # orientation 6: shown as 240x400
}
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
SHAPES = ((220, 610), (610, 220), (30, 1300), (75, 90))  # (width, height), in each of those modes
THIN = ((1, 1), (1, 1500), (1500, 1), (3, 4200), (4200, 2), (13, 2001), (2001, 13), (200, 1500), (1500, 200))  # in RGB
PHOTO_NAMES = ("chelsea", "astronaut", "coffee")
NAMES = (*PHOTO_NAMES, *SYNTHETIC, *OTHER_MODES)


def noise(width, height, channels, seed):
    """Blocks, a ramp and fine noise [height, width, channels], so that low and high frequencies both matter."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows, columns = height // 32 + 2, width // 32 + 2
    coarse = generator.integers(0, 256, size=(rows, columns, channels), dtype=np.uint8).astype(np.int32)
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    base = coarse[y * (rows - 1) // height, x * (columns - 1) // width]
    ramp = (x * 60 // width + y * 60 // height)[..., None]
    fine = generator.integers(-24, 25, size=(height, width, channels))
    return np.clip(base + ramp - 60 + fine, 0, 255).astype(np.uint8)


def in_mode(mode, width, height, seed):
    """Noise, as a Pillow image of any of MODES."""
    pixels = noise(width, height, {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1), seed)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("1", "I", "F"):
        return Image.fromarray(pixels[..., 0]).convert(mode)
    image = Image.frombytes(mode, (width, height), pixels.tobytes())
    if mode == "P":
        image.putpalette(noise(256, 1, 3, seed).tobytes())
    return image


def other_mode(name):
    width, height = map(int, name.rsplit("_", 1)[1].split("x"))
    seed = 2000 + list(OTHER_MODES).index(name)
    kind = name.split("_")[0]
    modes = {"gray": "L", "bilevel": "1", "rgba": "RGBA", "la": "LA", "cmyk": "CMYK", "sixteen": "I;16"}
    image = in_mode(modes.get(kind, "RGB"), width, height, seed)
    return image.quantize(64, dither=Image.Dither.NONE) if kind in ("palette", "animated") else image


def make(name):
    """The synthetic picture `name`, as a Pillow image in its own mode."""
    if name in SYNTHETIC:
        return Image.fromarray(noise(*SYNTHETIC[name], 3, 1000 + list(SYNTHETIC).index(name)))
    return other_mode(name)


def write(folder, names=NAMES):
    """Write pictures into `folder`; returns {name: path}. Photographs are where they are."""
    os.makedirs(folder, exist_ok=True)
    paths = {}
    for name in names:
        if name in PHOTO_NAMES:
            paths[name] = os.path.join(PHOTOS, name + ".jpg")
            continue
        ending = OTHER_MODES.get(name, "png")
        paths[name] = os.path.join(folder, f"{name}.{ending}")
        options = {"compress_level": 1} if ending == "png" else {}
        if ending == "gif":
            options.update(save_all=True, append_images=[make("palette_400x300").resize((320, 240))])
        if ending == "jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            options.update(exif=exif, quality=95)
        make(name).save(paths[name], **options)
    return paths
