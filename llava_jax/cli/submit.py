"""`llava-jax submit`."""

from __future__ import annotations

import argparse

from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.submission import write_submission

DESCRIPTION = "Write an answer file in the form that a benchmark's server, or its own evaluator, takes."
EXAMPLE = "--task vizwiz --answers-file answers.jsonl --question-file llava_test.jsonl --output vizwiz.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    submissions = {task: b.submission for task, b in BENCHMARKS.items() if b.submission}
    parser.add_argument("--task", required=True, choices=list(submissions))
    parser.add_argument("--answers-file", required=True, help="what llava-jax evaluate wrote")
    parser.add_argument("--output", required=True, help="the file to write; mme: the folder")
    for needed in ("question_file", "annotations"):
        uses = "; ".join(f"{task}: {s.what}" for task, s in submissions.items() if s.needs == needed)
        parser.add_argument("--" + needed.replace("_", "-"), help=uses)


def run(args: argparse.Namespace) -> None:
    for path in write_submission(args.task, args.answers_file, args.output, args.question_file, args.annotations):
        print(f"wrote {path}")
