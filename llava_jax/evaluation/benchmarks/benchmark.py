"""What a benchmark is, as data and functions: each file of this folder has one `Benchmark`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_jax.evaluation.questions import Layout
from llava_jax.fields import Kind

PUBLISHED_MODEL = "llava-v1.6-vicuna-7b"
PUBLISHED_SOURCE = "docs/MODEL_ZOO.md of github.com/haotian-liu/LLaVA"
NOTES = "notes"  # among a score's figures, what to know about them: a list of lines


@dataclass(frozen=True)
class Files:
    """The paths that a scorer is given."""

    answers: str
    annotations: str
    questions: str | None


@dataclass(frozen=True)
class Scorer:
    """How answers are scored, once all files are read and checked.

    The reference's scripts score answers that are too few, too many, out of order or to other questions without a word.

    Attributes:
        read: files → the annotations, checked.
        score: (answers, annotations, files) → figures: numbers, None, or dicts of them; and perhaps NOTES.
        annotations: what the annotations are, as they lie in LLaVA's playground/data/eval.
        keys: what an answer line must have besides question_id and text.
        questions: what the question file is, where `read` takes it.
        table: figures that are dicts, and are printed all the same.
    """

    read: Callable[[Files], Any]
    score: Callable[[Sequence[Mapping], Any, Files], dict]
    annotations: str
    keys: Mapping[str, Kind] = field(default_factory=dict)
    questions: str = ""
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
        submission: None where there is no server or evaluator to write the answers for.
        published: figure → what was published for it.
        editions: a part of the annotations' file name → what was published for that edition instead.
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
