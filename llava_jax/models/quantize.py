"""int8: kernels with a scale for each output channel, cached keys and values with one for each head and position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

SCALE = "kernel_scale"  # beside an int8 kernel [in, out]: float32 [out], for the product
# The linear layers that are always quantized, and those that are only when asked for.
LAYERS = r"(language_model|vision_tower)/layers_\d+/.*"
OTHERS = {"lm_head": r"language_model/lm_head", "mm_projector": r"mm_projector/linear_\d+"}


class Int8(NamedTuple):
    """Numbers as int8, and the scale to multiply them by."""

    values: jax.Array
    scale: jax.Array  # float32, without the axis that shares one scale


@partial(jax.jit, static_argnums=1)
def to_int8(x: jax.Array, axis: int) -> Int8:
    """The nearest of 255 levels between minus and plus the largest magnitude along the axis."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis)
    scale = jnp.where(largest > 0, largest, 127) / 127
    return Int8(jnp.round(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale)


def values_and_scale(x: jax.Array | Int8, dtype) -> tuple[jax.Array, jax.Array | int]:
    """Keys or values [..., S, D] in `dtype`, and what their products [..., X, S] with queries are multiplied by."""
    return (x.values.astype(dtype), x.scale[..., None, :]) if isinstance(x, Int8) else (x, 1)


def check_quantize(quantize: str | None, also: Iterable[str] = ()) -> None:
    """ValueError if this is no way to quantise."""
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is not supported; supported: int8")
    if unknown := sorted(set(also) - set(OTHERS)):
        raise ValueError(f"quantize_also={', '.join(unknown)} is not known; known: {', '.join(OTHERS)}")
    if also and quantize is None:
        raise ValueError("quantize_also needs quantize='int8'")


def is_quantized(path: str, also: Iterable[str] = ()) -> bool:
    """Whether a parameter, "a/b/kernel", is one that becomes int8."""
    patterns = [LAYERS, *(OTHERS[name] for name in also)]
    return any(re.fullmatch(f"{pattern}/kernel", path) for pattern in patterns)


def quantize_leaves(
    leaves: Iterable[tuple[str, np.ndarray]], also: Iterable[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """("a/b/kernel", array) pairs as they come, with int8 kernels and their scales."""
    for path, array in leaves:
        if is_quantized(path, also):
            values, scale = to_int8(array, 0)
            yield path, values
            yield _scale_of(path), scale
        else:
            yield path, array


def quantize_params(params: dict, also: Iterable[str] = ()) -> dict:
    """A tree of parameters with int8 kernels and their scales."""
    return unflatten_dict(dict(quantize_leaves(flatten_dict(params, sep="/").items(), also)), sep="/")


def with_scales(shapes: dict, paths: Iterable[str]) -> dict:
    """`param_shapes` with int8 kernels at these paths, and their scales."""
    flat = flatten_dict(shapes, sep="/")
    for path in paths:
        shape = flat[path].shape
        flat[path] = jax.ShapeDtypeStruct(shape, jnp.int8)
        flat[_scale_of(path)] = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
    return unflatten_dict(flat, sep="/")


def quantized_paths(stored: dict) -> list[str]:
    """The kernels of a tree that have a scale beside them."""
    flat = flatten_dict(stored, sep="/")
    return [path for path in flat if path.endswith("/kernel") and _scale_of(path) in flat]


def _scale_of(path: str) -> str:
    return f"{path.removesuffix('kernel')}{SCALE}"
