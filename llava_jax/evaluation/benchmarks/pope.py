"""POPE: is the object in the picture? LLaVA's llava/eval/eval_pope.py."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from etils import epath

from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Workload
from llava_jax.evaluation.benchmarks.common import check_ids, question_ids
from llava_jax.evaluation.questions import ID, LOADER
from llava_jax.records import naming, read_objects


@dataclass(frozen=True)
class Truth:
    """POPE's questions, the file that has them, and category → "yes" or "no" of each of its questions, in order."""

    questions: Sequence[Mapping]
    asked_in: str
    labels: Mapping[str, Sequence[str]]


def read_truth(files: Files) -> Truth:
    folder = epath.Path(files.annotations)
    paths = {path.name[len("coco_pope_") : -len(".json")]: path for path in sorted(folder.glob("coco_pope_*.json"))}
    if not paths:
        raise FileNotFoundError(f"{folder}: has no coco_pope_*.json; the annotations of pope are its folder coco")
    beside = str(folder.parent / "llava_pope_test.jsonl")
    if files.questions is None and not epath.Path(beside).exists():
        raise FileNotFoundError(f"{beside}: no such file; name POPE's questions with --question-file")
    asked_in = files.questions or beside
    asked = read_objects(
        asked_in, {"question_id": ID, "category": (str,)}, "POPE's question file has question_id and category"
    )
    labels = {}
    for category, path in paths.items():
        entries = read_objects(path, {"label": (str,)}, "POPE's labels are one JSON object a line")
        _check_labels([entry for entry in asked if entry["category"] == category], entries, str(path), asked_in)
        labels[category] = [entry["label"] for entry in entries]
    if others := {question["category"] for question in asked} - set(labels):
        raise ValueError(f"{folder}: has no coco_pope_{min(others):.80}.json, but {asked_in} asks in that category")
    return Truth(asked, asked_in, labels)


def _check_labels(asked: Sequence[Mapping], labels: Sequence[Mapping], path: str, asked_in: str) -> None:
    """As many labels as questions, about the same pictures in the same order, where both name them."""
    if len(asked) != len(labels):
        raise ValueError(
            f"{path}: {len(labels)} labels for {len(asked)} questions of {asked_in}; take POPE's release for it"
        )
    for number, (question, label) in enumerate(zip(asked, labels, strict=True), 1):
        images = [PurePath(str(entry["image"])).name for entry in (question, label) if "image" in entry]
        if len(set(images)) > 1:
            raise ValueError(
                f"{path}, line {number}: about {images[1]:.80}, but {asked_in} asks about {images[0]:.80} there"
            )


def _score(answers: Sequence[Mapping], truth: Truth, files: Files) -> dict:
    answered, asked = question_ids(answers), question_ids(truth.questions)
    check_ids(answered, asked, files.answers, truth.asked_in)
    if answered != asked:
        raise ValueError(
            f"{files.answers}: its answers are not in the order of {truth.asked_in}, by which POPE's labels find them"
        )
    categories = {question["question_id"]: question["category"] for question in truth.questions}
    with naming(files.annotations):
        return score_pope(answers, categories, truth.labels)


def says_yes(text: str) -> bool:
    """How the reference reads an answer: yes, unless its first sentence has the word No, no or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    # Quirks: "NO", "Not", "No!" and an empty answer are yes; only single spaces part words; "n,o" is no.
    return not any(word in words for word in ("No", "not", "no"))


def score_category(texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The figures of one category: counts, and the rest in percent; ValueError if there are no answers, or no labels.

    Where the reference divides by zero (nothing said yes to, no label yes), the figure is 0.
    """
    if not texts or not labels:
        raise ValueError("a category of POPE has no answers or no labels")
    said = [says_yes(text) for text in texts]
    # Quirks: answers meet labels by order alone, the longer list is cut; every label but "no" is yes.
    pairs = [(yes, label != "no") for yes, label in zip(said, labels, strict=False)]
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        **{"tp": tp, "fp": fp, "tn": tn, "fn": fn},
        "accuracy": 100 * _ratio(tp + tn, len(pairs)),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": 100 * _ratio(said.count(True), len(said)),  # quirk: of all answers, those past the labels too
    }


def score_pope(
    answers: Sequence[Mapping], categories: Mapping[Hashable, str], labels: Mapping[str, Sequence[str]]
) -> dict:
    """{"mean_f1": …, category: its figures}, categories in the order of `labels`.

    The reference prints no mean; the published POPE figure is the mean F1 of the categories. `answers` are in the order
    of the questions, as the "yes" or "no" of a category's `labels`; `categories` are theirs by question_id.
    """
    texts: dict[str, list[str]] = {category: [] for category in labels}
    for answer in answers:
        category = categories[answer["question_id"]]
        if category in texts:
            texts[category].append(answer["text"])
    scores = {category: score_category(texts[category], labels[category]) for category in labels}
    return {"mean_f1": sum(score["f1"] for score in scores.values()) / len(scores), **scores}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(
        read_truth,
        _score,
        "the folder pope/coco, with coco_pope_*.json",
        questions="the questions (llava_pope_test.jsonl beside coco)",
        table=("random", "popular", "adversarial"),
    ),
    published={"mean_f1": Published(86.5, "coco, the mean F1 of its three categories")},
    workload=Workload("POPE", 8910, 500, (640, 480), 30, 2),
)
