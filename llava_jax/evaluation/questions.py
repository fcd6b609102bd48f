"""Question files as the reference's evaluation programs read them, and what each question asks.

Sources: `llava/eval/model_vqa_loader.py`, `model_vqa.py`, `model_vqa_science.py` and `model_vqa_mmbench.py`. An entry
that cannot be asked is a `Question` with an `error`, so that the others are asked and the order stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_jax.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_jax.evaluation.mmbench_table import OPTIONS, MMBenchRow, is_none, picture_reader, read_mmbench
from llava_jax.fields import problem_of
from llava_jax.inputs.text import text_problem
from llava_jax.records import parse_json, read_json, read_lines

LAYOUTS = ("loader", "vqa", "science", "mmbench")  # named for the reference's programs
LANGUAGES = ("en", "cn")
SINGLE_PRED_PROMPT = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
ID = (str, int, float, bool, type(None))  # the reference repeats whatever an id is; its scorers look these up


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
        note: what of its row is not asked, as in the reference, though it stands in the file (MMBench).
    """

    question_id: str | int | float | None
    text: str
    prompt: str
    image: str | bytes | None
    fields: Mapping[str, object] = field(default_factory=dict)
    error: str | None = None
    note: str | None = None


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
        questions = _read_lines(path)
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


# ---- entries


def _question(
    where: str, question_id, text, prompt, image, fields=None, problem: str | None = None, note: str | None = None
) -> Question:
    problem = problem or _text_problem(text)
    return Question(question_id, text, prompt, image, fields or {}, f"{where}: {problem}" if problem else None, note)


def _malformed(where: str, entry: object, id_key: str, problem: str) -> Question:
    """A question that repeats the id, if it can be read."""
    question_id = entry.get(id_key) if isinstance(entry, dict) else None
    return _question(where, question_id if isinstance(question_id, ID) else None, "", "", None, problem=problem)


def _text_problem(text: str) -> str | None:
    if DEFAULT_IMAGE_TOKEN in text:
        return f"the question has {DEFAULT_IMAGE_TOKEN}, but the one image is put in front of it; take it out"
    problem = text_problem(text)
    return problem and f"the question {problem}"


def _read_lines(path) -> list[Question]:
    """model_vqa_loader and model_vqa: {"question_id", "image", "text"} a line."""
    questions, readable = [], False
    for n, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {n}"
        try:
            entry = parse_json(line, where)
            readable = True
        except ValueError as error:
            questions.append(Question(None, "", "", None, error=str(error)))
        else:
            questions.append(_of_line(entry, where))
    if questions and not readable:
        raise ValueError(f"{path}: no line of it is JSON; the first error: {questions[0].error}")
    return questions


def _of_line(entry: Any, where: str) -> Question:
    if problem := problem_of(entry, {"question_id": ID, "image": (str,), "text": (str,)}):
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
    problem = problem_of(entry, {"id": ID, "conversations": (list,)} | ({"image": (str,)} if has_image else {}))
    if not problem:
        turns = entry["conversations"]
        problem = problem_of(turns[0], {"value": (str,)}) if turns else "'conversations' is empty"
    if problem:
        return _malformed(where, entry, "id", problem)
    text = turns[0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip() + ending
    prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if has_image else text
    return _question(where, entry["id"], text, prompt, entry.get("image"))


def _read_mmbench(path, sentence: str | bool, all_rounds: bool) -> list[Question]:
    columns, rows = read_mmbench(path)
    if missing := [name for name in ("question", "hint", *OPTIONS, "image") if name not in columns]:
        raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns):.500}")
    picture_of = picture_reader(rows)
    return [question for row in rows for question in _of_row(row, picture_of, sentence, all_rounds)]


def _of_row(row: MMBenchRow, picture_of: Callable[[str], bytes], sentence, all_rounds: bool) -> list[Question]:
    """model_vqa_mmbench: one question a round; the first empty option ends them; the sentence is not echoed."""
    question, hint, cell, options = row.cells["question"], row.cells["hint"], row.cells["image"], row.options
    empty = [name for name in ("index", "question", "image") if row.cells[name] is None]
    problem = row.problem or (f"its {', '.join(empty)} is empty" if empty else None)
    image = None
    if cell:
        try:
            image = picture_of(cell)
        except ValueError as error:
            problem = problem or str(error)
    asked = (question or "") if is_none(hint) else f"{hint}\n{question or ''}"
    if all_rounds and not options:  # the reference leaves such a row out without a word
        problem = problem or f"its {OPTIONS[0]} is empty, so there is no option to rotate"
    letters = OPTIONS[: len(options)]
    rounds = []
    for r in range(max(1, len(options)) if all_rounds else 1):
        turned = options[r:] + options[:r]
        prompt = "\n".join([asked, *(f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True))])
        text = f"{prompt}\n{sentence}" if sentence else prompt
        fields = {"round_id": r, "options": turned, "option_char": letters[r:] + letters[:r]}
        rounds.append(_question(row.where, row.index, text, prompt, image, fields, problem, row.lost))
    return rounds
