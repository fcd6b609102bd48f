"""VizWiz: its own VQAEval, on what LLaVA's scripts/convert_vizwiz_for_submission.py makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_jax.evaluation.benchmarks import vqa
from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Submission
from llava_jax.evaluation.benchmarks.common import check_complete, check_ids, question_ids, read_texts
from llava_jax.evaluation.questions import LOADER
from llava_jax.records import read_json


@dataclass(frozen=True)
class Truth:
    """VizWiz's annotations, and question_id → image, where ids are not the images' names."""

    entries: list[dict]
    image_of: Mapping | None


def read_truth(files: Files) -> Truth:
    kinds = {"image": (str,), "answers": vqa.PEOPLE, "answer_type": (str,)}
    entries = vqa.check_annotated(read_json(files.annotations), kinds, files.annotations)
    if files.questions is None:
        return Truth(entries, None)
    asked = read_texts(files.questions, "image", remedy="VizWiz's question file has question_id and image")
    return Truth(entries, {question["question_id"]: question["image"] for question in asked})


def _score(answers: Sequence[Mapping], truth: Truth, files: Files) -> dict:
    images = question_ids(answers)
    if truth.image_of is not None:
        check_ids(images, truth.image_of, files.answers, str(files.questions))
        images = [truth.image_of[number] for number in images]
    check_ids(images, [entry["image"] for entry in truth.entries], files.answers, files.annotations)
    texts = {image: answer["text"] for image, answer in zip(images, answers, strict=True)}
    return score_vizwiz(texts, truth.entries)


def score_vizwiz(answers: Mapping[str, str], annotations: Sequence[Mapping]) -> dict:
    """Accuracies in percent, rounded to two places: of all and by "answer_type".

    What counts is what LLaVA submits: each text through `evalai_answer`. VizWiz's table of contractions, which is
    typed with ’, then never meets a word that it has. `answers` has a text for the image of each annotation.
    """
    accuracies = {}
    for entry in annotations:
        text = vqa.vqa_answer(vqa.evalai_answer(answers[entry["image"]]))
        # Quirk: what people said is compared as it was typed, not normalised.
        accuracies[entry["image"]] = vqa.soft_accuracy(text, [person["answer"] for person in entry["answers"]])
    return vqa.by_type(accuracies, {entry["image"]: entry for entry in annotations}, ("answer_type",))


def convert(answers_file, question_file) -> bytes:
    answers, questions = vqa.submitted_answers(answers_file), read_texts(question_file, "image")
    check_complete(answers_file, [number for number in question_ids(questions) if number not in answers])
    return json.dumps([{"image": q["image"], "answer": answers[q["question_id"]]} for q in questions]).encode()


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(
        read_truth,
        _score,
        "val.json (the test split: by its server)",
        questions="if ids are no images",
        table=("answer_type",),
    ),
    submission=Submission(convert, "question_file", "llava_test.jsonl"),
    published={"accuracy": Published(57.6, "test, by its server")},
)
