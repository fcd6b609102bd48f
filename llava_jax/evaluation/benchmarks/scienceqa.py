"""ScienceQA, all of it and the questions with an image; LLaVA's eval/model_vqa_science.py and eval_science_qa.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from llava_jax.constants import DEFAULT_IMAGE_TOKEN
from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer
from llava_jax.evaluation.benchmarks.common import check_ids, percent, question_ids
from llava_jax.evaluation.questions import (
    ID,
    SINGLE_PRED_PROMPT,
    Layout,
    PromptFlags,
    Question,
    checked_question,
    malformed_question,
)
from llava_jax.fields import Kind, problem_of
from llava_jax.records import check_objects, read_json, read_json_key

OPTIONS = ("A", "B", "C", "D", "E")
# Quirk: the point is any character but a newline, and there must be one.
SENTENCE = re.compile(r"The answer is ([A-Z]).")


# ---- questions


def _read_questions(path, flags: PromptFlags) -> list[Question]:
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of questions, got {type(entries).__name__}")
    ending = "\n" + SINGLE_PRED_PROMPT["en"] if flags.single_pred_prompt else ""
    return [_of_entry(entry, f"{path}, entry {n}", ending) for n, entry in enumerate(entries, 1)]


def _of_entry(entry: Any, where: str, ending: str) -> Question:
    """{"id", "conversations": [{"value"}, …], "image" or none}; `<image>` is taken out."""
    has_image = isinstance(entry, dict) and "image" in entry
    problem = problem_of(entry, {"id": ID, "conversations": (list,)} | ({"image": (str,)} if has_image else {}))
    if not problem:
        turns = entry["conversations"]
        problem = problem_of(turns[0], {"value": (str,)}) if turns else "'conversations' is empty"
    if problem:
        return malformed_question(where, entry, "id", problem)
    text = turns[0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip() + ending
    prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if has_image else text
    return checked_question(where, Question(entry["id"], text, prompt, entry.get("image")))


SCIENCE = Layout("science", _read_questions, max_new_tokens=1024, rgb=False, ending=".json", single_pred_prompt=True)


# ---- scores


def read_truth(files: Files) -> dict[str, dict]:
    """The problems that count, by their ids."""
    folder = epath.Path(files.annotations)
    splits, path = folder / "pid_splits.json", folder / "problems.json"
    split = read_json_key(splits, "test", "ScienceQA's, with a list 'test'")
    if not isinstance(split, list) or not all(isinstance(number, str) for number in split):
        raise ValueError(f"{splits}: 'test' must be a list of ids, which are texts")
    problems = read_json(path)
    if not isinstance(problems, dict) or any(number not in problems for number in split):
        raise ValueError(f"{path}: is not ScienceQA's, with every question of the test split")
    kinds: dict[str, Kind] = {"choices": (list,), "answer": (int,)}
    check_objects([problems[number] for number in split], kinds, path, "take all of it", "question of the split")
    return {number: problems[number] for number in split}


def _score(answers: Sequence[Mapping], problems: Mapping[str, Mapping], files: Files) -> dict:
    check_ids(question_ids(answers), problems, files.answers, files.annotations)
    return score_scienceqa(answers, problems, problems)


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

    `img_accuracy` is None where the reference divides by zero: no prompt has an <image>. `split` are the ids of the
    `problems` that count; ValueError if there are none.
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
        "accuracy": percent(both),
        "img_accuracy": percent(right[True]),
        "correct": sum(both),
        "total": len(both),
        "img_total": len(right[True]),
    }


BENCHMARK = Benchmark(
    SCIENCE,
    single_pred_prompt=True,
    scorer=Scorer(
        read_truth, _score, "the folder scienceqa, with pid_splits.json and problems.json", {"prompt": (str,)}
    ),
    published={"img_accuracy": Published(70.1, "test, questions with an image")},
)
