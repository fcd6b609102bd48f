"""Checks of numbers that a caller gives as options, Python's or NumPy's; an error names the option."""

from __future__ import annotations

FLOAT32_MAX = 3.4e38  # that float32 holds


def finite_number(name: str, value) -> float:
    """A number that float32 can hold; ValueError if the option `name` is something else, True and False included."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{name}={value!r:.40} must be a finite number")
    return value


def whole_number(name: str, value, least: int, most: int, note: str = "") -> int:
    """A whole number from `least` to `most`; ValueError, ending in `note`, if the option `name` is something else."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r:.40} must be a whole number from {least} to {most}{note}")
    return value


def _plain(value):
    """A NumPy or JAX scalar as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
