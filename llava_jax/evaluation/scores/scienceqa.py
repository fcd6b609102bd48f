"""ScienceQA, all of it and the questions with an image. LLaVA's llava/eval/eval_science_qa.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

OPTIONS = ("A", "B", "C", "D", "E")
# Quirk: the point is any character but a newline, and there must be one.
SENTENCE = re.compile(r"The answer is ([A-Z]).")


def predicted_choice(text: str, choices: int) -> int:
    """The index of the choice that an answer names, -1 if it names none, or none of the question's `choices`."""
    letter: str | None
    # Quirks: letters are capitals, "A." alone is no answer, two sentences "The answer is …" are none.
    if text in OPTIONS:
        letter = text
    elif text[:1] in OPTIONS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = SENTENCE.findall(text)
        letter = found[0] if len(found) == 1 else None
    return OPTIONS.index(letter) if letter in OPTIONS[:choices] else -1


def score_scienceqa(answers: Sequence[Mapping], problems: Mapping[str, Mapping], split: Iterable[str]) -> dict:
    """Accuracies in percent and counts; a question without an answer is wrong, as in the reference.

    `img_accuracy` is None where the reference divides by zero: no prompt has an <image>.

    Args:
        problems: problems.json; "choices" and "answer" of each are used.
        split: the ids of the questions that count, from pid_splits.json.

    Raises:
        ValueError: the split is empty.
    """
    by_id = {answer["question_id"]: answer for answer in answers}  # quirk: the last of several answers counts
    right: dict[bool, list[bool]] = {True: [], False: []}
    for number in split:
        answer = by_id.get(number, {"text": "FAILED", "prompt": "Unknown"})
        problem = problems[number]
        choice = predicted_choice(answer["text"], len(problem["choices"]))
        # Quirk: whether a question has an image is read from the answer's prompt, so an unanswered one has none.
        right["<image>" in answer["prompt"]].append(choice == problem["answer"])
    both = right[True] + right[False]
    if not both:
        raise ValueError("ScienceQA's split has no questions")
    return {
        "accuracy": 100 * sum(both) / len(both),
        "img_accuracy": 100 * sum(right[True]) / len(right[True]) if right[True] else None,
        "correct": sum(both),
        "total": len(both),
        "img_total": len(right[True]),
    }
