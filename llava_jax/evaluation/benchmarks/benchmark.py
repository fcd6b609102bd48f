"""What a benchmark is, as data and functions: each file of this folder has one `Benchmark`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_jax.evaluation.questions import ID, Layout
from llava_jax.fields import Kind
from llava_jax.records import read_objects

PUBLISHED_MODEL = "llava-v1.6-vicuna-7b"
PUBLISHED_SOURCE = "docs/MODEL_ZOO.md of github.com/haotian-liu/LLaVA"
MOST_NAMED_IDS = 3  # in an error
NOTES = "notes"  # among a score's figures, what to know about them: a list of lines
SERVER = "a test split has none, its server scores it (llava-jax submit makes the file)"


@dataclass(frozen=True)
class Files:
    """The paths that a scorer is given."""

    answers: str
    annotations: str
    questions: str | None


@dataclass(frozen=True)
class Scorer:
    """How answers are scored, after all files are read and checked; the reference's own scripts score answers that are
    too few, too many, out of order or of other questions without a word.

    Attributes:
        read: files → the annotations, checked.
        score: (answers, annotations, files) → figures: numbers, None, or dicts of them; and perhaps NOTES.
        annotations: what the annotations are, as they lie in LLaVA's playground/data/eval.
        keys: what an answer line must have besides question_id and text.
        table: the figures that are dicts and yet belong into a short table.
    """

    read: Callable[[Files], Any]
    score: Callable[[Sequence[Mapping], Any, Files], dict]
    annotations: str
    keys: Mapping[str, Kind] = field(default_factory=dict)
    table: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """How answers are written for the benchmark's server or evaluator.

    Attributes:
        convert: (answers file, the other file that is needed) → the file's bytes, or {file's name: bytes} of a folder.
        needs: the flag that names the other file, or None.
        what: the other file.
    """

    convert: Callable[..., bytes | dict[str, bytes]]
    needs: str | None = None
    what: str = ""


@dataclass(frozen=True)
class Published:
    """A figure that LLaVA's authors published for PUBLISHED_MODEL, in the unit of ours, and what it was measured on."""

    score: float
    measured_on: str


@dataclass(frozen=True)
class Workload:
    """What is asked, for the roofline. Counts are the data set's; sizes and lengths are assumed."""

    title: str
    questions: int
    images: int
    size: tuple[int, int]  # (width, height) of the usual picture
    question: int  # tokens after the picture, instruction included
    answer: int  # tokens of a batch's longest answer, </s> included


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of LLaVA's eval folder, as its script in `scripts/v1_5/eval` runs it: greedy, with vicuna_v1.

    Attributes:
        layout: of its question file.
        single_pred_prompt: its script passes `--single-pred-prompt`.
        langs: what `--lang` may be.
        scorer: None where GPT judges the answers.
        judged: what then becomes of the answers; {answers} is their file.
        submission: None where the answers are handed to nobody.
        published: figure → what was published for it.
        editions: what was published for other editions, which are known by a part of the annotations' name.
        workload: for the roofline's table.
    """

    layout: Layout
    single_pred_prompt: bool = False
    langs: tuple[str, ...] = ("en",)
    scorer: Scorer | None = None
    judged: str = ""
    submission: Submission | None = None
    published: Mapping[str, Published] = field(default_factory=dict)
    editions: Mapping[str, Mapping[str, Published]] = field(default_factory=dict)
    workload: Workload | None = None


# ---- answers


def read_texts(path, *keys: str, remedy: str = "") -> list[dict]:
    """The answers (or questions) of a file, one a line, each with a question_id and these keys, which are texts."""
    return read_objects(path, {"question_id": ID, **dict.fromkeys(keys, (str,))}, remedy)


def check_complete(path, missing: Sequence) -> None:
    """ValueError if the answer file lacks an answer."""
    if missing:
        some = ", ".join(f"{question_id!s:.80}" for question_id in missing[:MOST_NAMED_IDS])
        more = ", …" if len(missing) > MOST_NAMED_IDS else ""
        raise ValueError(f"{path}: has no answer to {len(missing)} questions ({some}{more}); answer them all first")


def question_ids(entries: Sequence[Mapping]) -> list:
    return [entry["question_id"] for entry in entries]


def check_ids(answered: Sequence, expected: Collection, answers_file: str, asked_in: str) -> None:
    """Each question of a file must be answered once, and no other.

    Raises:
        ValueError: not so; it names some ids.
    """
    check_once(answered, answers_file)
    if strangers := set(answered).difference(expected):
        raise ValueError(
            f"{answers_file}: {len(strangers)} of {len(answered)} answers are to questions that {asked_in} "
            f"does not have: {_some(strangers)}; give the annotations of the questions that were asked"
        )
    if missing := set(expected).difference(answered):
        raise ValueError(
            f"{answers_file}: {len(answered)} answers, but {asked_in} has {len(expected)} questions; without "
            f"an answer: {_some(missing)}; answer the rest with llava-jax evaluate"
        )


def check_once(answered: Sequence, answers_file: str) -> None:
    if twice := [number for number, count in Counter(answered).items() if count > 1]:
        raise ValueError(f"{answers_file}: answered more than once: {_some(twice)}; keep one answer to each question")


def _some(ids: Collection) -> str:
    first, more = sorted(map(repr, ids))[:MOST_NAMED_IDS], len(ids) - MOST_NAMED_IDS
    return ", ".join(f"{name:.80}" for name in first) + (f" and {more} more" if more > 0 else "")


def percent(right: Sequence[bool]) -> float | None:
    """How many are right; None of none."""
    return 100 * sum(right) / len(right) if right else None
