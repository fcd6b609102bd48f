"""What several benchmarks check and compute alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from llava_jax.evaluation.questions import ID
from llava_jax.records import read_objects

MOST_NAMED_IDS = 3  # in an error
SERVER = "a test split has none, its server scores it (llava-jax submit makes the file)"


def read_texts(path, *keys: str, remedy: str = "") -> list[dict]:
    """The answers (or questions) of a file, one a line, each with a question_id and these keys, which are texts."""
    return read_objects(path, {"question_id": ID, **dict.fromkeys(keys, (str,))}, remedy)


def check_complete(path, missing: Sequence) -> None:
    """ValueError if the answer file lacks an answer."""
    if missing:
        some = ", ".join(f"{question_id!s:.80}" for question_id in missing[:MOST_NAMED_IDS])
        more = ", …" if len(missing) > MOST_NAMED_IDS else ""
        raise ValueError(f"{path}: has no answer to {len(missing)} questions ({some}{more}); answer them all first")


def question_ids(entries: Sequence[Mapping]) -> list:
    return [entry["question_id"] for entry in entries]


def check_ids(answered: Sequence, expected: Collection, answers_file: str, asked_in: str) -> None:
    """ValueError unless each question of a file is answered once, and no other."""
    check_once(answered, answers_file)
    if strangers := set(answered).difference(expected):
        raise ValueError(
            f"{answers_file}: {len(strangers)} of {len(answered)} answers are to questions that {asked_in} "
            f"does not have: {_some(strangers)}; give the annotations of the questions that were asked"
        )
    if missing := set(expected).difference(answered):
        raise ValueError(
            f"{answers_file}: {len(answered)} answers, but {asked_in} has {len(expected)} questions; without "
            f"an answer: {_some(missing)}; answer the rest with llava-jax evaluate"
        )


def check_once(answered: Sequence, answers_file: str) -> None:
    if twice := [number for number, count in Counter(answered).items() if count > 1]:
        raise ValueError(f"{answers_file}: answered more than once: {_some(twice)}; keep one answer to each question")


def _some(ids: Collection) -> str:
    first, more = sorted(map(repr, ids))[:MOST_NAMED_IDS], len(ids) - MOST_NAMED_IDS
    return ", ".join(f"{name:.80}" for name in first) + (f" and {more} more" if more > 0 else "")


def percent(right: Sequence[bool]) -> float | None:
    """How many are right; None of none."""
    return 100 * sum(right) / len(right) if right else None
