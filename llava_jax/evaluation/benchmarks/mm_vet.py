"""MM-Vet, whose answers GPT-4 judges, which is not done here. LLaVA's scripts/convert_mmvet_for_eval.py."""

import json

from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Submission
from llava_jax.evaluation.benchmarks.common import read_texts
from llava_jax.evaluation.questions import VQA


def convert(answers_file) -> bytes:
    answers = read_texts(answers_file, "text")
    return json.dumps({f"v1_{answer['question_id']}": answer["text"] for answer in answers}, indent=2).encode()


BENCHMARK = Benchmark(
    VQA,
    judged="make its file with llava-jax submit --task mm-vet --answers-file {answers} --output mm-vet.json, "
    "and hand that to MM-Vet's evaluator",
    submission=Submission(convert),
)
