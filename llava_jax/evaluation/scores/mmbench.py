"""MMBench: vanilla and circular accuracy by exact matching, without GPT.

VLMEvalKit's vlmeval/utils/matching_util.py and vlmeval/dataset/utils/multiple_choice.py with its `exact_matching`.
LLaVA hands its answers to MMBench's server; the server asks GPT about an answer in which no option is found.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence

ROTATION = 1_000_000  # dev_20230712's rotated copies of question n are n + 1,000,000, n + 2,000,000, …
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
SENTENCE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def infer_option(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, "Z" for a refusal, None if it is not clear; can_infer_option."""
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(SEPARATORS).split()
    named = [letter for letter in choices if letter in words]
    # Quirk: the letter must first stand among the last four words.
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    # Quirk: matched without case, "the answer is a dog" names A.
    found = SENTENCE.search(text)
    return found.group(1).upper() if found and found.group(1).upper() in choices else None


def infer_text(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the one option whose text an answer contains, None if none or several are; can_infer_text."""
    # Quirks: an answer of more than twice all options' length is not searched; options are found within words.
    text = text.lower()
    if len(text) > 2 * sum(len(option) for option in choices.values()):
        return None
    found = [letter for letter, option in choices.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def infer(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer gives, or None; can_infer."""
    return infer_option(text, choices) or infer_text(text, choices)


def is_right(answer: Mapping, truth: str) -> bool:
    """Whether an answer line gives the option that was `truth` before the options were rotated: not if none was.

    Args:
        answer: of model_vqa_mmbench: "options" in the order in which they were shown, "option_char" their own letters.
    """
    shown = dict(zip(string.ascii_uppercase, answer["options"], strict=False))
    if truth not in answer["option_char"]:
        return False
    return infer(answer["text"], shown) == string.ascii_uppercase[list(answer["option_char"]).index(truth)]


def score_mmbench(answers: Sequence[Mapping], rows: Sequence[Mapping]) -> dict:
    """Accuracies in percent: "circular" (None without rotations), "vanilla", and by "category" and "l2-category".

    A question is circularly right if it is right in all its rotations: the rounds of --all-rounds, the rotated copies
    in the file, or both. Categories are circular where "circular" is.

    Args:
        rows: of the TSV: "index", "answer" and, where the file has them, "category" and "l2-category".

    Raises:
        ValueError: a question has not all its rotations, others have, and it may be right or wrong.
    """
    truth = {row["index"]: row["answer"] for row in rows}
    circular, vanilla, options = defaultdict(list), {}, {}
    for answer in answers:
        number = answer["question_id"]
        right = is_right(answer, truth[number])
        circular[number % ROTATION].append(right)
        options[number % ROTATION] = len(answer["options"])
        if number < ROTATION and answer["round_id"] == 0:
            vanilla[number] = right
    hits = vanilla
    rotated = any(len(rights) > 1 for rights in circular.values())
    if rotated:
        for number in vanilla:
            # One that is wrong already is wrong with any further answers.
            if all(circular[number]) and len(circular[number]) < options[number]:
                raise ValueError(f"question {number} has {len(circular[number])} of its {options[number]} rotations")
        hits = {number: all(circular[number]) for number in vanilla}
    return {
        "circular": _percent(list(hits.values())) if rotated else None,
        "vanilla": _percent(list(vanilla.values())),
        "questions": len(vanilla),
        "category": _by("category", rows, hits),
        "l2-category": _by("l2-category", rows, hits),
    }


def _by(field: str, rows: Sequence[Mapping], hits: Mapping[int, bool]) -> dict[str, float | None]:
    groups = defaultdict(list)
    for row in rows:
        if row["index"] in hits and row.get(field):
            groups[row[field]].append(hits[row["index"]])
    return {name: _percent(groups[name]) for name in sorted(groups)}


def _percent(right: Sequence[bool]) -> float | None:
    return 100 * sum(right) / len(right) if right else None
