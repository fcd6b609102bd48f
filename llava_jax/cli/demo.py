"""`llava-jax demo`."""

from __future__ import annotations

import argparse

DESCRIPTION = (
    "Convert the bundled model, which this package trained on pictures that it draws, load it, ask it about "
    "pictures that it has not seen, and save them with its answers as llava-jax-demo.png."
)
EXAMPLE = "--score --scenes 500 --seed 0 --no-anyres"
LARGEST = 2**31 - 1  # of a number that is counted or seeded with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", help="keep the converted checkpoint here (a temporary directory); of --train, the run"
    )
    parser.add_argument("--model", help="a checkpoint that --train made (the bundled one)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--score", action="store_true", help="how many answers are right, kind by kind")
    what.add_argument("--train", action="store_true", help="make the model from nothing, or go on with it (hours)")
    parser.add_argument("--scenes", type=int, help="how many pictures are asked about (6; with --score 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (%(default)s)")
    parser.add_argument("--no-anyres", action="store_true", help="with --score: show it the base tile alone")
    parser.add_argument("--json", action="store_true", help="with --score: as one line of JSON")


def run(args: argparse.Namespace) -> None:
    if args.scenes is not None and not 1 <= args.scenes <= LARGEST:
        raise ValueError(f"--scenes {args.scenes} must be above 0 and at most {LARGEST:,}")
    if not 0 <= args.seed <= LARGEST:
        raise ValueError(f"--seed {args.seed} must be at least 0 and at most {LARGEST:,}")
    if args.train:
        if args.output is None:
            raise ValueError("--train needs --output: a new directory, or that of a killed run to go on with")
        from llava_jax.demo.recipe import train_demo

        print(f"wrote {train_demo(args.output)}")
    elif args.score:
        from llava_jax.demo import held_out

        held_out.run(args.model, args.output, args.scenes or 500, args.seed, not args.no_anyres, args.json)
    else:
        from llava_jax.demo import show

        show.run(args.model, args.output, args.scenes or 6, args.seed)
