"""Scenes of coloured shapes and signs, drawn with Pillow alone: a seed gives the same picture everywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS = {
    "red": (222, 45, 48),
    "orange": (248, 140, 28),
    "yellow": (250, 216, 40),
    "green": (48, 166, 76),
    "blue": (44, 104, 216),
    "purple": (142, 68, 190),
}
SIGN = "sign"
CHARACTERS = "ACHKLTXY2347"  # of what signs say: no two look alike
INK, PLATE = (30, 32, 46), (252, 252, 250)

ADVANCE = 1.4  # of a sign's characters, in heights of a capital
CAPITAL = 0.7  # a capital's height, in font sizes
SMOOTHING = 2  # drawn so many times larger, then reduced


@dataclass(frozen=True)
class Item:
    """A coloured shape, or a sign with something to read. `x`, `y` is its middle; lengths are in pixels."""

    kind: str  # one of SHAPES, or SIGN
    color: str  # a key of COLORS; of a sign, ""
    size: float  # a shape's side, or the height of a sign's characters
    text: str = ""
    x: float = 0.0
    y: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}".strip()

    @property
    def width(self) -> float:
        return self.size if self.kind != SIGN else self.size * (ADVANCE * len(self.text) + 0.5)

    @property
    def height(self) -> float:
        return self.size if self.kind != SIGN else self.size * 1.8

    def characters(self) -> list[tuple[str, float, float]]:
        """(character, x, y) of the middle of each character on a sign."""
        step = self.size * ADVANCE
        first = self.x - step * (len(self.text) - 1) / 2
        return [(character, first + step * i, self.y) for i, character in enumerate(self.text)]


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    items: tuple[Item, ...]
    background: tuple[int, int, int]
    seed: int  # of the tints

    @property
    def aspect(self) -> float:
        """The longer side by the shorter one."""
        return max(self.width, self.height) / min(self.width, self.height)


# ---- what is in a scene


@dataclass(frozen=True)
class Form:
    """Pictures of about one shape: the ranges of their sides, of a shape's size, and how many items have room."""

    long: tuple[int, int]
    short: tuple[int, int]
    sizes: tuple[int, int]
    room: int


SQUARE = Form((196, 236), (196, 236), (44, 64), 5)
OBLONG = Form((206, 236), (140, 160), (40, 54), 5)
DOUBLE = Form((212, 236), (112, 124), (36, 48), 4)
BANNER = Form((300, 350), (112, 124), (36, 48), 5)
FORMS = (SQUARE, OBLONG, DOUBLE, BANNER)
SMALL_TEXT, LARGE_TEXT = (21, 24), (40, 46)  # heights of a capital


def make_scene(seed, forms: tuple[Form, ...] = FORMS, signs: float = 0.5, various: float = 0.0) -> Scene:
    """The scene of a seed (an int or a tuple of them): shapes, and in a share `signs` of them a sign.

    In a share `various` no two shapes are alike, so that each can be asked about. In the others some shape or color,
    drawn by lot, is there 1 to 4 times, as often each, so that how many there are is balanced.
    """
    rng = np.random.default_rng(seed)
    form = forms[rng.integers(len(forms))]
    sides = int(rng.integers(*form.long, endpoint=True)), int(rng.integers(*form.short, endpoint=True))
    width, height = sides if rng.random() < 0.5 else sides[::-1]
    all_differ = various > 0 and rng.random() < various
    items = (_different_shapes if all_differ else _shapes)(rng, form.room, form.sizes)
    if rng.random() < signs:
        items.append(_sign(rng, large=form is SQUARE and rng.random() < 0.5))
    red, green, blue = map(int, rng.integers(205, 250, 3))
    return Scene(width, height, tuple(_place(items, width, height, rng)), (red, green, blue), int(rng.integers(2**31)))


def _shapes(rng, limit: int, sizes: tuple[int, int]) -> list[Item]:
    """1 to `limit` shapes without a place."""
    alike = int(rng.integers(1, min(limit, 4), endpoint=True))
    others = int(rng.integers(0, limit - alike, endpoint=True))
    by_color = rng.random() < 0.5
    values, other_values = (tuple(COLORS), SHAPES) if by_color else (SHAPES, tuple(COLORS))
    chosen = values[rng.integers(len(values))]
    rest = [value for value in values if value != chosen]
    pairs = [(chosen, pick(rng, other_values)) for _ in range(alike)]
    pairs += [(pick(rng, rest), pick(rng, other_values)) for _ in range(others)]
    return _sized(rng, [(b, a) if by_color else (a, b) for a, b in pairs], sizes)


def _different_shapes(rng, limit: int, sizes: tuple[int, int]) -> list[Item]:
    kinds = rng.permutation(len(SHAPES))[: int(rng.integers(2, limit, endpoint=True))]
    return _sized(rng, [(SHAPES[i], pick(rng, tuple(COLORS))) for i in kinds], sizes)


def _sized(rng, pairs: list[tuple[str, str]], sizes: tuple[int, int]) -> list[Item]:
    """(shape, color) pairs as items, all about as large."""
    size = rng.uniform(*sizes)
    return [Item(kind, color, size * rng.uniform(0.88, 1.12)) for kind, color in pairs]


def _sign(rng, large: bool) -> Item:
    text = "".join(pick(rng, CHARACTERS) for _ in range(2))
    return Item(SIGN, "", rng.uniform(*(LARGE_TEXT if large else SMALL_TEXT)), text)


def pick(rng, values):
    """One of the values, drawn with a NumPy Generator."""
    return values[int(rng.integers(len(values)))]


def _place(items: list[Item], width: int, height: int, rng) -> list[Item]:
    """The items where none touches another or the edge, smaller if need be; a sign first, for it needs most room."""
    items = sorted(items, key=lambda item: -item.width)
    for attempt in range(1000):
        placed: list[Item] = []
        for item in items:
            for _ in range(12):
                at = _somewhere(item, width, height, rng)
                if all(_apart(at, other) for other in placed):
                    placed.append(at)
                    break
        if len(placed) == len(items):
            return [placed[i] for i in rng.permutation(len(placed))]
        if attempt % 3 == 2:
            items = [item if item.kind == SIGN else replace(item, size=item.size * 0.94) for item in items]
    raise AssertionError("a form has more items than it has room for")


def _somewhere(item: Item, width: int, height: int, rng) -> Item:
    room_x, room_y = item.width / 2 + 3, item.height / 2 + 3
    return replace(item, x=rng.uniform(room_x, width - room_x), y=rng.uniform(room_y, height - room_y))


def _apart(a: Item, b: Item, gap: float = 7) -> bool:
    return abs(a.x - b.x) >= (a.width + b.width) / 2 + gap or abs(a.y - b.y) >= (a.height + b.height) / 2 + gap


# ---- drawing


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    rng = np.random.default_rng(scene.seed)
    size = scene.width * SMOOTHING, scene.height * SMOOTHING
    image = Image.new("RGB", size, scene.background)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        if item.kind == SIGN:
            _draw_sign(pen, item)
            continue
        fill = tuple(int(c) for c in np.clip(np.array(COLORS[item.color]) + rng.integers(-12, 13, 3), 0, 255))
        outline = tuple(int(c * 0.72) for c in fill)
        points = [
            ((item.x + item.size * x) * SMOOTHING, (item.y + item.size * y) * SMOOTHING)
            for x, y in outline_of(item.kind)
        ]
        pen.polygon(points, fill=fill, outline=outline, width=2 * SMOOTHING)
    return image.reduce(SMOOTHING)


def _draw_sign(pen: ImageDraw.ImageDraw, item: Item) -> None:
    box = [item.x - item.width / 2, item.y - item.height / 2, item.x + item.width / 2, item.y + item.height / 2]
    box = [v * SMOOTHING for v in box]
    pen.rounded_rectangle(box, radius=item.size * 0.3 * SMOOTHING, fill=PLATE, outline=INK, width=2 * SMOOTHING)
    font = _font(round(item.size / CAPITAL * SMOOTHING))
    for character, x, y in item.characters():
        left, top, right, bottom = font.getbbox(character)
        corner = x * SMOOTHING - (left + right) / 2, y * SMOOTHING - (top + bottom) / 2
        pen.text(corner, character, fill=INK, font=font, stroke_width=max(1, round(item.size * 0.03 * SMOOTHING)))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is the same wherever Pillow is."""
    return ImageFont.load_default(size)


@functools.cache
def outline_of(shape: str) -> tuple[tuple[float, float], ...]:
    """A shape's corners around (0, 0) in a square of side 1, y downwards."""
    return tuple(_OUTLINES[shape]())


def _around(radius: Callable[[float], float], steps: int) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / steps - math.pi / 2 for i in range(steps)]
    return [(radius(i) * math.cos(a), radius(i) * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    waves = [(13, 1), (-5, 2), (-2, 3), (-1, 4)]
    return [(16 * math.sin(t) ** 3 / 32, -sum(size * math.cos(n * t) for size, n in waves) / 32 - 0.06) for t in turns]


def _cross() -> list[tuple[float, float]]:
    quarter = [(-0.17, -0.5), (0.17, -0.5), (0.17, -0.17)]
    turned = []
    for _ in range(4):
        turned += quarter
        quarter = [(-y, x) for x, y in quarter]
    return turned


_OUTLINES = {
    "circle": lambda: _around(lambda i: 0.5, 48),
    "square": lambda: [(-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46)],
    "triangle": lambda: [(0, -0.48), (0.52, 0.44), (-0.52, 0.44)],
    "star": lambda: _around(lambda i: 0.22 if i % 2 else 0.54, 10),
    "heart": _heart,
    "cross": _cross,
}
