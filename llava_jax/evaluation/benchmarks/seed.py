"""SEED-Bench by question type, its images and its videos. LLaVA's scripts/convert_seed_for_submission.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Submission
from llava_jax.evaluation.benchmarks.common import check_complete, check_ids, percent, question_ids, read_texts
from llava_jax.evaluation.questions import ID, LOADER
from llava_jax.fields import Kind, problem_of
from llava_jax.records import check_objects, read_json, read_json_key

KINDS: dict[str, Kind] = {"question_id": (str, int), "question_type_id": (int,), "data_type": (str,), "answer": (str,)}


def read_truth(files: Files) -> dict:
    path, whole = files.annotations, "SEED-Bench.json's questions have all of them"
    questions = read_json_key(path, "questions", "SEED-Bench.json")
    names = read_json_key(path, "question_type", "SEED-Bench.json")
    check_objects(questions, KINDS, path, whole, "entry")
    numbers = list(names.values()) if isinstance(names, dict) else []
    if strangers := [n for n, question in enumerate(questions, 1) if question["question_type_id"] not in numbers]:
        raise ValueError(f"{path}, entry {strangers[0]}: its question_type_id is none of 'question_type'; {whole}")
    return {"questions": questions, "question_type": {name: n for name, n in names.items() if isinstance(n, int)}}


def _score(answers: Sequence[Mapping], data: dict, files: Files) -> dict:
    numbers = {(question["data_type"], question_id(question["question_id"])) for question in data["questions"]}
    ids = question_ids(answers)
    answered = set(ids)
    # Many have no videos: images or videos may be left out as a whole; the total then counts them as wrong, as LLaVA's.
    kinds = {kind for kind, number in numbers if number in answered} or {kind for kind, _ in numbers}
    check_ids(ids, [number for kind, number in numbers if kind in kinds], files.answers, files.annotations)
    return score_seed(answers, data)


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
    """
    texts = {answer["question_id"]: answer["text"] for answer in answers}
    questions = annotations["questions"]
    # Quirk: the text must be the letter and nothing else; "A." is wrong.
    right = [texts.get(question_id(question["question_id"])) == question["answer"] for question in questions]
    names = {number: name for name, number in annotations["question_type"].items()}

    def accuracy(field: str, value) -> float | None:
        return percent([ok for ok, question in zip(right, questions, strict=True) if question[field] == value])

    types = sorted({question["question_type_id"] for question in questions})
    return {
        "accuracy": percent(right),
        "image": accuracy("data_type", "image"),
        "video": accuracy("data_type", "video"),
        "types": {names[number]: accuracy("question_type_id", number) for number in types},
    }


def convert(answers_file, annotations) -> bytes:
    """A line for each question of SEED-Bench.json, whose ids are texts where LLaVA's question file has integers."""
    answers = {answer["question_id"]: answer["text"] for answer in read_texts(answers_file, "text")}
    data = read_json(annotations)
    if problem := problem_of(data, {"questions": [{"question_id": ID}]}):
        raise ValueError(
            f"{annotations}: expected SEED-Bench.json, with 'questions' that have a question_id: {problem}"
        )
    ids = question_ids(data["questions"])
    check_complete(answers_file, [number for number in ids if _as_answered(number, answers) not in answers])
    said = [{"question_id": number, "prediction": answers[_as_answered(number, answers)]} for number in ids]
    return "".join(json.dumps(entry) + "\n" for entry in said).encode()


def _as_answered(question_id, answers: Mapping):
    if question_id in answers or not re.fullmatch(r"\s*[+-]?\d{1,30}\s*", str(question_id)):
        return question_id
    return int(question_id)


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(read_truth, _score, "seed_bench/SEED-Bench.json", table=("types",)),
    submission=Submission(convert, "annotations", "SEED-Bench.json"),
    published={"image": Published(70.2, "its image questions")},
)
