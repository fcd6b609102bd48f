"""JSON and lines of JSON as other people write them, local or gs://: what is wrong is one error that names the place.

Imports neither JAX nor torch.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from etils import epath

from llava_jax.files import reason_of

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's little-endian mark begins with the first, too
# Of a value: its types; an object's keys and their kinds; or, in a list, the kind of each of a list's entries.
Kind: TypeAlias = "tuple[type, ...] | Mapping[str, Kind] | list[Kind]"
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
    ending = remedy and "; " + remedy
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries, got {reprlib.repr(entries)}{ending}")
    for number, entry in enumerate(entries, 1):
        if problem := problem_of(entry, kinds):
            raise ValueError(f"{path}, {called} {number}: {problem}{ending}")
    return entries


def problem_of(entry: object, kinds: Mapping[str, Kind]) -> str | None:
    """What an entry lacks of being an object with these keys, of these kinds; None where it lacks nothing.

    True and False are of type bool alone here, though Python counts them among the integers.
    """
    if not isinstance(entry, dict):
        return f"expected an object with {', '.join(kinds)}, got {type(entry).__name__}"
    if missing := [key for key in kinds if key not in entry]:
        return f"has no {', '.join(map(repr, missing))}"
    for key, kind in kinds.items():
        if problem := _value_problem(entry[key], kind, repr(key)):
            return problem
    return None


def _value_problem(value: object, kind: Kind, name: str) -> str | None:
    if isinstance(kind, Mapping):
        problem = problem_of(value, kind)
        return problem and f"{name}: {problem}"
    types = (list,) if isinstance(kind, list) else kind
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return f"{name} must be a {types[0].__name__}, got {reprlib.repr(value)}"
    if isinstance(kind, list):
        assert isinstance(value, list)
        for number, item in enumerate(value, 1):
            if problem := _value_problem(item, kind[0], f"{name}, entry {number}"):
                return problem
    return None
