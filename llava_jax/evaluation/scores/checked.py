"""The scorers with their files: all is read and checked before anything is scored.

The references' own scripts score answers that are too few, too many, out of order or of other questions without a word.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.evaluation.mmbench_table import OPTIONS, MMBenchRow
from llava_jax.evaluation.questions import ID
from llava_jax.evaluation.scores import annotations as truths
from llava_jax.evaluation.scores.annotations import Files
from llava_jax.evaluation.scores.gqa import score_gqa
from llava_jax.evaluation.scores.mmbench import score_mmbench
from llava_jax.evaluation.scores.mme import Key, read_truth, score_mme, truth_key
from llava_jax.evaluation.scores.pope import score_pope
from llava_jax.evaluation.scores.scienceqa import score_scienceqa
from llava_jax.evaluation.scores.seed import question_id, score_seed
from llava_jax.evaluation.scores.vqa import (
    score_textvqa,
    score_vizwiz,
    score_vqav2,
    textvqa_annotations,
    textvqa_question,
)
from llava_jax.fields import Kind
from llava_jax.records import naming, read_objects

NAMED = 3  # ids that an error names
NOTES = 20  # rows that a score names
NOTE = "notes"  # the key of a score's figures that is no figure: what to know about them, a line each


@dataclass(frozen=True)
class Scorer:
    """How a task is scored.

    Attributes:
        read: files → the annotations, checked.
        score: (answers, annotations, files) → figures: numbers, None, or dicts of them; and perhaps NOTE.
        annotations: what the annotations are, as they lie in LLaVA's playground/data/eval.
        keys: what an answer line must have besides question_id and text.
        table: the figures that are dicts and yet belong into a short table.
    """

    read: Callable[[Files], Any]
    score: Callable[[Sequence[Mapping], Any, Files], dict]
    annotations: str
    keys: Mapping[str, Kind]
    table: tuple[str, ...] = ()


def read_answers(path: str, keys: Mapping[str, Kind]) -> list[dict]:
    """Answer lines, each with question_id, a text and `keys`.

    Raises:
        FileNotFoundError: the file cannot be read.
        ValueError: it is empty, or a line is not such an answer.
    """
    kinds = {"question_id": ID, "text": (str,), **keys}
    answers = read_objects(path, kinds, "let llava-jax evaluate finish it, or give this task's answers")
    if not answers:
        raise ValueError(f"{path}: has no answers; write them with llava-jax evaluate")
    return answers


def check_ids(answered: Sequence, expected: Collection, files: Files) -> None:
    """Each question that the annotations have must be answered once, and no other.

    Raises:
        ValueError: not so; it names some ids.
    """
    check_once(answered, files)
    if strangers := set(answered).difference(expected):
        raise ValueError(
            f"{files.answers}: {len(strangers)} of {len(answered)} answers are to questions that {files.annotations} "
            f"does not have: {_some(strangers)}; give the annotations of the questions that were asked"
        )
    if missing := set(expected).difference(answered):
        raise ValueError(
            f"{files.answers}: {len(answered)} answers, but {files.annotations} has {len(expected)} questions; without "
            f"an answer: {_some(missing)}; answer the rest with llava-jax evaluate"
        )


def check_once(answered: Sequence, files: Files) -> None:
    if twice := [number for number, count in Counter(answered).items() if count > 1]:
        raise ValueError(f"{files.answers}: answered more than once: {_some(twice)}; keep one answer to each question")


def _some(ids: Collection) -> str:
    first = sorted(map(repr, ids))[:NAMED]
    return ", ".join(f"{name:.80}" for name in first) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")


def _ids(answers: Sequence[Mapping]) -> list:
    return [answer["question_id"] for answer in answers]


# ---- one function a task


def _pope(answers: Sequence[Mapping], truth: truths.Pope, files: Files) -> dict:
    check_ids(_ids(answers), _ids(truth.questions), Files(files.answers, truth.asked_in, None))
    if _ids(answers) != _ids(truth.questions):
        raise ValueError(
            f"{files.answers}: its answers are not in the order of {truth.asked_in}, by which POPE's labels find them"
        )
    categories = {question["question_id"]: question["category"] for question in truth.questions}
    with naming(files.annotations):
        return score_pope(answers, categories, truth.labels)


def _textvqa(answers: Sequence[Mapping], data: list[dict], files: Files) -> dict:
    path, known = files.annotations, textvqa_annotations(data)
    for number, answer in enumerate(answers, 1):
        with naming(f"{files.answers}, line {number}"):
            question = textvqa_question(answer["prompt"])
        if (answer["question_id"], question) not in known:
            raise ValueError(
                f"{files.answers}: {path} has no question {question!r:.200} about image {answer['question_id']!r:.80}; "
                "is it the same split?"
            )
    if len(answers) != len(data):
        raise ValueError(
            f"{files.answers}: {len(answers)} answers, but {path} has {len(data)} questions; answer each once, with "
            "llava-jax evaluate"
        )
    with naming(path):
        return score_textvqa(answers, data)


def _vqav2(answers: Sequence[Mapping], entries: list[dict], files: Files) -> dict:
    check_ids(_ids(answers), _ids(entries), files)
    return score_vqav2(answers, entries)


def _vizwiz(answers: Sequence[Mapping], truth: truths.VizWiz, files: Files) -> dict:
    images = _ids(answers)
    if truth.image_of is not None:
        check_ids(images, list(truth.image_of), Files(files.answers, str(files.questions), None))
        images = [truth.image_of[number] for number in images]
    check_ids(images, [entry["image"] for entry in truth.entries], files)
    texts = {image: answer["text"] for image, answer in zip(images, answers, strict=True)}
    return score_vizwiz(texts, truth.entries)


def _gqa(answers: Sequence[Mapping], questions: dict[str, dict], files: Files) -> dict:
    check_ids(_ids(answers), questions, files)
    return score_gqa(answers, questions)


def _scienceqa(answers: Sequence[Mapping], truth: truths.ScienceQA, files: Files) -> dict:
    check_ids(_ids(answers), truth.split, files)
    return score_scienceqa(answers, truth.problems, truth.split)


def _mmbench(answers: Sequence[Mapping], rows: list[MMBenchRow], files: Files) -> dict:
    check_once([(answer["question_id"], answer["round_id"]) for answer in answers], files)
    check_ids(list(set(_ids(answers))), [row.index for row in rows], files)
    by_index = {row.index: row for row in rows}
    wrong = {}
    for number, answer in enumerate(answers, 1):
        letters = answer["option_char"]
        if sorted(letters) != list(string.ascii_uppercase[: len(answer["options"])]):
            raise ValueError(f"{files.answers}, line {number}: 'option_char' is not the letters of its 'options'")
        row = by_index[answer["question_id"]]
        if row.cells["answer"] not in letters:
            wrong[row.index] = _without_its_answer(row, letters, files)
    entries = [{**row.cells, "index": row.index} for row in rows]
    with naming(files.answers):
        figures = score_mmbench(answers, entries)
    more = [f"and {len(wrong) - NOTES} more rows are scored as wrong"] if len(wrong) > NOTES else []
    return figures | ({NOTE: [*wrong.values()][:NOTES] + more} if wrong else {})


def _without_its_answer(row: MMBenchRow, letters: Sequence[str], files: Files) -> str:
    """Why a row's true option was not among those asked, where it is the row's own fault.

    MMBench's own program reads the same cells as empty and can match no answer with them either: it counts as wrong.
    """
    truth, asked = row.cells["answer"], OPTIONS[: len(row.options)]
    if row.problem:
        return f"{row.where}: {row.problem}; scored as wrong"
    if truth not in row.cells or sorted(letters) != asked:
        raise ValueError(
            f"{files.answers}: question {row.index} was asked with options {letters}, but {files.annotations} has the "
            f"answer {truth!r:.80}; give the file that was asked"
        )
    return f"{row.lost or f'{row.where}, column {truth}: is empty'}; the answer is {truth}, so it is scored as wrong"


def _mme(answers: Sequence[Mapping], truth: dict[Key, str], files: Files) -> dict:
    if not all(isinstance(number, str) and "/" in number for number in _ids(answers)):
        raise ValueError(
            f"{files.answers}: MME's ids are like existence/000000006040.jpg, these are not; is it MME's file?"
        )
    keys = [truth_key(answer, truth) for answer in answers]
    check_ids(list(set(keys)), truth, files)
    for category in {category for category, _, _ in keys}:
        images = [image for key_category, image, _ in keys if key_category == category]
        if images[::2] != images[1::2] or len(set(images)) * 2 != len(images):
            raise ValueError(f"{files.answers}: each image of {category} needs two answers, one after the other")
    with naming(files.annotations):
        return score_mme(answers, truth)


def _seed(answers: Sequence[Mapping], data: dict, files: Files) -> dict:
    numbers = {(question["data_type"], question_id(question["question_id"])) for question in data["questions"]}
    answered = set(_ids(answers))
    # Many have no videos: images or videos may be left out as a whole; the total then counts them as wrong, as LLaVA's.
    kinds = {kind for kind, number in numbers if number in answered} or {kind for kind, _ in numbers}
    check_ids(_ids(answers), [number for kind, number in numbers if kind in kinds], files)
    return score_seed(answers, data)


PROMPT: dict[str, Kind] = {"prompt": (str,)}
ROUNDS: dict[str, Kind] = {"round_id": (int,), "options": [(str,)], "option_char": [(str,)]}
SCORERS = {
    "pope": Scorer(
        truths.read_pope,
        _pope,
        "the folder pope/coco, with coco_pope_*.json",
        {},
        ("random", "popular", "adversarial"),
    ),
    "textvqa": Scorer(truths.read_textvqa, _textvqa, "textvqa/TextVQA_0.5.1_val.json", PROMPT),
    "vqav2": Scorer(
        truths.read_vqav2,
        _vqav2,
        "v2_mscoco_val2014_annotations.json (test splits: by their server)",
        {},
        ("answer_type",),
    ),
    "gqa": Scorer(
        truths.read_gqa, _gqa, "gqa/data, or testdev_balanced_questions.json in it", {}, ("structural", "semantic")
    ),
    "vizwiz": Scorer(truths.read_vizwiz, _vizwiz, "val.json (the test split: by its server)", {}, ("answer_type",)),
    "scienceqa": Scorer(
        truths.read_scienceqa, _scienceqa, "the folder scienceqa, with pid_splits.json and problems.json", PROMPT
    ),
    "mmbench": Scorer(
        truths.read_mmbench_answers, _mmbench, "mmbench/mmbench_dev_20230712.tsv", ROUNDS, ("l2-category",)
    ),
    "mme": Scorer(
        lambda files: read_truth(files.annotations),
        _mme,
        "the folder MME/MME_Benchmark_release_version",
        PROMPT,
        ("subtasks",),
    ),
    "seed": Scorer(truths.read_seed, _seed, "seed_bench/SEED-Bench.json", {}, ("types",)),
}
