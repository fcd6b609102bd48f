"""`llava-jax score`."""

from __future__ import annotations

import argparse
import json

from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.benchmarks.benchmark import NOTES, Files
from llava_jax.evaluation.scoring import check_scorable, published_beside, read_answers, table

DESCRIPTION = "Score an answer file as the benchmark's own program does."
EXAMPLE = "--task pope --answers-file answers.jsonl --annotations pope/coco"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, and below them what --annotations is for each task."""
    parser.add_argument("--task", required=True, choices=BENCHMARKS)
    parser.add_argument("--answers-file", required=True, help="what llava-jax evaluate, or LLaVA's own program, wrote")
    parser.add_argument("--annotations", metavar="PATH", help="the true answers: a file or folder, by task (see below)")
    scorers = {task: benchmark.scorer for task, benchmark in BENCHMARKS.items() if benchmark.scorer}
    questions = "; ".join(f"{task}: {scorer.questions}" for task, scorer in scorers.items() if scorer.questions)
    parser.add_argument("--question-file", help=questions)
    parser.add_argument("--json", action="store_true", help="one line of JSON, with all figures")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [f"  {task:<12}{scorer.annotations}" for task, scorer in scorers.items()]
    parser.epilog = "\n".join(["--annotations, as in LLaVA's playground/data/eval:", *lines, "", parser.epilog or ""])


def run(args: argparse.Namespace) -> None:
    print_scores(args.task, args.answers_file, args.annotations, args.question_file, args.json)


def print_scores(
    task: str, answers_file: str, annotations: str | None, question_file: str | None = None, as_json: bool = False
) -> None:
    """The scores of an answer file: a table, or one line of JSON."""
    scorer, path = check_scorable(task, answers_file, annotations)
    answers, files = read_answers(answers_file, scorer.keys), Files(answers_file, path, question_file)
    figures = scorer.score(answers, scorer.read(files), files)
    published = published_beside(BENCHMARKS[task], path)
    if as_json:
        scores = {name: entry.score for name, entry in published.items()}
        print(json.dumps({"task": task, "answers": len(answers), "published": scores, **figures}))
    else:
        notes = figures.pop(NOTES, [])
        lines = "\n".join([table(f"{task}, {len(answers)} answers", figures, published, scorer.table), *notes])
        print(lines.encode(errors="backslashreplace").decode())  # an annotation's half characters
