"""`llava-jax verify` and `convert/verify.py`."""

from __future__ import annotations

import argparse
import json

from llava_jax.conversion.verify import QUESTION, as_json, table, verify

DESCRIPTION = (
    "Run a converted checkpoint and the published one on the same pictures, and compare them stage by stage. The exit "
    "status is 1 where they differ. It needs PyTorch, and memory for one side at a time in float32: 4 bytes a "
    "parameter and about 3 GiB, so 30 GiB for 7B. --quick needs neither, and only says whether the files are those "
    "that the conversion wrote."
)
EXAMPLE = "llava-v1.6-vicuna-7b --reference liuhaotian/llava-v1.6-vicuna-7b --image photo.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="what convert/from_hf.py wrote")
    parser.add_argument("--reference", help="the published checkpoint: a local directory or a hub id")
    parser.add_argument(
        "--image",
        nargs="*",
        metavar="FILE",
        help="pictures, each asked about alone; with none after it, text alone (default: one that is made here)",
    )
    parser.add_argument(
        "--against",
        choices=("llava-hf", "original"),
        help="transformers' LLaVA or the original's (default: that of the checkpoint's layout, if it can be had)",
    )
    parser.add_argument("--prompt", default=QUESTION, help="the question (%(default)r)")
    parser.add_argument("--python", help="the original's interpreter, in an environment as tests/golden/setup.sh makes")
    parser.add_argument("--vision-tower", help="as it was given to the conversion")
    parser.add_argument("--quick", action="store_true", help="compare checksums with the conversion's record, no more")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Verify as the flags say; the exit status."""
    from llava_jax.conversion.orbax_reader import quiet_orbax

    quiet_orbax()
    if args.quick:
        return _quick(args)
    if args.reference is None:
        raise ValueError("verify: --reference (the published checkpoint) or --quick is needed")
    import jax

    jax.config.update("jax_platforms", "cpu")
    given = args.image, args.against, args.prompt, args.python, args.vision_tower
    against, stages = verify(args.directory, args.reference, *given)
    first = next((stage.stage for stage in stages if not stage.ok), None)
    if args.json:
        told = {"directory": args.directory, "reference": args.reference, "against": against, "ok": first is None}
        print(json.dumps(told | {"first_out_of_bounds": first, "stages": as_json(stages)}))
    else:
        print(table(stages))
        same = f"within bounds: {args.directory} is {args.reference}, as {against} computes it"
        print(same if first is None else f"first stage out of bounds: {first} (against {against})")
    return 0 if first is None else 1


def _quick(args: argparse.Namespace) -> int:
    from llava_jax.conversion.checksums import check

    problems = check(args.directory)
    if args.json:
        print(json.dumps({"directory": args.directory, "ok": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{args.directory}: as the conversion wrote it")
    return 1 if problems else 0
