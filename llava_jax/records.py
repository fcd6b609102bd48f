"""JSON and lines of JSON as other people write them, local or gs://: what is wrong is one error that names the place.

Imports neither JAX nor torch.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from llava_jax.errors import reason_of
from llava_jax.fields import Kind, check_of, refuse, shown

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's little-endian mark begins with the first, too
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how what git clones in place of a large file begins


def read_file(path, remedy: str = "") -> bytes:
    """A file's bytes.

    Raises:
        FileNotFoundError: it is not there, or cannot be read.
    """
    try:
        return epath.Path(path).read_bytes()
    except Exception as error:  # a NUL in its name is a ValueError, and object stores have kinds of their own
        raise FileNotFoundError(f"{path}: cannot be read ({reason_of(error)}){remedy and '; ' + remedy}") from error


def read_lines(path) -> list[bytes]:
    """A file's lines without their ends, as Python reads a text file; blank ones at the end are left out.

    Raises:
        FileNotFoundError: it is not there, or cannot be read.
        ValueError: it is UTF-16 or UTF-32, as a whole.
    """
    data = read_file(path)
    if data.startswith(UTF_16):
        raise ValueError(f"{path}: is UTF-16 or UTF-32; save it as UTF-8")
    return data.rstrip().splitlines()


def parse_json(data: bytes | str, where: str, remedy: str = "") -> Any:
    """What a piece of JSON says.

    Args:
        where: what an error calls it: a file, or a file and a line.
        remedy: the end of an error's sentence, such as "get the file again".

    Raises:
        ValueError: not UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(data)
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:  # UnicodeDecodeError is one
        pointer = isinstance(data, bytes) and data.startswith(LFS_POINTER)
        reason = "a git-LFS pointer" if pointer else str(error)
    raise ValueError(f"{where}: not JSON ({reason}){remedy and '; ' + remedy}")


def read_json(path, remedy: str = "") -> Any:
    """A JSON file's content.

    Raises:
        FileNotFoundError: it is not there, or cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(read_file(path, remedy), str(path), remedy)


def read_json_object(path, remedy: str = "") -> dict:
    """`read_json` for a file that must hold an object.

    Raises:
        FileNotFoundError, ValueError: as `read_json`, or it holds something else.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        got = type(value).__name__
        raise ValueError(f"{path}: a JSON object was expected, not {got}{remedy and '; ' + remedy}")
    return value


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """A ValueError raised in this block begins with what it is about, such as a directory."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def read_objects(path, kinds: Mapping[str, Kind], remedy: str = "") -> list[dict]:
    """A file of JSON objects, one a line, each with these keys, of these kinds.

    Raises:
        FileNotFoundError, ValueError: as `read_lines` and `parse_json`, or a line is no such object.
    """
    lines = enumerate(read_lines(path), 1)
    return check_objects([parse_json(line, f"{path}, line {n}", remedy) for n, line in lines], kinds, path, remedy)


def check_objects(
    entries: object, kinds: Mapping[str, Kind], path, remedy: str = "", called: str = "line"
) -> list[dict]:
    """`entries` themselves, once they are seen to be a list of objects with these keys, of these kinds.

    Args:
        called: what an error calls one of them.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries, got {shown(entries)}{remedy and '; ' + remedy}")
    check = check_of(kinds)
    for number, entry in enumerate(entries, 1):
        refuse(check.problems("", entry), f"{path}, {called} {number}", remedy)
    return entries
