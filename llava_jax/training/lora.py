"""Low-rank adapters on the decoder's linear layers (LoRA, arXiv:2106.09685), as peft has them in the reference."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.models.ops import flat_positions

ADAPTED = r"language_model/layers_\d+/.*_proj"  # find_all_linear_names: neither tower, projector nor lm_head


def init_lora(params: dict, rank: int, key: jax.Array) -> dict:
    """For each adapted kernel [in, out]: `a` [in, rank] as peft draws it, and `b` [rank, out] of zeros; float32.

    Args:
        params: arrays or `ShapeDtypeStruct`s.
    """
    shapes = {path: x.shape for path, x in flatten_dict(params, sep="/").items()}
    adapted = [path for path in sorted(shapes) if re.fullmatch(f"{ADAPTED}/kernel", path)]
    out = {}
    for path, one in zip(adapted, jax.random.split(key, len(adapted)), strict=True):
        (wide, narrow), name = shapes[path], path.removesuffix("/kernel")
        bound = wide**-0.5
        out[f"{name}/a"] = jax.random.uniform(one, (wide, rank), minval=-bound, maxval=bound)
        out[f"{name}/b"] = jnp.zeros((rank, narrow))
    return unflatten_dict(out, sep="/")


def adapters(lora: dict, scale: float, dropout: float, key: jax.Array | None):
    """A context in which every adapted layer adds its adapter: x W + dropout(x) A B · scale.

    Args:
        lora: what `init_lora` gave, trained.
        scale: lora_alpha / lora_r.
        key: of the dropout; None where there is none.
    """
    flat = flatten_dict(lora)
    order = {path: n for n, path in enumerate(sorted(path[:-1] for path in flat if path[-1] == "a"))}
    seeds = None if key is None else jax.random.bits(key, (len(order), 2), jnp.uint32)

    def add_adapter(call, args, kwargs, context):
        path, out = context.module.path, call(*args, **kwargs)
        if path not in order or context.method_name != "__call__":
            return out
        x, *_ = args
        if seeds is not None and dropout:
            x = jnp.where(_kept(seeds[order[path]], x.shape, dropout), x / (1 - dropout), 0)
        a, b = (flat[(*path, name)].astype(x.dtype) for name in "ab")
        return out + (x @ a) @ b * scale

    return nn.intercept_methods(add_adapter)


def _kept(seed: jax.Array, shape: tuple[int, ...], dropout: float) -> jax.Array:
    """bool of that shape, False for a share of `dropout`: each place hashed (as murmur3 ends) with uint32 seed [2].

    `jax.random` would cost a TPU more than ten times the arithmetic, and the compiler minutes, at 224 layers of a 7B.
    """
    place = flat_positions(shape)
    for part in seed:
        place ^= part
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            place = (place ^ (place >> shift)) * np.uint32(factor)
    return place >= np.uint32(dropout * 2**32)


def merge_lora(params: dict, lora: dict, scale: float) -> dict:
    """The parameters with every adapter added into its kernel; they need no adapters then."""
    flat, adapter = flatten_dict(params), flatten_dict(lora)
    for path in [path[:-1] for path in adapter if path[-1] == "a"]:
        kernel = flat[(*path, "kernel")]
        added = adapter[(*path, "a")] @ adapter[(*path, "b")] * scale
        flat[(*path, "kernel")] = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
    return unflatten_dict(flat)
