"""TextVQA: the M4C accuracy; llava/eval/eval_textvqa.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llava_jax.evaluation.benchmarks import vqa
from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Workload
from llava_jax.evaluation.benchmarks.common import SERVER
from llava_jax.evaluation.questions import LOADER
from llava_jax.fields import Kind
from llava_jax.records import check_objects, naming, read_json_key


def read_truth(files: Files) -> list[dict]:
    data = read_json_key(files.annotations, "data", "TextVQA_0.5.1_val.json, with a list 'data'")
    kinds: dict[str, Kind] = {"image_id": (str,), "question": (str,), "answers": [(str,)]}
    return check_objects(data, kinds, files.annotations, SERVER, "entry")


def _score(answers: Sequence[Mapping], data: list[dict], files: Files) -> dict:
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


def textvqa_question(prompt: str) -> str:
    """The question within a prompt of LLaVA's three TextVQA question files, in lower case; ValueError if it has none of
    their forms (the reference: AssertionError, AttributeError)."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"the prompt {prompt!r:.200} is of no TextVQA form: 'QUESTION\\nAnswer …', either with a line 'Reference OCR "
        "token: …', or 'OCR tokens: … Question: QUESTION Short answer:'"
    )


def textvqa_annotations(annotations: Sequence[Mapping]) -> dict[tuple[str, str], Mapping]:
    """(image_id, question in lower case) → annotation. Quirk: of equal questions on an image, the last counts."""
    return {(entry["image_id"], entry["question"].lower()): entry for entry in annotations}


def score_textvqa(answers: Sequence[Mapping], annotations: Sequence[Mapping]) -> dict[str, float]:
    """{"accuracy": percent}; an answer's question_id is the image's id.

    Raises:
        ValueError: there are no answers, a prompt has another form, or a question has not ten annotated answers.
    """
    if not answers:
        raise ValueError("there are no TextVQA answers")
    by_question = textvqa_annotations(annotations)
    scores = []
    for answer in answers:
        people = by_question[answer["question_id"], textvqa_question(answer["prompt"])]["answers"]
        if len(people) != 10:
            raise ValueError(f"image {answer['question_id']}: {len(people)} annotated answers; TextVQA has 10 of each")
        scores.append(
            vqa.soft_accuracy(vqa.evalai_answer(answer["text"]), [vqa.evalai_answer(said) for said in people])
        )
    return {"accuracy": 100 * (sum(scores) / len(scores))}


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(read_truth, _score, "textvqa/TextVQA_0.5.1_val.json", {"prompt": (str,)}),
    published={"accuracy": Published(64.9, "val")},
    workload=Workload("TextVQA", 5000, 3166, (1024, 768), 96, 12),  # with its reference OCR tokens
)
