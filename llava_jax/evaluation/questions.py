"""Questions as the reference's evaluation programs read them from their files, and what each question asks.

Sources: `llava/eval/model_vqa_loader.py` and `model_vqa.py`; benchmarks/scienceqa.py and mmbench.py have the other two.
An entry that cannot be asked is a `Question` with an `error`, so that the others are asked and the order stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llava_jax.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava_jax.fields import problem_of
from llava_jax.inputs.text import text_problem
from llava_jax.records import json_lines

SINGLE_PRED_PROMPT = {  # by language
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
ID = (str, int, float, bool, type(None))  # the reference repeats whatever an id is; its scorers look these up


@dataclass(frozen=True)
class Question:
    """One question: what is asked, and what its answer's line repeats.

    `image` is a file's name within the image folder, or what stands for itself (see `inputs.image.image_source`); an
    image file's bytes (MMBench), or None.
    """

    question_id: str | int | float | None  # as in the file; None where a malformed entry has none that can be read
    text: str  # what is asked, without `<image>`; `user_turn` puts the image in front
    prompt: str  # the answer's "prompt"; not always the text (MMBench: without the single-pred sentence)
    image: str | bytes | None
    fields: Mapping[str, object] = field(default_factory=dict)  # more of the answer's line, in the reference's order
    error: str | None = None  # why it cannot be asked, naming file and line
    note: str | None = None  # what of its row is not asked, as in the reference, though it stands in the file (MMBench)
    answer_id: str = ""  # what its answer is known by, in this run and when it is started again; given by `prepare`


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


def get_chunk(questions: list[Question], n: int, k: int) -> list[Question]:
    """Chunk k of n, as the reference's function of this name; empty where there are too few questions for it to exist.

    The reference divides MMBench's rows, so the rounds of one row stay together.
    """
    if not 0 <= k < n:
        raise ValueError(f"chunk {k} of {n}: --chunk-idx must be from 0 to --num-chunks - 1")
    starts = [i for i, question in enumerate(questions) if question.fields.get("round_id", 0) == 0]
    size = math.ceil(len(starts) / n)
    first, last = (min(chunk * size, len(starts)) for chunk in (k, k + 1))
    starts.append(len(questions))
    return questions[starts[first] : starts[last]]


# ---- question files


@dataclass(frozen=True)
class PromptFlags:
    """Flags of the reference's science and mmbench programs."""

    single_pred_prompt: bool = False  # ask for the option's letter
    all_rounds: bool = False  # one question for each rotation of the options
    lang: str = "en"  # in which the letter is asked for


@dataclass(frozen=True)
class Layout:
    """How one of the reference's programs reads its question file and asks."""

    name: str  # the program's, without `model_vqa_`
    read: Callable[[Any, PromptFlags], list[Question]]  # (path, flags) → the file's questions, in its order
    max_new_tokens: int
    rgb: bool  # whether it converts pictures to RGB before everything else
    ending: str = ""  # a file's, by which this layout is picked where no task is named
    single_pred_prompt: bool = False  # whether it has this flag
    all_rounds: bool = False  # and this one


def read_questions(path, layout: Layout, flags: PromptFlags = PromptFlags()) -> list[Question]:
    """The questions of a local or `gs://` file, in its order; ValueError if it has none, is not of this layout as a
    whole, or the layout has no such flag."""
    if flags.single_pred_prompt and not layout.single_pred_prompt:
        raise ValueError(f"single_pred_prompt: the {layout.name} layout has none, its questions say it themselves")
    if flags.all_rounds and not layout.all_rounds:
        raise ValueError(f"all_rounds: the {layout.name} layout has none, only mmbench rotates its options")
    if flags.lang not in SINGLE_PRED_PROMPT:
        raise ValueError(f"lang={flags.lang!r} is not known; use one of {', '.join(SINGLE_PRED_PROMPT)}")
    questions = layout.read(path, flags)
    if not questions:
        raise ValueError(f"{path}: has no questions")
    return questions


def checked_question(where: str, question: Question) -> Question:
    """The question, with an error that names its place if it has a problem or its text cannot be asked."""
    problem = question.error or _text_problem(question.text)
    return replace(question, error=f"{where}: {problem}") if problem else question


def malformed_question(where: str, entry: object, id_key: str, problem: str) -> Question:
    """A question that repeats the id, if it can be read."""
    question_id = entry.get(id_key) if isinstance(entry, dict) else None
    return Question(question_id if isinstance(question_id, ID) else None, "", "", None, error=f"{where}: {problem}")


def _text_problem(text: str) -> str | None:
    if DEFAULT_IMAGE_TOKEN in text:
        return f"the question has {DEFAULT_IMAGE_TOKEN}, but the one image is put in front of it; take it out"
    problem = text_problem(text)
    return problem and f"the question {problem}"


def _read_lines(path, flags: PromptFlags) -> list[Question]:
    """{"question_id", "image", "text"} a line."""
    lines = list(json_lines(path))
    if lines and all(isinstance(entry, ValueError) for _, entry in lines):
        raise ValueError(f"{path}: no line of it is JSON; the first error: {lines[0][1]}")
    return [_of_line(where, entry) for where, entry in lines]


def _of_line(where: str, entry: Any) -> Question:
    if isinstance(entry, ValueError):
        return Question(None, "", "", None, error=str(entry))
    if problem := problem_of(entry, {"question_id": ID, "image": (str,), "text": (str,)}):
        return malformed_question(where, entry, "question_id", problem)
    return checked_question(where, Question(entry["question_id"], entry["text"], entry["text"], entry["image"]))


LOADER = Layout("loader", _read_lines, max_new_tokens=128, rgb=True, ending=".jsonl")
VQA = Layout("vqa", _read_lines, max_new_tokens=1024, rgb=True)
