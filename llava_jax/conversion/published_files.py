"""Where published tensors come from: a local directory or the hub; safetensors or torch's `.bin`; one at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the dtype bfloat16)
import numpy as np

from llava_jax.config_schema import HEADER, read_checked, read_if_there
from llava_jax.conversion.key_table import TensorInfo
from llava_jax.errors import listed, reason_of
from llava_jax.fields import require
from llava_jax.files import write_atomically
from llava_jax.records import parse_json

# In the order of preference, as in transformers: the file itself, or an index that lists the shards.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GET_AGAIN = "get the file again"
PROJECTOR_FILE = "mm_projector.bin"
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


@dataclass(frozen=True)
class Tensor(TensorInfo):
    """A published tensor: what its header says, its file, and how to read it.

    `read` may be given a buffer (uint8) of at least its bytes to read into: new memory costs more than reading.
    """

    file: Path
    read: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Location:
    """A checkpoint directory: local, or a hub repository's snapshot at one commit, to which `fetch` adds files."""

    given: str
    path: Path
    commit: str | None = None

    def fetch(self, names: Iterable[str]) -> None:
        """Download these files (names or patterns) into the snapshot; a local directory has what it has."""
        if self.commit is not None:
            hub_snapshot(self.given, self.commit, list(names))

    def read_json(self, name: str) -> dict | None:
        """A JSON file of the directory; None where there is none."""
        return read_if_there(self.path / name, GET_AGAIN)

    def read_config(self) -> dict:
        """`config.json`, which a published checkpoint has."""
        config = self.read_json("config.json")
        if config is None:
            raise FileNotFoundError(f"{self.given}: there is no config.json, so this is no published checkpoint")
        return config


def write_json(path: Path, value: dict) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def locate(source: str, revision: str | None = None) -> Location:
    """A local directory, or else a hub id, whose small files are fetched (huggingface_hub's cache, HF_HUB_OFFLINE and
    tokens apply).

    Raises:
        FileNotFoundError: neither of them can be had; the message says why.
    """
    path = Path(os.path.expanduser(source))  # Path's own raises for a home of nobody
    if source and path.is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {source} is a local directory; a revision is for a hub id only")
        return Location(source, path.resolve())
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise FileNotFoundError(f"{source!r}: no such directory, and not a hub id (owner/name)")
    snapshot = hub_snapshot(source, revision, list(SMALL_FILES))
    return Location(source, snapshot, snapshot.name)


def hub_snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        reason = "the hub asks for permission; accept its terms there, and log in with `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the hub has no revision {revision!r} of it; correct --revision"
    except errors.RepositoryNotFoundError:
        reason = "no such directory here, and no such model on the hub (if it is private, log in or set HF_TOKEN)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            f"no such directory here, not in the hub's local cache{at}, and the hub cannot be reached "
            "(HF_HUB_OFFLINE, or no connection); go online, or download it first and give the directory"
        )
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = f"the hub gave an error: {error}"
    raise FileNotFoundError(f"{repo}: {reason}")


# ---- the tensors of a directory


def open_checkpoint(location: Location) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, from the headers alone; nothing is read yet.

    Raises:
        FileNotFoundError: no weights, or a shard that the index lists is absent.
        ValueError: a file is truncated or damaged, or the index and its shards disagree.
    """
    for name in WEIGHT_FILES:
        location.fetch([name])
        path = location.path / name
        if path.is_file():
            return _open_sharded(location, path) if name.endswith(".json") else open_file(path)
    hint = ""
    if (location.path / PROJECTOR_FILE).is_file():
        hint = f"; it has {PROJECTOR_FILE}, so it is a stage-1 projector: give its language model with --model-base"
    elif (location.path / "adapter_config.json").is_file():
        hint = "; it is a LoRA adapter: merge it into its base model first"
    raise FileNotFoundError(f"{location.given}: no weights ({', '.join(WEIGHT_FILES)}){hint}")


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_sharded(location: Location, index: Path) -> dict[str, Tensor]:
    weight_map = read_checked(index, GET_AGAIN)["weight_map"]
    shards = sorted(set(weight_map.values()))
    location.fetch(shards)
    absent = [shard for shard in shards if not (location.path / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{location.path}: {index.name} lists {', '.join(absent)}, absent; download it again")
    tensors: dict[str, Tensor] = {}
    lies, unlisted = [], []
    for shard in shards:
        held = open_file(location.path / shard)
        lies += [f"{n:.200} ({shard})" for n, file in weight_map.items() if file == shard and n not in held]
        tensors |= {n: t for n, t in held.items() if weight_map.get(n) == shard}
        unlisted += [f"{n:.200} ({shard})" for n in held if n not in weight_map]
    for what, names in (("lists tensors that their files do not hold", lies), ("leaves out tensors", unlisted)):
        if names:
            raise ValueError(f"{index}: {what}: {listed(names)}; download it and its files again")
    return tensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise ValueError(f"{path}: truncated, or not a safetensors file (a git-lfs pointer?); download it again")
        try:
            entries = _read_entries(parse_json(file.read(length), str(path)))
        except ValueError:
            raise ValueError(f"{path}: its safetensors header is damaged; download it again") from None
    start = 8 + length
    end = start + max((stop for *_, stop in entries.values()), default=0)
    if size != end:
        what = "truncated" if size < end else "damaged"
        raise ValueError(f"{path}: {what}: {size} bytes of {end}; download it again")
    tensors = {}
    for name, (dtype, shape, begin, _) in entries.items():
        tensors[name] = Tensor(shape, dtype, path, partial(_read_safetensors, path, dtype, shape, start + begin))
    return tensors


def _read_entries(header: Any) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Name → (dtype, shape, first byte, end) of each tensor.

    Raises:
        ValueError: damaged; tensors fill their file without a gap, as in the safetensors library.
    """
    if isinstance(header, dict):
        header = {name: entry for name, entry in header.items() if name != "__metadata__"}
    require(header, HEADER, "header")
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
        begin, stop = entry["data_offsets"]
        known = entry["dtype"] in SAFETENSORS_DTYPES
        if begin != end or (known and stop - begin != TensorInfo(shape, dtype).nbytes):
            raise ValueError(f"{name} is not where it should be")
        entries[name], end = (dtype, shape, begin, stop), stop
    return entries


def _read_safetensors(
    path: Path, dtype: str, shape: tuple[int, ...], offset: int, buffer: np.ndarray | None = None
) -> np.ndarray:
    nbytes = TensorInfo(shape, dtype).nbytes
    room = np.empty(nbytes, np.uint8) if buffer is None else buffer[:nbytes]
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(room):  # a single read stops at 2 GiB
            count = file.readinto(room[done:].data)
            if not count:
                raise ValueError(f"{path}: became shorter while it was read; download it again")
            done += count
    return room.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _open_torch(path: Path) -> dict[str, Tensor]:
    """A `.bin` file: its tensors stay on disk (memory-mapped) until they are read."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: reading a .bin file needs PyTorch; run `pip install torch`") from None
    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except Exception as error:  # of every kind, as bytes of it happen to be read
        reason = reason_of(error)
        raise ValueError(f"{path}: truncated, or not a file of tensors ({reason}); download it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a dictionary of tensors, so no published weights")
    return {
        name: Tensor(tuple(t.shape), str(t.dtype).removeprefix("torch."), path, partial(_read_torch, t))
        for name, t in state.items()
    }


def check_blob(path: Path) -> None:
    """See that a file in huggingface_hub's cache is what was published: a large one's blob is named by its SHA-256.

    Raises:
        ValueError: it is not.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        raise ValueError(f"{path}: damaged (its SHA-256 is not the hub's); delete {blob} and download it again")


def _read_torch(tensor, _buffer: np.ndarray | None = None) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has it from ml_dtypes, which torch does not know
        return tensor.view(torch.uint16).numpy().view("bfloat16")
    return tensor.numpy()
