"""Tables with tabs, as pandas reads them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.records import read_file


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        line: on which it starts.
        cells: None is an empty one.
        written: the cells as they stand in the file.
    """

    line: int
    cells: Sequence[str | None]
    written: Sequence[str]


# What pandas takes for an empty cell.
_EMPTY = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)


def read_table(path) -> tuple[list[str], list[Row]]:
    """The columns and rows of a table with tabs, as pandas' `read_table` reads it, but with all cells as text.

    A row that is too short is filled with empty cells; one that is too long is left so.

    Raises:
        FileNotFoundError: the file cannot be read.
        ValueError: it is not UTF-8, has no columns, or a quotation mark is never closed.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    sentinel = "\0\tend"  # the last row, of two cells unless a quotation mark is open
    limit = csv.field_size_limit(len(text) + len(sentinel) + 1)  # the process's own; pictures are longer
    try:
        lines = [*io.StringIO(text, newline=""), sentinel]
        reader = csv.reader(lines, delimiter="\t")
        rows, line = [], 1
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


def _row(line: int, cells: Sequence[str], width: int) -> Row:
    written = [*cells, *[""] * (width - len(cells))]
    return Row(line, [None if cell in _EMPTY else cell for cell in written], written)


_INTEGER = re.compile(r" *[+-]?[0-9]+ *")
_NUMBER = re.compile(r" *[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)? *")
_LONGEST = 4000  # characters of a number; Python refuses integers of more than 4300 digits


def typed(column: Sequence[str | None]) -> list[int | float | str | None]:
    """A column's cells as pandas types them: all integers, or all numbers (an empty one is NaN), or all text."""
    filled = [cell for cell in column if cell is not None]
    if filled and all(map(_INTEGER.fullmatch, filled)):
        if not _fit(filled):
            return list(column)
        if len(filled) == len(column):
            return [int(cell) for cell in filled]
    if all(map(_NUMBER.fullmatch, filled)):
        return [math.nan if cell is None else float(cell) for cell in column]
    return list(column)


def _fit(integers: Sequence[str]) -> bool:
    """Whether they have room in int64 or, all of them, in uint64."""
    if any(len(text) > _LONGEST for text in integers):
        return False
    numbers = [int(text) for text in integers]
    low, high = min(numbers), max(numbers)
    return high < 1 << (63 if low < 0 else 64) and low >= -(1 << 63)
