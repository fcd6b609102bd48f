"""SEED-Bench by question type, its images and its videos. LLaVA's scripts/convert_seed_for_submission.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def question_id(value: str | int) -> str | int:
    """The id that LLaVA's question file gives a question of SEED-Bench.json: a number where it can be one."""
    try:
        return int(value)
    except ValueError:
        return value


def score_seed(answers: Sequence[Mapping], annotations: Mapping) -> dict:
    """Accuracies in percent: of all, "image", "video" and each of "types"; None where there is no question.

    A question without an answer is wrong, as in the reference. Where the reference crashes (a KeyError for a type with
    no right answer, a division by zero without videos), the figure is 0 or None.

    Args:
        annotations: SEED-Bench.json, "questions" and "question_type".
    """
    texts = {answer["question_id"]: answer["text"] for answer in answers}
    questions = annotations["questions"]
    # Quirk: the text must be the letter and nothing else; "A." is wrong.
    right = [texts.get(question_id(question["question_id"])) == question["answer"] for question in questions]
    names = {number: name for name, number in annotations["question_type"].items()}

    def accuracy(field: str, value) -> float | None:
        chosen = [ok for ok, question in zip(right, questions, strict=True) if question[field] == value]
        return 100 * sum(chosen) / len(chosen) if chosen else None

    types = sorted({question["question_type_id"] for question in questions})
    return {
        "accuracy": 100 * sum(right) / len(right) if right else None,
        "image": accuracy("data_type", "image"),
        "video": accuracy("data_type", "video"),
        "types": {names[number]: accuracy("question_type_id", number) for number in types},
    }
