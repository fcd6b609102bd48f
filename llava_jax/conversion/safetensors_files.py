"""Tensors into safetensors files, one after another: the header is written first, from names and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from llava_jax.conversion.key_table import TensorInfo
from llava_jax.conversion.published_files import SAFETENSORS_DTYPES, write_json

DTYPE_NAMES = {numpy: name for name, numpy in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[list[str]], Iterable[np.ndarray]]
) -> None:
    """One file; its tensors stand in order of item size, so that all are aligned.

    Args:
        tensors: what the header is to say.
        read: gives the arrays of the names that it is given, in that order.
    """
    names = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        info = tensors[name]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in zip(names, read(names), strict=True):
            info = tensors[name]
            if array.shape != info.shape or array.dtype != info.dtype:
                raise ValueError(f"{path}: {name} is {array.dtype}{list(array.shape)}, unlike what was planned")
            file.write(in_order(array).reshape(-1).view(np.uint8).data)


def in_order(array: np.ndarray, buffer: np.ndarray | None = None) -> np.ndarray:
    """The array in C order, in `buffer` (uint8) where it has to be copied; a transposed matrix in strips that the cache
    holds, ten times as fast as at once."""
    if array.flags.c_contiguous:
        return array
    buffer = np.empty(array.nbytes, np.uint8) if buffer is None else buffer[: array.nbytes]
    out = buffer.view(array.dtype).reshape(array.shape)
    bits = np.dtype(f"u{array.itemsize}")  # which NumPy copies faster than bfloat16
    to, of = out.view(bits), array.view(bits)
    for start in range(0, array.shape[-1], 16):
        to[..., start : start + 16] = of[..., start : start + 16]
    return out


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[list[str]], Iterable[np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` (a larger tensor has one to itself) and their index,
    named as transformers names them."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", tensors, read)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard, read)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(info.nbytes for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)
