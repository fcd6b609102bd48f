"""What a benchmark is, as data and functions: each file of this folder has one `Benchmark`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_jax.evaluation.questions import Layout
from llava_jax.fields import Kind

PUBLISHED_IN = "llava-v1.6-vicuna-7b, docs/MODEL_ZOO.md of github.com/haotian-liu/LLaVA"
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
    """

    read: Callable[[Files], Any]  # → the annotations, checked
    # (answers, annotations, files) → figures: numbers, None, or dicts of them; and perhaps NOTES
    score: Callable[[Sequence[Mapping], Any, Files], dict]
    annotations: str  # what they are, as they lie in LLaVA's playground/data/eval
    keys: Mapping[str, Kind] = field(default_factory=dict)  # of an answer line, besides question_id and text
    questions: str = ""  # what the question file is, where `read` takes it
    table: tuple[str, ...] = ()  # figures that are dicts, and are printed all the same


@dataclass(frozen=True)
class Submission:
    """How answers are written for the benchmark's server or evaluator."""

    # (answers file, the other file that is needed) → the file's bytes, or {file's name: bytes} of a folder
    convert: Callable[..., bytes | dict[str, bytes]]
    needs: str | None = None  # the flag that names the other file
    what: str = ""  # the other file


@dataclass(frozen=True)
class Published:
    """A figure that LLaVA's authors published (PUBLISHED_IN), in the unit of ours, and what it was measured on."""

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
    """A benchmark of LLaVA's eval folder, as its script in `scripts/v1_5/eval` runs it: greedy, with vicuna_v1."""

    layout: Layout  # of its question file
    single_pred_prompt: bool = False  # whether its script passes `--single-pred-prompt`
    langs: tuple[str, ...] = ("en",)  # what `--lang` may be
    scorer: Scorer | None = None  # None where GPT judges the answers
    judged: str = ""  # what then becomes of the answers; {answers} is their file
    submission: Submission | None = None  # None where there is no server or evaluator to write the answers for
    published: Mapping[str, Published] = field(default_factory=dict)  # by figure
    # a part of the annotations' file name → what was published for that edition instead
    editions: Mapping[str, Mapping[str, Published]] = field(default_factory=dict)
    workload: Workload | None = None  # for the roofline's table
