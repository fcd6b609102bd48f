"""VQAv2: VQAEval of vqaEval.py, on what LLaVA's scripts/convert_vqav2_for_submission.py makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llava_jax.evaluation.benchmarks import vqa
from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Submission, Workload
from llava_jax.evaluation.benchmarks.common import SERVER, check_ids, question_ids, read_texts
from llava_jax.evaluation.questions import ID, LOADER
from llava_jax.records import read_json_key


def read_truth(files: Files) -> list[dict]:
    what = f"v2_mscoco_val2014_annotations.json, with a list 'annotations'; {SERVER}"
    entries = read_json_key(files.annotations, "annotations", what)
    kinds = {"question_id": ID, "answers": vqa.PEOPLE, "answer_type": (str,), "question_type": (str,)}
    return vqa.check_annotated(entries, kinds, files.annotations)


def _score(answers: Sequence[Mapping], entries: list[dict], files: Files) -> dict:
    check_ids(question_ids(answers), question_ids(entries), files.answers, files.annotations)
    return score_vqav2(answers, entries)


def score_vqav2(answers: Sequence[Mapping], annotations: Sequence[Mapping]) -> dict:
    """Accuracies in percent, rounded to two places: of all, by "answer_type", by "question_type".

    What counts is what LLaVA submits: each text through `evalai_answer`, then VQAEval of vqaEval.py. Every annotation
    must have its answer.
    """
    texts = {answer["question_id"]: vqa.evalai_answer(answer["text"]) for answer in answers}
    return vqa.by_type(
        {entry["question_id"]: vqa_accuracy(texts[entry["question_id"]], entry) for entry in annotations},
        {entry["question_id"]: entry for entry in annotations},
        ("answer_type", "question_type"),
    )


def vqa_accuracy(text: str, annotation: Mapping) -> float:
    """The share of a person that `text` is worth, 0 … 1; VQAEval.evaluate on one question."""
    text = vqa.one_line(text)
    people = [{**person, "answer": vqa.one_line(person["answer"])} for person in annotation["answers"]]
    # Quirk: where all people agree to the letter, neither side is normalised.
    if len({person["answer"] for person in people}) > 1:
        text = vqa.vqa_answer(text)
        people = [{**person, "answer": vqa.vqa_answer(person["answer"])} for person in people]
    shares = []
    for person in people:
        # Quirk: the others are those whose record differs, so records without an answer_id leave together.
        others = [other["answer"] for other in people if other != person]
        shares.append(min(1, others.count(text) / 3))
    return sum(shares) / len(shares)


def convert(answers_file, question_file) -> bytes:
    """An answer to every question of the file, which for the server is the whole test split; "" where there is none."""
    answers, ids = vqa.submitted_answers(answers_file), question_ids(read_texts(question_file))
    print(f"{sum(number in answers for number in ids)} of {len(ids)} questions have an answer")
    return json.dumps([{"question_id": number, "answer": answers.get(number, "")} for number in ids]).encode()


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(
        read_truth, _score, "v2_mscoco_val2014_annotations.json (test splits: by their server)", table=("answer_type",)
    ),
    submission=Submission(convert, "question_file", "llava_vqav2_mscoco_test2015.jsonl, all that the server asks"),
    published={"accuracy": Published(81.8, "test-dev, by its server")},
    workload=Workload("VQAv2", 107394, 36807, (640, 480), 32, 6),
)
