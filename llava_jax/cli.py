"""The `llava-jax` command (`python -m llava_jax`). Flags carry the names of LLaVA's own scripts."""

from __future__ import annotations

import argparse
import os
import sys

from llava_jax.constants import DTYPES
from llava_jax.conversion.arguments import add_arguments, add_export_arguments
from llava_jax.conversion.verify import DESCRIPTION as VERIFY
from llava_jax.conversion.verify import add_verify_arguments
from llava_jax.conversion.verify import run as verify_converted
from llava_jax.evaluation.ahead import add_ahead_arguments
from llava_jax.evaluation.ahead import run as report_ahead
from llava_jax.evaluation.options import add_evaluate_arguments
from llava_jax.evaluation.options import options_from as evaluate_options
from llava_jax.evaluation.score import add_score_arguments, check_scorable
from llava_jax.evaluation.score import run as score_answers
from llava_jax.evaluation.submission import add_submit_arguments
from llava_jax.evaluation.submission import run as write_submission
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.image import load_image
from llava_jax.options import add_int8_arguments, check_paths
from llava_jax.training.arguments import add_train_arguments
from llava_jax.training.arguments import options_from as train_options

LISTED = 100  # questions that could not be asked


def _add_ask(commands) -> None:
    ask = commands.add_parser(
        "ask",
        help="answer a question about one or more pictures",
        description="Answer a question about one or more pictures, or none.",
        epilog='example: llava-jax ask --model-path llava-v1.6-vicuna-7b --image-file me.jpg --query "What is this?"',
    )
    ask.add_argument("--model-path", required=True, help="a directory that convert/from_hf.py wrote")
    ask.add_argument("--image-file", help="a path or URL, or several with --sep between")
    ask.add_argument("--query", required=True, help="the question; <image> may be placed by hand")
    ask.add_argument("--conv-mode", choices=sorted(conv_templates), help="prompt template (picked from the checkpoint)")
    ask.add_argument("--sep", default=",", help="between several image files (%(default)r)")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s; the original: 0.2)")
    ask.add_argument("--top_p", type=float, help="(as the checkpoint's generation_config.json, or 1)")
    ask.add_argument("--top_k", type=int, help="0 is off (as the checkpoint's generation_config.json, or 50)")
    ask.add_argument("--max_new_tokens", type=int, default=512, help="(%(default)s)")
    ask.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    ask.add_argument("--dtype", choices=DTYPES, help="(float32 on CPU, bfloat16 elsewhere)")
    add_int8_arguments(ask)
    ask.set_defaults(run=_ask)


def _ask(args) -> None:
    import llava_jax  # JAX is imported once the command line is known to be good

    images = [load_image(path) for path in _image_files(args.image_file, args.sep)]
    held = dict(dtype=args.dtype, quantize=args.quantize, int8_prefix=args.int8_prefix)
    llava, params = llava_jax.load(args.model_path, **held)
    names = ("conv_mode", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    for piece in llava.stream(params, images, args.query, **{name: getattr(args, name) for name in names}):
        print(piece, end="", flush=True)
    print()


def _image_files(image_file: str | None, sep: str) -> list[str]:
    """The reference's image_parser, but a file that has `sep` in its own name is one file."""
    if image_file is None:
        return []
    return [image_file] if os.path.exists(image_file) else image_file.split(sep)


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="turn a published checkpoint into an Orbax directory",
        description="Turn a published checkpoint, local or on the hub, into an Orbax directory.",
        epilog="example: llava-jax convert liuhaotian/llava-v1.6-vicuna-7b --dtype bfloat16",
    )
    add_arguments(convert)
    convert.set_defaults(run=_convert)


def _convert(args) -> None:
    from llava_jax.conversion.from_hf import run

    run(args)


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a converted or trained checkpoint in a published layout",
        description="Write a converted or trained checkpoint as safetensors in a published layout.",
        epilog="example: llava-jax export llava-v1.6-vicuna-7b --output exported --layout llava-hf --dtype bfloat16",
    )
    add_export_arguments(export)
    export.set_defaults(run=_export)


def _export(args) -> None:
    from llava_jax.conversion.to_hf import run

    run(args)


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="LLaVA's training stages",
        description="Train a converted checkpoint on LLaVA's own data files. A killed run, started again with the same "
        "flags, goes on where it was saved.",
        epilog="example: llava-jax train --stage finetune --model-path llava-v1.6-vicuna-7b "
        "--data-path llava_v1_5_mix665k.json --image-folder data --output-dir tuned --bf16 --mesh fsdp=8",
    )
    add_train_arguments(train)
    train.add_argument(
        "--distributed", action="store_true", help="one of a pod's processes: call jax.distributed.initialize() first"
    )
    train.set_defaults(run=_train)


def _train(args) -> None:
    options = train_options(args)
    if args.distributed:
        import jax

        jax.distributed.initialize()
    from llava_jax.training.train import train

    print(f"wrote {train(options)}")


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="answer a benchmark's question file",
        description="Answer a question file of LLaVA's eval folder. Killed and started again with the same flags, it "
        "goes on. Questions that cannot be asked get an empty answer, are listed, and make the exit status 3.",
        epilog="example: llava-jax evaluate --task pope --model-path llava-v1.6-vicuna-7b --question-file "
        "llava_pope_test.jsonl --image-folder val2014 --answers-file answers.jsonl",
    )
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args) -> int:
    options = evaluate_options(args)
    if args.annotations is not None:
        if args.num_chunks > 1:
            raise ValueError("--annotations: a chunk is not scored; join the chunks' files and use llava-jax score")
        check_scorable(args)
    if args.distributed:
        import jax

        jax.distributed.initialize()
    from llava_jax import hosts
    from llava_jax.evaluation.run import evaluate

    failures = evaluate(options)
    if hosts.is_first():
        for failure in failures[:LISTED]:
            print(failure, file=sys.stderr)
        more = f", {len(failures) - LISTED} of them not listed here," if len(failures) > LISTED else ""
        if failures:
            print(f"{len(failures)} questions{more} could not be asked; metadata.error says why", file=sys.stderr)
        print(f"wrote {options.answers_file}")
        if args.annotations is not None:
            score_answers(args)
    return 3 if failures else 0


def _add_ahead(commands) -> None:
    ahead = commands.add_parser(
        "ahead",
        help="what batch evaluation needs on a TPU that is not there",
        description="Compile batch evaluation's programs for TPU slices that are not there, with libtpu alone, and "
        "say what fits, what is copied, and how fast it is at best. Minutes for each slice.",
        epilog="example: llava-jax ahead --topology v5e-1 --quantize int8 --int8-prefix",
    )
    add_ahead_arguments(ahead)
    ahead.set_defaults(run=report_ahead)


def _add_verify(commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="whether a converted checkpoint is the same model as the published one",
        description=VERIFY,
        epilog="example: llava-jax verify llava-v1.6-vicuna-7b --reference liuhaotian/llava-v1.6-vicuna-7b",
    )
    add_verify_arguments(verify)
    verify.set_defaults(run=verify_converted)


def _add_score(commands) -> None:
    score = commands.add_parser(
        "score",
        help="score an answer file",
        description="Score an answer file as the benchmark's own program does.",
    )
    add_score_arguments(score)
    score.set_defaults(run=score_answers)


def _add_submit(commands) -> None:
    submit = commands.add_parser(
        "submit",
        help="write an answer file in the form that a benchmark's server takes",
        description="Write an answer file in the form that a benchmark's server, or its own evaluator, takes.",
        epilog="example: llava-jax submit --task vizwiz --answers-file answers.jsonl --question-file llava_test.jsonl "
        "--output vizwiz.json",
    )
    add_submit_arguments(submit)
    submit.set_defaults(run=write_submission)


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole path with the small model that the package bundles",
        description="Convert the bundled model, which this package trained on pictures that it draws, load it, ask it "
        "about pictures that it has not seen, and save them with its answers as llava-jax-demo.png.",
        epilog="example: llava-jax demo --score --scenes 500 --seed 0 --no-anyres",
    )
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
    demo.set_defaults(run=_demo)


def _demo(args) -> None:
    if args.scenes is not None and args.scenes < 1:
        raise ValueError(f"--scenes {args.scenes} must be above 0")
    if args.train:
        if args.output is None:
            raise ValueError("--train needs --output: a new directory, or that of a killed run to go on with")
        from llava_jax.demo.train import train_demo

        print(f"wrote {train_demo(args.output)}")
    elif args.score:
        from llava_jax.demo.score import run

        run(args.model, args.output, args.scenes or 500, args.seed, not args.no_anyres, args.json)
    else:
        from llava_jax.demo.show import run

        run(args.model, args.output, args.scenes or 6, args.seed)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; an error of the user's is one line on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="llava-jax", description="LLaVA-1.6 in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_ask,
        _add_convert,
        _add_export,
        _add_train,
        _add_verify,
        _add_evaluate,
        _add_score,
        _add_submit,
        _add_ahead,
        _add_demo,
    ):
        add(commands)
    args = parser.parse_args(argv)
    try:
        check_paths(vars(args).values())
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"llava-jax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print(interruption, file=sys.stderr)
        return 130
