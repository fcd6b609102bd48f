"""`llava-jax evaluate`. Flags that the reference's programs have keep their names there."""

from __future__ import annotations

import argparse
import sys

from llava_jax.cli.flags import (
    add_distributed_argument,
    add_mesh_argument,
    add_model_arguments,
    initialize,
    options_from,
)
from llava_jax.cli.score import print_scores
from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.evaluate_options import EvaluateOptions
from llava_jax.evaluation.questions import SINGLE_PRED_PROMPT
from llava_jax.evaluation.scoring import check_annotations

DESCRIPTION = (
    "Answer a question file of LLaVA's eval folder. Killed and started again with the same flags, it goes on. "
    "Questions that cannot be asked get an empty answer, are listed, and make the exit status 3."
)
EXAMPLE = (
    "--task pope --model-path llava-v1.6-vicuna-7b --question-file llava_pope_test.jsonl --image-folder val2014 "
    "--answers-file answers.jsonl"
)
LISTED = 100  # questions that could not be asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--question-file", required=True, help="jsonl; ScienceQA's json; MMBench's tsv")
    parser.add_argument("--image-folder", default="", help="where the images named in it stand, if not by URL")
    parser.add_argument("--answers-file", required=True, help="jsonl, in the order of the questions")
    parser.add_argument("--task", choices=BENCHMARKS, help="which benchmark it is (as the question file's ending says)")
    parser.add_argument("--annotations", metavar="PATH", help="score the answers too; see llava-jax score --help")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s; the original: 0.2)")
    parser.add_argument("--top_p", type=float, help="(the checkpoint's, or 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, help="(128; 1024 for science, mmbench, llava-bench and mm-vet)")
    parser.add_argument("--num-chunks", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--chunk-idx", type=int, default=0, help="answer this chunk only, to a file of its own")
    parser.add_argument("--single-pred-prompt", action="store_true", help="science, mmbench: ask for the letter alone")
    parser.add_argument("--all-rounds", action="store_true", help="mmbench: once for each rotation of the options")
    parser.add_argument("--lang", choices=SINGLE_PRED_PROMPT, default="en", help="mmbench (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first question that cannot be asked")
    add_mesh_argument(parser)
    add_distributed_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Answer, list what could not be asked, and score if there are annotations; the exit status."""
    options = options_from(EvaluateOptions, args)
    if args.annotations is not None:
        if args.num_chunks > 1:
            raise ValueError("--annotations: a chunk is not scored; join the chunks' files and use llava-jax score")
        check_annotations(args.task, args.answers_file, args.annotations, args.question_file)
    initialize(args)
    from llava_jax.evaluation.run import evaluate
    from llava_jax.parallel import multihost

    failures = evaluate(options)
    if multihost.is_primary():
        for failure in failures[:LISTED]:
            print(failure, file=sys.stderr)
        more = f", {len(failures) - LISTED} of them not listed here," if len(failures) > LISTED else ""
        if failures:
            print(f"{len(failures)} questions{more} could not be asked; metadata.error says why", file=sys.stderr)
        print(f"wrote {options.answers_file}")
        if args.annotations is not None:
            print_scores(args.task, args.answers_file, args.annotations, args.question_file)
    return 3 if failures else 0
