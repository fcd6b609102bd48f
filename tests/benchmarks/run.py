"""Our speed and memory against transformers', with the same random weights: one table.

    python tests/benchmarks/run.py                        # everything but the 1B decoder, about an hour on 2 cores
    python tests/benchmarks/run.py ttft decode            # some of ttft decode pope vqa mixed host memory
    python tests/benchmarks/run.py ttft decode --model 1b # a decoder of 1.1B parameters; 24 GiB of memory
    python tests/benchmarks/run.py ttft decode pope --before ../older  # another checkout instead of transformers

Both sides compute in float32 on two threads. They take turns, so that a busy machine is as busy for both: a ratio is
the median over the turns, with the smallest and largest in brackets. What compiles is called once before, and the
time of that first call stands in the table's notes. Of twice as many turns as asked for, the ones count in which
other processes took the least of the machine; how much that was is in the notes too. `mixed`, whose turns take
minutes, has none to spare. Linux.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import checkpoint
import numpy as np
from PIL import Image
from sides import Before, Ours, Process, Theirs

BENCHMARKS = ("ttft", "decode", "pope", "vqa", "mixed", "host", "memory")
QUESTION = "What is in this picture?"
FIVE_TILES = (672, 672)  # 2,928 positions
CONTEXT_2400 = (640, 480)  # 2,340 positions, and about 60 of text
PHOTOS = [(640, 480), (480, 640), (640, 480), (500, 375), (640, 480), (640, 480), (480, 640), (500, 375)]
THINGS = [
    "person",
    "bicycle",
    "car",
    "dog",
    "chair",
    "bottle",
    "knife",
    "bench",
    "clock",
    "spoon",
    "boat",
    "kite",
    "horse",
    "train",
    "vase",
    "sink",
    "oven",
    "bear",
]
POPE = [f"Is there a {thing} in the image? Answer the question using a single word or phrase." for thing in THINGS]
VQA = [
    f"{question}\nAnswer the question using a single word or phrase."
    for question in (
        "What color is the wall?",
        "How many people are there?",
        "Is it raining?",
        "What is the man holding?",
        "Where is the dog?",
    )
]
TALK = [f"Tell me something about a {thing}." for thing in THINGS]
LIMITS = (4, 8, 16, 32, 64, 128, 256)  # new tokens


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Blurred squares of random colours, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(coarse).resize(size)


def middle(values, digits: int = 2) -> str:
    """median [smallest, largest]"""
    numbers = (statistics.median(values), min(values), max(values))
    return "{} [{}, {}]".format(*(f"{x:.{digits}f}" for x in numbers))


class Table:
    """Rows of: what, ours, theirs, ratio, target, whether it is met, notes."""

    def __init__(self, targets: bool = True):
        self.targets = targets  # they are of ours against transformers
        self.rows = [("benchmark", "ours", "theirs", "ratio", "target", "", "notes")]

    def add(self, what: str, ours: str, theirs: str, ratios, target: str, met: bool | None, notes: str = "") -> None:
        ratio = middle(ratios) if ratios else ""
        target, met = (target, met) if self.targets else ("", None)
        self.rows.append((what, ours, theirs, ratio, target, {None: "", True: "met", False: "MISSED"}[met], notes))
        print("  ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in self.rows]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def check_agreement(ours: Process, theirs: Process) -> None:
    """Both sides give the same 16 tokens, or nothing is timed."""
    for size in (FIVE_TILES, CONTEXT_2400):
        one, other = (side.call("answer", picture(size, 1), QUESTION, 16) for side in (ours, theirs))
        if one != other:
            sys.exit(f"the sides disagree on {size}: ours {one!r}, theirs {other!r}")


def take_turns(
    turns: int, ours: Process, theirs: Process, mine, other, spare: int | None = None
) -> tuple[list, list, list, str]:
    """`mine(ours)` and `other(theirs)`, numbers, by turns: the quietest of turns + spare (None: of twice as many).

    Returns:
        (ours, theirs, their ratios, a note on how busy the machine was otherwise)
    """
    seen = []
    for turn in range(turns + (turns if spare is None else spare)):
        one, busy = mine(ours, turn), ours.others
        two, busy = other(theirs, turn), max(busy, theirs.others)
        seen.append((busy, one, two))
    kept = sorted(seen)[:turns]
    _, one, two = zip(*kept, strict=True)
    return one, two, [a / b for a, b in zip(one, two, strict=True)], f"others took up to {100 * kept[-1][0]:.0f} %"


def ttft(table: Table, ours: Process, theirs: Process, turns: int) -> None:
    call = "answer", picture(FIVE_TILES, 2), QUESTION, 1
    first, _ = ours.time(*call), theirs.time(*call)

    def took(side: Process, _) -> float:
        return side.time(*call)

    mine, other, ratios, busy = take_turns(turns, ours, theirs, took, took)
    met, notes = statistics.median(ratios) <= 0.8, f"first call {first:.1f} s; {busy}"
    table.add("ttft, 5 tiles, s", middle(mine), middle(other), ratios, "<= 0.8 (aim 0.7)", met, notes)


def decode(table: Table, ours: Process, theirs: Process, turns: int) -> None:
    image, new = picture(CONTEXT_2400, 3), 128
    first = [ours.time("answer", image, QUESTION, n) for n in (1, new + 1)]

    def speed(side: Process, _) -> float:
        prefill = side.time("answer", image, QUESTION, 1)
        return new / (side.time("answer", image, QUESTION, new + 1) - prefill)

    mine, other, ratios, busy = take_turns(turns, ours, theirs, speed, speed)
    met, notes = statistics.median(ratios) >= 1.0, f"first calls {first[0]:.1f} and {first[1]:.1f} s; {busy}"
    table.add("decode at 2,400, tokens/s", middle(mine, 1), middle(other, 1), ratios, ">= 1.0 (aim 1.3)", met, notes)


def shared(table: Table, ours: Process, theirs: Process, turns: int, name: str, questions, new: int, target) -> None:
    """Questions a second, all pictures in one call of ours; transformers is timed on one of the pictures at a time."""
    asked = [(picture(size, seed), questions) for seed, size in enumerate(PHOTOS)]
    first = ours.time("answer_all", asked, new)
    sizes = theirs.call("fastest_rows", asked[0][0], questions, new)

    def mine(side: Process, _) -> float:
        return len(asked) * len(questions) / side.time("answer_all", asked, new)

    def other(side: Process, turn: int) -> float:
        if not table.targets:
            return mine(side, turn)
        return len(questions) / side.time("answer_all", [asked[turn % len(asked)]], new)

    speed, their_speed, ratios, busy = take_turns(turns, ours, theirs, mine, other)
    least, aim = target
    tried = ", ".join(f"{rows}: {took:.2f}" for rows, took in sizes.items())
    notes = f"first call {first:.1f} s; theirs on one picture a turn, s a question by batch size {tried}; {busy}"
    met, target = statistics.median(ratios) >= least, f">= {least}" + (f" (aim {aim})" if aim else "")
    table.add(f"{name}, questions/s", middle(speed), middle(their_speed, 3), ratios, target, met, notes)


def pope(table: Table, ours: Process, theirs: Process, turns: int) -> None:
    shared(table, ours, theirs, turns, "pope, 18 x 8 images", POPE, 3, (15, 20))


def bare(table: Table, ours: Process, turns: int) -> None:
    asked = [(picture(size, seed), POPE) for seed, size in enumerate(PHOTOS)]

    def whole(side: Process, _) -> float:
        return side.time("answer_all", asked, 3)

    def programs_alone(side: Process, _) -> float:
        return side.call("programs_alone", asked, 3)

    mine, least, ratios, busy = take_turns(turns, ours, ours, whole, programs_alone)
    met = statistics.median(ratios) <= 1.3
    notes = f"`theirs`: ours' bare cost, one prefill an image and the questions' own tokens, nothing padded; {busy}"
    table.add("pope over its bare cost, s", middle(mine), middle(least), ratios, "<= 1.3", met, notes)


def vqa(table: Table, ours: Process, theirs: Process, turns: int) -> None:
    shared(table, ours, theirs, turns, "vqa, 5 x 8 images", VQA, 8, (4, None))


def mixed_prompts() -> tuple[list, list[int]]:
    """64 prompts, and how long each answer is: 8 pictures with one question, 4 with six, and 32 of text alone.

    Among any 8 that stood in one wave, before batches were continuous, is an answer of the longest.
    """
    shown = [(picture(size, seed), [POPE[seed]]) for seed, size in enumerate(PHOTOS)]
    shared = [(picture(size, 10 + seed), POPE[seed : seed + 6]) for seed, size in enumerate(PHOTOS[:4])]
    text = [(None, [f"{question} {n}"]) for n in range(2) for question in TALK[:16]]
    asked = shown + shared + text
    count = sum(len(questions) for _, questions in asked)
    return asked, np.random.default_rng(1).choice(LIMITS, count).tolist()


def mixed(table: Table, ours: Process, theirs: Process, turns: int) -> None:
    asked, limits = mixed_prompts()
    first, their_first = (side.time("compile_mixed", asked, limits) for side in (ours, theirs))

    def speed(side: Process, _) -> float:
        return sum(limits) / side.time("answer_mixed", asked, limits)

    mine, other, ratios, busy = take_turns(turns, ours, theirs, speed, speed, spare=0)
    notes = f"compiled, and answers of one token, in {first:.1f} and {their_first:.1f} s; {busy}"
    met = statistics.median(ratios) >= 2
    table.add("mixed, 64 prompts, tokens/s", middle(mine, 1), middle(other, 1), ratios, ">= 2 times before", met, notes)


def host(table: Table, ours: Process, count: int) -> None:
    rng = np.random.default_rng(0)
    pictures = [picture(tuple(map(int, rng.integers(200, 1200, 2))), seed) for seed in range(count)]
    whole, inside = ours.call("host_share", pictures, 3)
    share = 100 * (whole - inside) / whole
    notes = f"{whole:.1f} s in all, {inside:.1f} s inside compiled programs"
    table.add(f"host, {count} images", f"{share:.1f} %", "", [], "< 10 %", share < 10, notes)


def memory(table: Table, side_arguments, rows: int | None) -> None:
    """The peaks of fresh processes that do `pope`: ours on all pictures, theirs on one at its fastest batch size."""
    asked = [(picture(size, seed), POPE) for seed, size in enumerate(PHOTOS)]
    peaks, (ours, theirs) = [], side_arguments
    with Process(*ours) as side:
        before = side.peak_memory()
        side.call("answer_all", asked, 3)
        peaks.append((before / 2**30, side.peak_memory() / 2**30))
    with Process(*theirs) as side:
        before = side.peak_memory()
        side.call("keep_rows", rows)
        side.call("answer_all", asked[:1], 3)
        peaks.append((before / 2**30, side.peak_memory() / 2**30))
    (loaded, mine), (their_loaded, other) = peaks
    notes = f"loaded {loaded:.2f} and {their_loaded:.2f}; theirs {rows} questions at a time"
    table.add("memory of pope, GiB", f"{mine:.2f}", f"{other:.2f}", [mine / other], "", None, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", help=f"some of {' '.join(BENCHMARKS)} (all)")
    parser.add_argument("--model", choices=checkpoint.DECODERS, default="scale", help="which decoder (scale)")
    parser.add_argument("--before", type=Path, help="time another checkout instead of transformers (not host, memory)")
    parser.add_argument("--turns", type=int, default=5, help="how often each side is timed (5)")
    parser.add_argument("--images", type=int, default=200, help="how many pictures `host` takes (200)")
    parser.add_argument("--rows", type=int, default=4, help="theirs in `memory`: questions at a time (4)")
    parser.add_argument("--directory", type=Path, help="where the checkpoints stand, or are to be written (temporary)")
    args = parser.parse_args()
    asked_for = args.benchmarks or BENCHMARKS
    if unknown := set(asked_for) - set(BENCHMARKS):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(BENCHMARKS)}")
    if args.before and not (args.before / "llava_jax" / "__init__.py").is_file():
        parser.error(f"--before {args.before}: no checkout of llava_jax")
    with tempfile.TemporaryDirectory() as temporary:
        print(run(args, asked_for, args.directory or Path(temporary)))


def run(args, asked_for, directory: Path) -> Table:
    their_directory, our_directory = checkpoint.write(directory, args.model)
    table = Table(targets=not args.before)
    with Process(Ours, our_directory) as ours:
        template = ours.call("template")
        them = (Before, args.before, our_directory) if args.before else (Theirs, their_directory, template)
        with Process(*them) as theirs:
            check_agreement(ours, theirs)
            for name in ("ttft", "decode", "pope", "vqa", "mixed"):
                if name in asked_for:
                    globals()[name](table, ours, theirs, args.turns)
        if "pope" in asked_for and not args.before:
            bare(table, ours, args.turns)
        if "host" in asked_for and not args.before:
            host(table, ours, args.images)
    if "memory" in asked_for and not args.before:
        memory(table, ((Ours, our_directory), (Theirs, their_directory, template)), args.rows)
    return table


if __name__ == "__main__":
    main()
