"""Pillow's bicubic resize, to the bit, where a picture is a small part of its canvas, or little of the result is kept.

A thin picture on a square, or with its shortest edge made as long as a tile, has a canvas or a result far larger than
itself. Here neither is made. The arithmetic is that of Pillow's libImaging/Resample.c for 8-bit channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRECISION = 22  # bits of a weight behind the point
SUPPORT = 2.0  # the filter's reach to either side, in pixels of the larger scale


@dataclass(frozen=True)
class Axis:
    """One side of a canvas with a picture on it: it is resized, and a part of the result is kept."""

    canvas: int  # pixels
    start: int  # where the picture begins
    picture: int  # its pixels
    resized: int  # pixels that the canvas becomes
    kept: range  # which of those are wanted


@dataclass(frozen=True)
class Taps:
    """What the pixels that are wanted, K of them, are made of."""

    first: np.ndarray  # int64 [K], the first pixel of the canvas that each sees
    count: np.ndarray  # int64 [K], how many it sees
    weights: np.ndarray  # int64 [K, W], of those; in units of 2**-PRECISION; zero from `count` on


def taps(axis: Axis) -> Taps:
    """Pillow's precompute_coeffs and normalize_coeffs_8bpc, for the part that is kept."""
    scale = axis.canvas / axis.resized
    stretch = max(scale, 1.0)
    center = (np.arange(axis.kept.start, axis.kept.stop) + 0.5) * scale
    first = np.maximum((center - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    count = np.minimum((center + SUPPORT * stretch + 0.5).astype(np.int64), axis.canvas) - first
    steps = np.arange(count.max())
    weights = bicubic((first[:, None] + steps - center[:, None] + 0.5) * (1.0 / stretch))
    weights[steps >= count[:, None]] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # added up one by one, as in C
    return Taps(first, count, np.trunc(weights * 2**PRECISION + np.copysign(0.5, weights)).astype(np.int64))


def bicubic(x: np.ndarray) -> np.ndarray:
    """The filter, with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resample(pixels: np.ndarray, across: Axis, down: Axis, background) -> np.ndarray:
    """The canvas resized, across and then down, and cropped: uint8 [len(down.kept), len(across.kept), C].

    On it are the picture's pixels, uint8 [H, W, C], and else the background, uint8 [C].
    """
    columns, rows = taps(across), taps(down)
    top = max(int(rows.first.min()) - down.start, 0)
    bottom = int((rows.first + rows.count).max()) - down.start
    wanted = pixels[top:bottom]
    out = np.full((len(down.kept), len(across.kept), pixels.shape[2]), background, np.uint8)
    seen_across, narrow = _resample(wanted.swapaxes(0, 1), across.start, columns, background)
    seen_down, small = _resample(narrow.swapaxes(0, 1), down.start + top, rows, background)
    out[seen_down, seen_across] = small
    return out


def _resample(lines: np.ndarray, start: int, made_of: Taps, background) -> tuple[slice, np.ndarray]:
    """Of lines [n, m, C], at `start` of the canvas, the resized ones that see some of them, and which those are."""
    begin = np.maximum(made_of.first - start, 0)
    end = np.minimum(made_of.first + made_of.count - start, len(lines))
    (seen,) = np.nonzero(begin < end)
    out = np.empty((len(seen), *lines.shape[1:]), np.uint8)
    for line, i in zip(out, seen, strict=True):
        weights = made_of.weights[i]
        shown = weights[begin[i] + start - made_of.first[i] :][: end[i] - begin[i]]
        total = np.einsum("n,nmc->mc", shown, lines[begin[i] : end[i]], dtype=np.int64)
        total += (weights.sum() - shown.sum()) * np.asarray(background, np.int64) + (1 << PRECISION - 1)
        line[:] = np.clip(total >> PRECISION, 0, 255)
    return slice(seen[0], seen[-1] + 1), out
