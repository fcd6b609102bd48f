"""A converted checkpoint's checksums: recorded as it is written, compared when it is verified."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llava_jax import checkpoint
from llava_jax.checkpoint import CHECKSUMS
from llava_jax.config_schema import read_checked
from llava_jax.conversion.orbax_reader import Stored, as_tensor, batches, load, open_stored
from llava_jax.conversion.published_files import write_json


def checksum(array: np.ndarray) -> str:
    """CRC-32 of an array's bytes in C order."""
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def recorded(leaves: Iterable[tuple[str, np.ndarray]], record: dict[str, dict]) -> Iterator[tuple[str, np.ndarray]]:
    """The (path, array) pairs as they come; `record` gets the dtype and checksum of each."""
    for path, array in leaves:
        record[path] = {"dtype": array.dtype.name, "crc32": checksum(array)}
        yield path, array


def fingerprint(record: dict[str, dict]) -> str:
    """What tells these parameters from any others, the same wherever and whenever they are written."""
    leaves = [[path, record[path]["dtype"], record[path]["crc32"]] for path in sorted(record)]
    return hashlib.sha256(json.dumps(leaves).encode()).hexdigest()


def record_stored(path: Path) -> dict[str, dict]:
    """The record of an Orbax directory of parameters that has just been written, by any number of processes.

    One process calls this, and reads it back: a batch of parameters is in memory at a time.
    """
    stored = open_stored(path)
    record: dict[str, dict] = {}
    for batch in batches(as_tensor(stored, name, "identity") for name in sorted(stored.infos)):
        arrays = load(stored, {tensor.path for tensor in batch})
        for _ in recorded(arrays.items(), record):
            pass
    return record


def write_record(directory: Path, record: dict[str, dict]) -> None:
    """The record of the parameters, and the SHA-256 of the small files that stand beside them by now."""
    beside = sorted(path for path in directory.iterdir() if path.is_file() and path.name != CHECKSUMS)
    files = {path.name: checkpoint.sha256(path) for path in beside}
    write_json(directory / CHECKSUMS, {"files": files, "parameters": dict(sorted(record.items()))})


def check(directory: str | os.PathLike) -> list[str]:
    """What differs in a converted checkpoint from what was recorded when it was written: a line for each file or
    parameter; none: all is well. A directory without a record (trained, or converted before there was one) gets one
    line that says so. A batch of parameters is in memory at a time.

    Raises:
        FileNotFoundError: no such directory.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if not (directory / CHECKSUMS).is_file():
        return [f"{CHECKSUMS}: there is none (trained, or converted by an older llava_jax): nothing to compare with"]
    try:
        record = read_checked(directory / CHECKSUMS)
        stored = open_stored(directory / checkpoint.PARAMS)
    except ValueError as error:
        return [str(error)]
    return _check_files(directory, record["files"]) + _check_parameters(stored, record["parameters"])


def _check_files(directory: Path, files: dict[str, str]) -> list[str]:
    missing = [name for name in files if not (directory / name).is_file()]
    changed = [name for name in files if name not in missing and checkpoint.sha256(directory / name) != files[name]]
    return [f"{name}: missing" for name in missing] + [
        f"{name}: changed since it was written (its SHA-256 differs)" for name in changed
    ]


def _check_parameters(stored: Stored, parameters: dict[str, dict]) -> list[str]:
    problems = [f"{path}: missing" for path in sorted(parameters.keys() - stored.infos.keys())]
    problems += [
        f"{path}: was not written by the conversion" for path in sorted(stored.infos.keys() - parameters.keys())
    ]
    both = sorted(parameters.keys() & stored.infos.keys())
    for batch in batches(as_tensor(stored, path, "identity") for path in both):
        problems += _differences(stored, [tensor.path for tensor in batch], parameters)
    return problems


def _differences(stored: Stored, paths: list[str], parameters: dict[str, dict]) -> list[str]:
    try:
        arrays = load(stored, set(paths))
    except ValueError as error:
        if len(paths) == 1:
            return [f"{paths[0]}: cannot be read: {error}"]
        return [line for path in paths for line in _differences(stored, [path], parameters)]
    problems = []
    for path in paths:
        now = {"dtype": arrays[path].dtype.name, "crc32": checksum(arrays[path])}
        if now != parameters[path]:
            problems.append(f"{path}: changed since it was written (its dtype or CRC-32 differs)")
    return problems
