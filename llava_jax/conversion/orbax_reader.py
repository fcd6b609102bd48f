"""A converted checkpoint's parameters as published tensors, a batch of them in memory at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from llava_jax import checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.conversion import key_table
from llava_jax.conversion.key_table import TensorInfo
from llava_jax.models.llava_llama import param_shapes


@dataclass(frozen=True)
class Stored:
    """An Orbax directory, and each parameter's shape and dtype in it."""

    path: Path
    infos: dict[str, TensorInfo]


@dataclass(frozen=True)
class Written(TensorInfo):
    """A tensor to write: its header, and the parameter that becomes it once `transform` is undone. Where it has more
    rows than the parameter, the new ones are the mean of the others."""

    path: str
    transform: str


def open_stored(path: Path) -> Stored:
    """What an Orbax directory of parameters holds; nothing is read yet.

    Raises:
        ValueError: it is damaged.
    """
    leaves = flatten_dict(checkpoint.stored_tree(path, _remedy(path)), sep="/").items()
    return Stored(path, {name: TensorInfo(tuple(x.shape), np.dtype(x.dtype).name) for name, x in leaves})


def _remedy(path: Path) -> str:
    return f"make {path.parent} again"


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint: everything but its parameters, which stay on disk."""

    directory: Path
    manifest: dict
    config: LlavaConfig
    stored: Stored

    @property
    def layout(self) -> str:
        return self.manifest["layout"]

    @property
    def published(self) -> dict:
        """What from_hf.py found: `dtype` of the tensors, `vision_tower` inside or beside, the `names`' templates, the
        `tied_head`'s name. A directory that is older than this record is taken for what the original would publish:
        the oldest names, and the tower inside where it was tuned."""
        return self.manifest.get("published", {})


def open_converted(directory: str | os.PathLike) -> Converted:
    """Read and check everything but the parameters.

    Raises:
        FileNotFoundError, ValueError: not a finished converted checkpoint.
    """
    directory = Path(directory).expanduser()
    config, manifest = checkpoint.load_config(directory), checkpoint.read_manifest(directory)
    stored = open_stored(directory / checkpoint.PARAMS)
    checkpoint.check_tree(directory, unflatten_dict(stored.infos, sep="/"), param_shapes(config))
    return Converted(directory, manifest, config, stored)


def as_tensor(stored: Stored, path: str, transform: str, dtype: str | None = None) -> Written:
    """The tensor that a parameter becomes, in `dtype` or as it is stored."""
    info = stored.infos[path]
    shape = key_table.invert_transform(transform, np.broadcast_to(np.int8(0), info.shape)).shape
    return Written(shape, dtype or info.dtype, path, transform)


def read_tensors(stored: Stored, tensors: Iterable[Written], bar: tqdm) -> Iterator[np.ndarray]:
    """The tensors, in this order."""
    for batch in batches(tensors):
        params = load(stored, {tensor.path for tensor in batch})
        for tensor in batch:
            array = _published(tensor, params[tensor.path])
            yield array
            bar.update(array.nbytes)
        del params, array  # before the next ones are read


def batches(tensors: Iterable[Written]) -> Iterator[list[Written]]:
    """The tensors, as many together as may be in memory at once."""
    batch: list[Written] = []
    size = 0
    for tensor in tensors:
        if batch and size + tensor.nbytes > checkpoint.BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(tensor)
        size += tensor.nbytes
    if batch:
        yield batch


def load(stored: Stored, paths: set[str]) -> dict[str, np.ndarray]:
    """These parameters alone, in host memory, as they are stored."""
    wanted = {
        path: np.broadcast_to(np.zeros((), info.dtype), info.shape) if path in paths else ocp.PLACEHOLDER
        for path, info in stored.infos.items()
    }
    loaded = checkpoint.load_tree(stored.path, unflatten_dict(wanted, sep="/"), _remedy(stored.path), alone=True)
    return {path: array for path, array in flatten_dict(loaded, sep="/").items() if path in paths}


def _published(tensor: Written, param: np.ndarray) -> np.ndarray:
    array = key_table.invert_transform(tensor.transform, key_table.cast(param, tensor.dtype, tensor.path))
    if array.shape == tensor.shape:
        return array
    mean = array.mean(axis=0, dtype=np.float32).astype(array.dtype)
    return np.concatenate([array, np.broadcast_to(mean, (tensor.shape[0] - len(array), len(mean)))])


def quiet_orbax() -> None:
    """For a command: what fails in Orbax is raised, so what it logs about that is dropped."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
