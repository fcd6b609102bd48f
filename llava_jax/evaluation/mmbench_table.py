"""MMBench's table, row by row, as the reference's `model_vqa_mmbench.py` reads it.

That an image cell may be another row's index is in VLMEvalKit's `vlmeval/dataset/image_base.py`.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llava_jax.evaluation.tables import read_table, typed

OPTIONS = ["A", "B", "C", "D"]
REFERENCE = 64  # characters of an image cell that may be another row's index; a picture has more


@dataclass(frozen=True)
class MMBenchRow:
    """A row.

    Attributes:
        where: file and line, for errors.
        index: the row's, as pandas types the column; None where it is empty.
        cells: column → text; None is an empty one.
        options: what is asked: the options before the first empty one.
        problem: why the row cannot be asked, or None.
        lost: which options stand in the file and are not asked, and by which cell; None where all are.
    """

    where: str
    index: int | float | str | None
    cells: Mapping[str, str | None]
    options: list[str]
    problem: str | None
    lost: str | None


def read_mmbench(path) -> tuple[list[str], list[MMBenchRow]]:
    """The columns and rows of MMBench's table.

    Raises:
        FileNotFoundError, ValueError: as `read_table`; or there is no column index.
    """
    columns, rows = read_table(path)
    if "index" not in columns:
        raise ValueError(f"{path}: has no column index; its columns are {', '.join(columns):.500}")
    at = columns.index("index")
    indices = typed([row.cells[at] for row in rows])
    return columns, [
        _row(f"{path}, line {row.line}", columns, row.cells, row.written, None if row.cells[at] is None else index)
        for row, index in zip(rows, indices, strict=True)
    ]


def _row(where: str, columns: Sequence[str], cells: Sequence[str | None], written: Sequence[str], index) -> MMBenchRow:
    if len(cells) > len(columns):  # which cell belongs to which column, nobody can say
        problem = f"has {len(cells)} cells for {len(columns)} columns"
        return MMBenchRow(where, index, dict.fromkeys(columns), [], problem, None)
    row = dict(zip(columns, cells, strict=True))
    options: list[str] = []
    for name in OPTIONS:
        value = row.get(name)
        if value is None or is_none(value):
            break
        options.append(value)
    return MMBenchRow(where, index, row, options, None, _lost(where, dict(zip(columns, written, strict=True)), options))


def is_none(value: str | None) -> bool:
    """The reference's function of this name, for cells."""
    return value is None or value.lower() in ("nan", "none")


def _lost(where: str, written: Mapping[str, str], options: Sequence[str]) -> str | None:
    lost = [name for name in OPTIONS[len(options) :] if written.get(name, "").lower() not in ("", "nan")]
    if not lost:
        return None
    ended_by = OPTIONS[len(options)]
    why = f"{written[ended_by]!r:.40} counts as empty" if written.get(ended_by) else "is empty"
    return f"{where}, column {ended_by}: {why}, as in the original; not asked: {', '.join(lost)}"


def picture_reader(rows: Sequence[MMBenchRow]) -> Callable[[str], bytes]:
    """image cell → picture's bytes, a row's own or the one of the row whose index the cell is.

    What it returns raises ValueError where there is none.
    """
    images = {index.strip(): row.cells["image"] for row in rows if (index := row.cells["index"])}
    decode = functools.cache(base64.b64decode)  # a picture is kept once, however many rows have it

    def read(cell: str) -> bytes:
        named: list[str] = []
        while len(cell) <= REFERENCE and (name := cell.strip()) in images:
            if name in named or not images[name]:
                raise ValueError(f"its image is row {[*named, name][0]}'s, which has none")
            named.append(name)
            cell = images[name] or ""
        whose = f"its image is row {named[0]}'s, which" if named else "its image"
        if cell.strip().isdecimal():
            raise ValueError(f"{whose} is {cell:.40}, neither base64 nor another row's index")
        try:
            return decode(cell)
        except ValueError as error:
            raise ValueError(f"{whose} is not base64 ({error})") from error

    return read
