"""JSON and lines of JSON as other people write them, local or gs://: what is wrong is one error that names the place.

Imports neither JAX nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath


def read_file(path) -> bytes:
    """A file's bytes.

    Raises:
        FileNotFoundError: it is not there, or cannot be read.
    """
    try:
        return epath.Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        reason = getattr(error, "strerror", None) or error
        raise FileNotFoundError(f"{path}: cannot be read ({reason})") from error


def read_lines(path) -> list[bytes]:
    """A file's lines without their ends, as Python reads a text file; blank ones at the end are left out."""
    return read_file(path).rstrip().splitlines()


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
        reason = str(error)
    raise ValueError(f"{where}: not JSON ({reason}){remedy and '; ' + remedy}")


def read_json(path, remedy: str = "") -> Any:
    """A JSON file's content.

    Raises:
        FileNotFoundError: it is not there, or cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(read_file(path), str(path), remedy)


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


def problem_of(entry: object, kinds: Mapping[str, tuple[type, ...]]) -> str | None:
    """What an entry lacks of being an object with these keys, of these types; None where it lacks nothing.

    True and False are of type bool alone here, though Python counts them among the integers.
    """
    if not isinstance(entry, dict):
        return f"expected an object with {', '.join(kinds)}, got {type(entry).__name__}"
    if missing := [key for key in kinds if key not in entry]:
        return f"has no {', '.join(map(repr, missing))}"
    for key, types in kinds.items():
        value = entry[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return f"{key!r} must be a {types[0].__name__}, got {value!r:.80}"
    return None
