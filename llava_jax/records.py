"""JSON, lines of JSON and tables as other people write them, local or gs://.

A file that is not there or cannot be read is a FileNotFoundError, one that is not as it should be a ValueError; either
names the place, and ends with `remedy` where there is one, such as "get the file again".
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from llava_jax.errors import reason_of
from llava_jax.fields import Kind, check_of, refuse, shown

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's little-endian mark begins with the first, too
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how what git clones in place of a large file begins


def read_file(path, remedy: str = "") -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except Exception as error:  # a NUL in its name is a ValueError, and object stores have kinds of their own
        raise FileNotFoundError(f"{path}: cannot be read ({reason_of(error)}){remedy and '; ' + remedy}") from error


def read_lines(path) -> list[bytes]:
    """A file's lines without their ends, as Python reads a text file; blank ones at the end are left out."""
    data = read_file(path)
    if data.startswith(UTF_16):
        raise ValueError(f"{path}: is UTF-16 or UTF-32; save it as UTF-8")
    return data.rstrip().splitlines()


def parse_json(data: bytes | str, where: str, remedy: str = "") -> Any:
    """What a piece of JSON says. `where` is what an error calls it: a file, or a file and a line."""
    try:
        return json.loads(data)
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:  # UnicodeDecodeError is one
        pointer = isinstance(data, bytes) and data.startswith(LFS_POINTER)
        reason = "a git-LFS pointer" if pointer else str(error)
    raise ValueError(f"{where}: not JSON ({reason}){remedy and '; ' + remedy}")


def read_json(path, remedy: str = "") -> Any:
    return parse_json(read_file(path, remedy), str(path), remedy)


def read_json_object(path, remedy: str = "") -> dict:
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        got = type(value).__name__
        raise ValueError(f"{path}: a JSON object was expected, not {got}{remedy and '; ' + remedy}")
    return value


def read_json_key(path, key: str, what: str) -> Any:
    """What the JSON object in a file has under a key. `what` is what an error says that the file should be."""
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path}: is not {what}")
    return content[key]


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """A ValueError raised in this block begins with what it is about, such as a directory."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def json_lines(path) -> Iterator[tuple[str, Any]]:
    """Of each line of a file its place and what it says; where it is not JSON, the ValueError about it."""
    for n, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {n}"
        try:
            yield where, parse_json(line, where)
        except ValueError as error:
            yield where, error


def read_objects(path, kinds: Mapping[str, Kind], remedy: str = "") -> list[dict]:
    """A file of JSON objects, one a line, each with these keys, of these kinds."""
    lines = enumerate(read_lines(path), 1)
    return check_objects([parse_json(line, f"{path}, line {n}", remedy) for n, line in lines], kinds, path, remedy)


def check_objects(
    entries: object, kinds: Mapping[str, Kind], path, remedy: str = "", called: str = "line"
) -> list[dict]:
    """`entries`, if they are a list of objects with these keys, of these kinds. An error calls one of them `called`."""
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries, got {shown(entries)}{remedy and '; ' + remedy}")
    check = check_of(kinds)
    for number, entry in enumerate(entries, 1):
        refuse(check.problems("", entry), f"{path}, {called} {number}", remedy)
    return entries


# ---- tables with tabs, as pandas reads them


@dataclass(frozen=True)
class TableRow:
    line: int  # on which it starts
    cells: Sequence[str | None]  # None is an empty one
    written: Sequence[str]  # the cells as they stand in the file


# What pandas takes for an empty cell.
_EMPTY = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)


def read_table(path) -> tuple[list[str], list[TableRow]]:
    """The columns and rows of a table with tabs, as pandas' `read_table` reads it, but with all cells as text.

    A row that is too short is filled with empty cells; one that is too long is left so.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    sentinel = "\0\tend"  # the last row, of two cells unless a quotation mark is open
    limit = csv.field_size_limit(len(text) + len(sentinel) + 1)  # the process's own; pictures are longer
    try:
        lines = [*io.StringIO(text, newline=""), sentinel]
        reader, rows, line = csv.reader(lines, delimiter="\t"), [], 1
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)
    line, cells = rows.pop()
    if cells != sentinel.split("\t"):
        raise ValueError(f"{path}, line {line}: a quotation mark is never closed")
    rows = [(line, cells) for line, cells in rows if lines[line - 1].strip(" \r\n")]
    if not rows:
        raise ValueError(f"{path}: is empty; expected a first line that names the columns")
    columns = [name or f"Unnamed: {i}" for i, name in enumerate(rows[0][1])]
    return columns, [_row(line, cells, len(columns)) for line, cells in rows[1:]]


def _row(line: int, cells: Sequence[str], width: int) -> TableRow:
    written = [*cells, *[""] * (width - len(cells))]
    return TableRow(line, [None if cell in _EMPTY else cell for cell in written], written)


_INTEGER = re.compile(r" *[+-]?[0-9]+ *")
_NUMBER = re.compile(r" *[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)? *")
_LONGEST = 4000  # characters of a number; Python refuses integers of more than 4300 digits


def typed(column: Sequence[str | None]) -> list[int | float | str | None]:
    """A column's cells as pandas types them: all integers, or all numbers (an empty one is NaN), or all text."""
    filled = [cell for cell in column if cell is not None]
    if filled and all(map(_INTEGER.fullmatch, filled)):
        if any(len(text) > _LONGEST for text in filled):
            return list(column)
        integers = [int(text) for text in filled]
        low, high = min(integers), max(integers)
        if low < -(1 << 63) or high >= 1 << (63 if low < 0 else 64):  # neither int64 nor uint64 has room for them
            return list(column)
        if len(filled) == len(column):
            return list(integers)
    if all(map(_NUMBER.fullmatch, filled)):
        return [math.nan if cell is None else float(cell) for cell in column]
    return list(column)
