"""The `llava-jax` command (`python -m llava_jax`). Flags carry the names of LLaVA's own scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from llava_jax import terminal
from llava_jax.capacity import report as ahead
from llava_jax.conversion import verify
from llava_jax.conversion.arguments import add_arguments, add_export_arguments
from llava_jax.evaluation import score, submission
from llava_jax.evaluation.evaluate_options import EvaluateOptions, add_evaluate_arguments
from llava_jax.failures import exit_status
from llava_jax.flags import check_paths, options_from
from llava_jax.training.arguments import add_train_arguments
from llava_jax.training.train_options import TrainOptions
from llava_jax.web import app as web

LISTED = 100  # questions that could not be asked
LARGEST = 2**31 - 1  # of a number that is counted or seeded with


@dataclass(frozen=True)
class Command:
    """One of `llava-jax`'s; `run` takes the parsed flags and may return an exit status."""

    name: str
    help: str
    description: str
    example: str  # what follows `llava-jax`
    add_arguments: Callable
    run: Callable


def _convert(args) -> None:
    from llava_jax.conversion.from_hf import run

    run(args)


def _export(args) -> None:
    from llava_jax.conversion.to_hf import run

    run(args)


def _train(args) -> None:
    options = options_from(TrainOptions, args)
    _initialize(args)
    from llava_jax.training.train import train

    print(f"wrote {train(options)}")


def _evaluate(args) -> int:
    options = options_from(EvaluateOptions, args)
    if args.annotations is not None:
        if args.num_chunks > 1:
            raise ValueError("--annotations: a chunk is not scored; join the chunks' files and use llava-jax score")
        score.check_annotations(args.task, args.answers_file, args.annotations, args.question_file)
    _initialize(args)
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
            score.print_scores(args.task, args.answers_file, args.annotations, args.question_file)
    return 3 if failures else 0


def _initialize(args) -> None:
    if args.distributed:
        import jax

        jax.distributed.initialize()


def _add_demo_arguments(demo) -> None:
    demo.add_argument(
        "--output", help="keep the converted checkpoint here (a temporary directory); of --train, the run"
    )
    demo.add_argument("--model", help="a checkpoint that --train made (the bundled one)")
    what = demo.add_mutually_exclusive_group()
    what.add_argument("--score", action="store_true", help="how many answers are right, kind by kind")
    what.add_argument("--train", action="store_true", help="make the model from nothing, or go on with it (hours)")
    demo.add_argument("--scenes", type=int, help="how many pictures are asked about (6; with --score 500)")
    demo.add_argument("--seed", type=int, default=0, help="of the pictures (%(default)s)")
    demo.add_argument("--no-anyres", action="store_true", help="with --score: show it the base tile alone")
    demo.add_argument("--json", action="store_true", help="with --score: as one line of JSON")


def _demo(args) -> None:
    if args.scenes is not None and not 1 <= args.scenes <= LARGEST:
        raise ValueError(f"--scenes {args.scenes} must be above 0 and at most {LARGEST:,}")
    if not 0 <= args.seed <= LARGEST:
        raise ValueError(f"--seed {args.seed} must be at least 0 and at most {LARGEST:,}")
    if args.train:
        if args.output is None:
            raise ValueError("--train needs --output: a new directory, or that of a killed run to go on with")
        from llava_jax.demo.train import train_demo

        print(f"wrote {train_demo(args.output)}")
    elif args.score:
        from llava_jax.demo import score as demo_score

        demo_score.run(args.model, args.output, args.scenes or 500, args.seed, not args.no_anyres, args.json)
    else:
        from llava_jax.demo import show

        show.run(args.model, args.output, args.scenes or 6, args.seed)


COMMANDS = (
    Command(
        "ask",
        "answer a question about one or more pictures",
        "Answer a question about one or more pictures, or none.",
        'ask --model-path llava-v1.6-vicuna-7b --image-file me.jpg --query "What is this?"',
        terminal.add_ask_arguments,
        terminal.ask,
    ),
    Command(
        "chat",
        "talk about a picture",
        "Talk about a picture, or about none: each turn knows those before it, and answers come as they are made.",
        "chat --model-path llava-v1.6-vicuna-7b --image-file me.jpg",
        terminal.add_chat_arguments,
        terminal.chat,
    ),
    Command(
        "web",
        "talk about pictures in a browser",
        "Serve a page on which pictures are shown and talked about, to one browser or several.",
        "web --model-path llava-v1.6-vicuna-7b --port 7860",
        web.add_web_arguments,
        web.run,
    ),
    Command(
        "convert",
        "turn a published checkpoint into an Orbax directory",
        "Turn a published checkpoint, local or on the hub, into an Orbax directory.",
        "convert liuhaotian/llava-v1.6-vicuna-7b --dtype bfloat16",
        add_arguments,
        _convert,
    ),
    Command(
        "export",
        "write a converted or trained checkpoint in a published layout",
        "Write a converted or trained checkpoint as safetensors in a published layout.",
        "export llava-v1.6-vicuna-7b --output exported --layout llava-hf --dtype bfloat16",
        add_export_arguments,
        _export,
    ),
    Command(
        "train",
        "LLaVA's training stages",
        "Train a converted checkpoint on LLaVA's own data files. A killed run, started again with the same flags, goes "
        "on where it was saved.",
        "train --stage finetune --model-path llava-v1.6-vicuna-7b --data-path llava_v1_5_mix665k.json "
        "--image-folder data --output-dir tuned --bf16 --mesh fsdp=8",
        add_train_arguments,
        _train,
    ),
    Command(
        "verify",
        "whether a converted checkpoint is the same model as the published one",
        verify.DESCRIPTION,
        "verify llava-v1.6-vicuna-7b --reference liuhaotian/llava-v1.6-vicuna-7b",
        verify.add_verify_arguments,
        verify.run,
    ),
    Command(
        "evaluate",
        "answer a benchmark's question file",
        "Answer a question file of LLaVA's eval folder. Killed and started again with the same flags, it goes on. "
        "Questions that cannot be asked get an empty answer, are listed, and make the exit status 3.",
        "evaluate --task pope --model-path llava-v1.6-vicuna-7b --question-file llava_pope_test.jsonl "
        "--image-folder val2014 --answers-file answers.jsonl",
        add_evaluate_arguments,
        _evaluate,
    ),
    Command(
        "score",
        "score an answer file",
        "Score an answer file as the benchmark's own program does.",
        "score --task pope --answers-file answers.jsonl --annotations pope/coco",
        score.add_score_arguments,
        score.run,
    ),
    Command(
        "submit",
        "write an answer file in the form that a benchmark's server takes",
        "Write an answer file in the form that a benchmark's server, or its own evaluator, takes.",
        "submit --task vizwiz --answers-file answers.jsonl --question-file llava_test.jsonl --output vizwiz.json",
        submission.add_submit_arguments,
        submission.run,
    ),
    Command(
        "ahead",
        "what batch evaluation needs on a TPU that is not there",
        "Compile batch evaluation's programs for TPU slices that are not there, with libtpu alone, and say what fits, "
        "what is copied, and how fast it is at best. Minutes for each slice.",
        "ahead --topology v5e-1 --quantize int8 --int8-prefix",
        ahead.add_ahead_arguments,
        ahead.run,
    ),
    Command(
        "demo",
        "the whole path with the small model that the package bundles",
        "Convert the bundled model, which this package trained on pictures that it draws, load it, ask it about "
        "pictures that it has not seen, and save them with its answers as llava-jax-demo.png.",
        "demo --score --scenes 500 --seed 0 --no-anyres",
        _add_demo_arguments,
        _demo,
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; an error is one line on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="llava-jax", description="LLaVA-1.6 in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        example = f"example: llava-jax {command.example}"
        its = commands.add_parser(command.name, help=command.help, description=command.description, epilog=example)
        command.add_arguments(its)
        its.set_defaults(run=command.run)

    def run() -> int | None:
        args = parser.parse_args(argv)
        check_paths(vars(args))
        return args.run(args)

    return exit_status("llava-jax", run, own_process=argv is None)
