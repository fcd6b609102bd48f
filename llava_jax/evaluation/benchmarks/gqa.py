"""GQA: what eval.py prints from the questions alone.

Left out is what needs more than testdev_balanced_questions.json: validity and plausibility (the choices file, which the
1.2 release lacks), consistency (answers to all questions, not only the balanced ones) and grounding (attention maps).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Submission, Workload
from llava_jax.evaluation.benchmarks.common import check_ids, question_ids, read_texts
from llava_jax.evaluation.questions import LOADER
from llava_jax.fields import Kind
from llava_jax.records import check_objects, read_json_object

KINDS: dict[str, Kind] = {
    "answer": (str,),
    "isBalanced": (bool,),
    "question": (str,),
    "types": {"structural": (str,), "semantic": (str,)},
    "semantic": [{"operation": (str,), "argument": (str,)}],
    "groups": {"global": (str, type(None))},
}
NO_STEP = ("exist", "query: name", "choose name")


def read_truth(files: Files) -> dict[str, dict]:
    given = epath.Path(files.annotations)
    path = given / "testdev_balanced_questions.json" if given.is_dir() else given
    questions = read_json_object(path, "it is GQA's testdev_balanced_questions.json, question_id → question")
    remedy = "GQA's questions of a split with answers have all of them"
    check_objects(list(questions.values()), KINDS, path, remedy, "entry")
    return questions


def _score(answers: Sequence[Mapping], questions: Mapping[str, Mapping], files: Files) -> dict:
    check_ids(question_ids(answers), questions, files.answers, files.annotations)
    return score_gqa(answers, questions)


def convert(answers_file) -> bytes:
    said = [
        {"questionId": answer["question_id"], "prediction": prediction(answer["text"])}
        for answer in read_texts(answers_file, "text")
    ]
    return json.dumps(said).encode()


def prediction(text: str) -> str:
    """What is handed to eval.py for a text; LLaVA's scripts/convert_gqa_for_eval.py."""
    return text.rstrip(".").lower()


def score_gqa(answers: Sequence[Mapping], questions: Mapping[str, Mapping]) -> dict:
    """Accuracies in percent: of all, "binary", "open" and by type; "distribution", lower is better.

    Only questions with `isBalanced` count, and each must have an answer. Where there is no question the figure is 0,
    as in eval.py; "distribution" is None where eval.py divides by zero, no question having a group.
    """
    said = {answer["question_id"]: prediction(answer["text"]) for answer in answers}
    balanced = {number: question for number, question in questions.items() if question["isBalanced"]}
    right = {number: said[number] == question["answer"] for number, question in balanced.items()}
    types = ("kind", "structural", "semantic", "steps", "words")
    groups: dict[str, dict[Any, list[bool]]] = {name: defaultdict(list) for name in types}
    for number, question in balanced.items():
        structural = question["types"]["structural"]
        kinds = {
            "kind": "open" if structural == "query" else "binary",
            "structural": structural,
            "semantic": question["types"]["semantic"],
            "steps": steps(question),
            "words": len(question["question"].split()),
        }
        for name, kind in kinds.items():
            groups[name][kind].append(right[number])
    kind = groups.pop("kind")
    return {
        "accuracy": _percent(list(right.values())),
        "binary": _percent(kind["binary"]),
        "open": _percent(kind["open"]),
        "distribution": distribution(said, balanced),
        **{
            name: {key: {"accuracy": _percent(group[key]), "questions": len(group[key])} for key in sorted(group)}
            for name, group in groups.items()
        },
    }


def steps(question: Mapping) -> int:
    """How many reasoning steps a question takes; eval.py's getStepsNum."""
    # Quirk: "exist" and the others are looked for anywhere in an operation and its argument.
    written = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(word in step for word in NO_STEP) for step in written)


def distribution(said: Mapping[str, str], questions: Mapping[str, Mapping]) -> float | None:
    """How far the answers to a group of questions are from the true ones, by groups' size; chiSquare / 100."""
    truth: dict[str, Counter] = defaultdict(Counter)
    predicted: dict[str, Counter] = defaultdict(Counter)
    for number, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            truth[group][question["answer"]] += 1
            predicted[group][said[number]] += 1
    weighted, total = 0.0, 0
    for group, counts in truth.items():
        # Quirk: only answers that are true somewhere in the group count, whatever else was said.
        score = sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weighted += score * counts.total()
        total += counts.total()
    return weighted / total / 100 if total else None


def _percent(right: Sequence[bool]) -> float:
    return 100 * (sum(right) / len(right)) if right else 0


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(
        read_truth, _score, "gqa/data, or testdev_balanced_questions.json in it", table=("structural", "semantic")
    ),
    submission=Submission(convert),
    published={"accuracy": Published(64.2, "testdev_balanced")},
    workload=Workload("GQA", 12578, 398, (640, 480), 32, 4),
)
