"""Question files as the reference's evaluation programs read them, and what each question asks.

Sources: `llava/eval/model_vqa_loader.py`, `model_vqa.py`, `model_vqa_science.py` and `model_vqa_mmbench.py`. An entry
that cannot be asked is a `Question` with an `error`, so that the others are asked and the order stays.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from etils import epath

from llava_jax.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_jax.inputs.text import text_problem

LAYOUTS = ("loader", "vqa", "science", "mmbench")  # named for the reference's programs
LANGUAGES = ("en", "cn")
SINGLE_PRED_PROMPT = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
OPTIONS = ["A", "B", "C", "D"]
_ID = (str, int, float, type(None))


@dataclass(frozen=True)
class Question:
    """One question: what is asked, and what its answer's line repeats.

    Attributes:
        question_id: as it stands in the file; None where a malformed entry has none that can be read.
        text: what is asked, without `<image>`; `user_turn` puts the image in front.
        prompt: echoed in the answer's "prompt"; it is not always the text (MMBench: without the single-pred sentence).
        image: a file's name within the image folder, or what stands for itself (see `inputs.image.image_source`); an
            image file's bytes (MMBench), or None.
        fields: further fields of the answer's line, in the reference's order (MMBench: round_id, options, option_char).
        error: why it cannot be asked, naming file and line.
    """

    question_id: str | int | float | None
    text: str
    prompt: str
    image: str | bytes | None
    fields: Mapping[str, object] = field(default_factory=dict)
    error: str | None = None


def user_turn(question: Question, mm_use_im_start_end: bool = False) -> str:
    """The user's message, to the letter of the reference's programs: the image in front, if there is one.

    `user_message` would replace an `<image-placeholder>` that the text has; these programs leave it.
    """
    if question.image is None:
        return question.text
    token = DEFAULT_IMAGE_TOKEN
    if mm_use_im_start_end:
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    return f"{token}\n{question.text}"


def read_questions(
    path, layout: str, *, single_pred_prompt: bool = False, all_rounds: bool = False, lang: str = "en"
) -> list[Question]:
    """The questions of a file, in its order.

    Args:
        path: a local or `gs://` path.
        layout: "loader" or "vqa": a JSON object a line; "science": a JSON list; "mmbench": a table with tabs.
        single_pred_prompt: science and mmbench: ask for the option's letter.
        all_rounds: mmbench: one question for each rotation of the options.
        lang: mmbench: in which language the letter is asked for.

    Raises:
        FileNotFoundError: the file cannot be read.
        ValueError: it has no questions, is not of this layout as a whole, or an argument is not this layout's.
    """
    _check_arguments(layout, single_pred_prompt, all_rounds, lang)
    if layout == "science":
        questions = _read_science(path, single_pred_prompt)
    elif layout == "mmbench":
        questions = _read_mmbench(path, single_pred_prompt and SINGLE_PRED_PROMPT[lang], all_rounds)
    else:
        questions = [_of_line(line, f"{path}, line {n}") for n, line in enumerate(read_lines(path), 1)]
    if not questions:
        raise ValueError(f"{path}: has no questions")
    return questions


def get_chunk(questions: Sequence[Question], n: int, k: int) -> Sequence[Question]:
    """Chunk k of n, as the reference's function of this name; empty where there are too few questions for it to exist.

    The reference divides MMBench's rows, so the rounds of one row stay together.

    Raises:
        ValueError: k is not one of 0 … n-1.
    """
    if not 0 <= k < n:
        raise ValueError(f"chunk {k} of {n}: --chunk-idx must be from 0 to --num-chunks - 1")
    starts = [i for i, question in enumerate(questions) if question.fields.get("round_id", 0) == 0]
    size = math.ceil(len(starts) / n)
    first, last = (min(chunk * size, len(starts)) for chunk in (k, k + 1))
    starts.append(len(questions))
    return questions[starts[first] : starts[last]]


def _check_arguments(layout: str, single_pred_prompt: bool, all_rounds: bool, lang: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    if single_pred_prompt and layout not in ("science", "mmbench"):
        raise ValueError(f"single_pred_prompt: the {layout} layout has none, its questions say it themselves")
    if all_rounds and layout != "mmbench":
        raise ValueError(f"all_rounds: the {layout} layout has none, only mmbench rotates its options")
    if lang not in LANGUAGES:
        raise ValueError(f"lang={lang!r} is not known; use one of {', '.join(LANGUAGES)}")


# ---- files


def read_file(path) -> bytes:
    """A file's bytes, local or `gs://`.

    Raises:
        FileNotFoundError: it is not there, or cannot be read.
    """
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_lines(path) -> list[bytes]:
    """A file's lines without their ends, as Python reads a text file; blank ones at the end are left out."""
    return read_file(path).rstrip().splitlines()


def read_json(path) -> Any:
    """A JSON file's content.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_file(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


class Row(NamedTuple):
    """A row of a table: the line on which it starts, and its cells; None is an empty one."""

    line: int
    cells: Sequence[str | None]


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
            rows.append(Row(line, cells))
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)
    last = rows.pop()
    if last.cells != sentinel.split("\t"):
        raise ValueError(f"{path}, line {last.line}: a quotation mark is never closed")
    rows = [row for row in rows if lines[row.line - 1].strip(" \r\n")]
    if not rows:
        raise ValueError(f"{path}: is empty; expected a first line that names the columns")
    columns = [name or f"Unnamed: {i}" for i, name in enumerate(rows[0].cells)]
    return columns, [Row(row.line, _filled(row.cells, len(columns))) for row in rows[1:]]


def _filled(cells: Sequence[str | None], width: int) -> list[str | None]:
    return [None if cell in _EMPTY else cell for cell in cells] + [None] * (width - len(cells))


_INTEGER = re.compile(r" *[+-]?[0-9]+ *")
_NUMBER = re.compile(r" *[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)? *")


def typed(column: Sequence[str | None]) -> list[int | float | str | None]:
    """A column's cells as pandas types them: all integers, or all numbers (an empty one is NaN), or all text."""
    filled = [cell for cell in column if cell is not None]
    if len(filled) == len(column) and all(map(_INTEGER.fullmatch, filled)):
        return [int(cell) for cell in filled]
    if all(map(_NUMBER.fullmatch, filled)):
        return [math.nan if cell is None else float(cell) for cell in column]
    return list(column)


# ---- entries


def _question(where: str, question_id, text, prompt, image, fields=None, problem: str | None = None) -> Question:
    problem = problem or _text_problem(text)
    return Question(question_id, text, prompt, image, fields or {}, f"{where}: {problem}" if problem else None)


def _malformed(where: str, entry: object, id_key: str, problem: str) -> Question:
    """A question that repeats the id, if it can be read."""
    question_id = entry.get(id_key) if isinstance(entry, dict) else None
    return _question(where, question_id if isinstance(question_id, _ID) else None, "", "", None, problem=problem)


def _text_problem(text: str) -> str | None:
    if DEFAULT_IMAGE_TOKEN in text:
        return f"the question has {DEFAULT_IMAGE_TOKEN}, but the one image is put in front of it; take it out"
    return (problem := text_problem(text)) and f"the question {problem}"


def _problem(entry: object, kinds: Mapping[str, tuple[type, ...]]) -> str | None:
    """What an entry lacks of being an object with these keys, of these types."""
    if not isinstance(entry, dict):
        return f"expected an object with {', '.join(kinds)}, got {type(entry).__name__}"
    if missing := [key for key in kinds if key not in entry]:
        return f"has no {', '.join(map(repr, missing))}"
    wrong = [key for key, types in kinds.items() if not isinstance(entry[key], types)]
    return f"{wrong[0]!r} must be a {kinds[wrong[0]][0].__name__}, got {entry[wrong[0]]!r:.80}" if wrong else None


def _of_line(line: bytes, where: str) -> Question:
    """model_vqa_loader and model_vqa: {"question_id", "image", "text"}."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _malformed(where, None, "question_id", f"not JSON ({error})")
    if problem := _problem(entry, {"question_id": _ID, "image": (str,), "text": (str,)}):
        return _malformed(where, entry, "question_id", problem)
    return _question(where, entry["question_id"], entry["text"], entry["text"], entry["image"])


def _read_science(path, single_pred_prompt: bool) -> list[Question]:
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of questions, got {type(entries).__name__}")
    ending = "\n" + SINGLE_PRED_PROMPT["en"] if single_pred_prompt else ""
    return [_of_science(entry, f"{path}, entry {n}", ending) for n, entry in enumerate(entries, 1)]


def _of_science(entry: Any, where: str, ending: str) -> Question:
    """model_vqa_science: {"id", "conversations": [{"value"}, …], "image" or none}; `<image>` is taken out."""
    has_image = isinstance(entry, dict) and "image" in entry
    kinds = {"id": _ID, "conversations": (list,)} | ({"image": (str,)} if has_image else {})
    problem = _problem(entry, kinds)
    if not problem:
        turns = entry["conversations"]
        problem = _problem(turns[0], {"value": (str,)}) if turns else "'conversations' is empty"
    if problem:
        return _malformed(where, entry, "id", problem)
    text = turns[0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip() + ending
    prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if has_image else text
    return _question(where, entry["id"], text, prompt, entry.get("image"))


def _is_none(value: str | None) -> bool:
    """The reference's function of this name, for cells."""
    return value is None or value.lower() in ("nan", "none")


def _read_mmbench(path, sentence: str | bool, all_rounds: bool) -> list[Question]:
    columns, rows = read_table(path)
    if missing := [name for name in ("index", "question", "hint", *OPTIONS, "image") if name not in columns]:
        raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns)}")
    ids = typed([row.cells[columns.index("index")] for row in rows])
    questions = []
    for row, question_id in zip(rows, ids, strict=True):
        where = f"{path}, line {row.line}"
        if len(row.cells) > len(columns):
            problem = f"has {len(row.cells)} cells for {len(columns)} columns"
            cells = dict.fromkeys(columns) | {"index": row.cells[columns.index("index")]}
        else:
            problem, cells = None, dict(zip(columns, row.cells, strict=True))
        questions += _of_row(cells, where, question_id, sentence, all_rounds, problem)
    return questions


def _of_row(cells, where: str, question_id, sentence, all_rounds: bool, problem: str | None) -> list[Question]:
    """model_vqa_mmbench: one question a round; the first empty option ends them; the sentence is not echoed."""
    question, hint = cells["question"], cells["hint"]
    empty = [name for name in ("index", "question", "image") if cells[name] is None]
    problem = problem or (f"its {', '.join(empty)} is empty" if empty else None)
    try:
        image = base64.b64decode(cells["image"]) if cells["image"] else None
    except ValueError as error:
        image, problem = None, problem or f"its image is not base64 ({error})"
    asked = (question or "") if _is_none(hint) else f"{hint}\n{question or ''}"
    options = list(takewhile(lambda value: not _is_none(value), (cells[name] for name in OPTIONS)))
    if all_rounds and not options:  # the reference leaves such a row out without a word
        problem = problem or f"its {OPTIONS[0]} is empty, so there is no option to rotate"
    letters = OPTIONS[: len(options)]
    question_id = None if cells["index"] is None else question_id
    rounds = []
    for r in range(max(1, len(options)) if all_rounds else 1):
        turned = options[r:] + options[:r]
        prompt = "\n".join([asked, *(f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True))])
        text = f"{prompt}\n{sentence}" if sentence else prompt
        fields = {"round_id": r, "options": turned, "option_char": letters[r:] + letters[:r]}
        rounds.append(_question(where, question_id, text, prompt, image, fields, problem))
    return rounds
