"""POPE: is the object in the picture? LLaVA's llava/eval/eval_pope.py."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence


def says_yes(text: str) -> bool:
    """How the reference reads an answer: yes, unless its first sentence has the word No, no or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    # Quirks: "NO", "Not", "No!" and an empty answer are yes; only single spaces part words; "n,o" is no.
    return not any(word in words for word in ("No", "not", "no"))


def score_category(texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The figures of one category: counts, and the rest in percent.

    Where the reference divides by zero (nothing said yes to, no label yes), the figure is 0.

    Raises:
        ValueError: there are no answers, or no labels.
    """
    if not texts or not labels:
        raise ValueError("a category of POPE has no answers or no labels")
    said = [says_yes(text) for text in texts]
    # Quirks: answers meet labels by order alone, the longer list is cut; every label but "no" is yes.
    pairs = [(yes, label != "no") for yes, label in zip(said, labels, strict=False)]
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
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

    The reference prints no mean; the published POPE figure is the mean F1 of the categories.

    Args:
        answers: answer lines, in the order of the questions.
        categories: question_id → category, from the question file.
        labels: category → "yes" or "no" of each of its questions, in order.
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
