"""What a benchmark's answers are worth, by its own rules, beside LLaVA's published score."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from etils import epath

from llava_jax.evaluation.published import MODEL, PUBLISHED, SOURCE, Published
from llava_jax.evaluation.scores.annotations import Files
from llava_jax.evaluation.scores.checked import SCORERS, Scorer

# What becomes of the answers that GPT judges.
JUDGED = {
    "llava-bench": "hand {answers} itself to LLaVA's llava/eval/eval_gpt_review_bench.py",
    "mm-vet": "make its file with llava-jax submit --task mm-vet --answers-file {answers} --output mm-vet.json, "
    "and hand that to MM-Vet's evaluator",
}


def check_scorable(task: str | None, answers_file: str, annotations: str | None) -> tuple[Scorer, str]:
    """What scores these answers, and the annotations that are there; before there are any answers, too.

    Raises:
        FileNotFoundError: the annotations are not there.
        ValueError: there is no task, it is judged by GPT, or it has no annotations.
    """
    if task is None:
        raise ValueError("--annotations needs --task, which says how they are read")
    if task in JUDGED:
        instead = JUDGED[task].format(answers=answers_file)
        raise ValueError(f"{task} has no scorer, its answers are judged by GPT; {instead}")
    scorer = SCORERS[task]
    if annotations is None:
        raise ValueError(f"--task {task} needs --annotations: {scorer.annotations}")
    if not epath.Path(annotations).exists():
        raise FileNotFoundError(f"--annotations {annotations}: not there; {task} needs {scorer.annotations}")
    return scorer, annotations


def check_annotations(task: str | None, answers_file: str, annotations: str | None, question_file: str | None) -> None:
    """See that answers can be scored, before there are any: annotations that are damaged are named now.

    Raises:
        FileNotFoundError, ValueError: as `check_scorable`, or the annotations are malformed.
    """
    scorer, path = check_scorable(task, answers_file, annotations)
    scorer.read(Files(answers_file, path, question_file))


def published_beside(task: str, annotations: str) -> dict[str, Published]:
    """What was published for a task; MMBench's Chinese file is known by its name."""
    chinese = task == "mmbench" and "_cn" in epath.Path(annotations).name.lower()
    return PUBLISHED["mmbench-cn" if chinese else task]


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
    return "\n".join([*lines, f"published: {MODEL}, {SOURCE}"])


def _shown(value: float | int | Mapping | None) -> str:
    if isinstance(value, Mapping):  # one kind of a figure that has several of its own, the main one first
        value = next(iter(value.values()))
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
