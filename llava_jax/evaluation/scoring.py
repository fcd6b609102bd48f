"""What a benchmark's answers are worth, by its own rules, beside LLaVA's published score."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from etils import epath

from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.benchmarks.benchmark import PUBLISHED_IN, Benchmark, Files, Published, Scorer
from llava_jax.evaluation.questions import ID
from llava_jax.fields import Kind
from llava_jax.records import read_objects


def check_scorable(task: str | None, answers_file: str, annotations: str | None) -> tuple[Scorer, str]:
    """What scores these answers, and the annotations that are there; before there are any answers, too.

    Raises:
        FileNotFoundError: the annotations are not there.
        ValueError: there is no task, it is judged by GPT, or it has no annotations.
    """
    if task is None:
        raise ValueError("--annotations needs --task, which says how they are read")
    benchmark = BENCHMARKS[task]
    scorer = benchmark.scorer
    if scorer is None:
        instead = benchmark.judged.format(answers=answers_file)
        raise ValueError(f"{task} has no scorer, its answers are judged by GPT; {instead}")
    if annotations is None:
        raise ValueError(f"--task {task} needs --annotations: {scorer.annotations}")
    if not epath.Path(annotations).exists():
        raise FileNotFoundError(f"--annotations {annotations}: not there; {task} needs {scorer.annotations}")
    return scorer, annotations


def check_annotations(task: str | None, answers_file: str, annotations: str | None, question_file: str | None) -> None:
    """`check_scorable`, before there are any answers: annotations that are damaged are named now."""
    scorer, path = check_scorable(task, answers_file, annotations)
    scorer.read(Files(answers_file, path, question_file))


def read_answers(path: str, keys: Mapping[str, Kind]) -> list[dict]:
    """Answer lines, each with question_id, a text and `keys`; ValueError if there is none, or one is not so."""
    kinds = {"question_id": ID, "text": (str,), **keys}
    answers = read_objects(path, kinds, "let llava-jax evaluate finish it, or give this task's answers")
    if not answers:
        raise ValueError(f"{path}: has no answers; write them with llava-jax evaluate")
    return answers


def published_beside(benchmark: Benchmark, annotations: str) -> Mapping[str, Published]:
    """What was published for the edition whose annotations these are."""
    name = epath.Path(annotations).name.lower()
    return next((figures for part, figures in benchmark.editions.items() if part in name), benchmark.published)


def table(title: str, figures: Mapping, published: Mapping[str, Published], groups: Collection[str]) -> str:
    """The figures as lines, with the published ones beside them; of figures that are dicts only `groups`."""
    rows = []
    for name, value in figures.items():
        if not isinstance(value, Mapping):
            rows.append((name.replace("_", " "), value, published.get(name)))
        elif name in groups:
            rows += [(f"{name} {kind}".replace("_", " "), inner, None) for kind, inner in value.items()]
    width = max(len(text) for text in (title, *(name for name, _, _ in rows)))
    lines = [f"{title:<{width}} {'ours':>9} {'published':>10}"]
    for name, value, beside in rows:
        theirs = "" if beside is None else f"{beside.score:>10}  on {beside.measured_on}"
        lines.append(f"{name:<{width}} {_shown(value):>9} {theirs}".rstrip())
    return "\n".join([*lines, f"published: {PUBLISHED_IN}"])


def _shown(value: float | int | Mapping | None) -> str:
    if isinstance(value, Mapping):  # one kind of a figure that has several of its own, the main one first
        value = next(iter(value.values()))
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
