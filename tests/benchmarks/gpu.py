"""What one GPU makes of inference: its own tests, then each program at the size of a 7B, as shares of the card's peaks.

    python tests/benchmarks/gpu.py --output gpu.json      # under ten minutes; stops by itself before they are over
    JAX_PLATFORMS=cpu python tests/benchmarks/gpu.py --tiny    # anywhere: whether all of it runs

Weights and caches are random and made on the device, so that no checkpoint is needed: prefixes of 3,072 positions, and
questions of 64, which are admitted to one prefix. A program is called once, which compiles it, and then five times; its
time is the median. A step of decoding is what more steps take longer. `XLA` is attention over the cache without the
kernel. `pope` is all of it together: pictures with 18 questions each, answered in two tokens, as evaluation has them;
they are processed beforehand.

The shares are of what cannot be avoided (`llava_jax.capacity.roofline`) in that time: bytes of the bandwidth and
operations of the peak in half precision. Each row is printed, and written, as it comes; what there is no time for is
named at the end.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cuda")

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.capacity.roofline import GPUS, Precision, works
from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.batch_shape import BatchShape, one_pool
from llava_jax.inference.batching import LoadedGroup, generate, plan
from llava_jax.inference.engine import Engine
from llava_jax.inference.requests import RowOptions
from llava_jax.inference.rows import row_settings
from llava_jax.inputs.batch import merged_length
from llava_jax.inputs.groups import Group
from llava_jax.inputs.image import process_image
from llava_jax.inputs.types import Questions
from llava_jax.models.llava_llama import param_shapes
from llava_jax.models.quantize import SCALE, is_quantized, to_int8
from llava_jax.parallel.target import half_precision

REPOSITORY = Path(__file__).parents[2]
PREFIX, QUESTION, SLOTS = 3072, 64, 128
FEW_STEPS, MANY_STEPS = 9, 41
CALLS = 5
WAVES = (8, 16), (1, 1), (8, 1)  # prefixes, rows of each
POPE = 24, 18  # pictures, questions on each
TESTS_SHARE = 0.4  # of the time, at most


def run_tests(tiny: bool, seconds: float) -> str:
    """The last line of `pytest -m accelerator`, in a process of its own, before this one takes the card's memory."""
    tests = REPOSITORY / "tests"
    modules = [path for path in sorted(tests.glob("test_*.py")) if "mark.accelerator" in path.read_text()]
    options = ["--tb=line", *(["--collect-only"] if tiny else [])]  # others may need what is not installed here
    command = [sys.executable, "-m", "pytest", "-m", "accelerator", *options, *map(str, modules)]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E ", "/"))]
    last = (done.stdout or done.stderr).strip().splitlines()[-1:]
    return "\n".join([*failed, *last])


class Case(NamedTuple):
    """One row of the table."""

    name: str
    form: str  # how attention over the cache is computed: "kernel" or "XLA"; "" where there is none
    int8: bool
    wave: tuple[int, int]


def cases() -> list[Case]:
    """What matters most comes first, and one precision after the other, for each is made anew."""
    large, one, some = WAVES

    def both(form: str, int8: bool, wave) -> list[Case]:
        return [Case(name, form, int8, wave) for name in ("question", "decode")]

    out = []
    for int8 in (False, True):
        out += [Case("encode", "", int8, one), Case("prefill", "", int8, one)]
        out += both("kernel", int8, large) + both("kernel", int8, one)
        out += [*both("XLA", int8, large), Case("pope", "kernel", int8, POPE)]
    for int8 in (True, False):
        out += both("kernel", int8, some) + both("XLA", int8, one) + both("XLA", int8, some)
    return out


def pope(config, pictures: int, questions: int) -> list[LoadedGroup]:
    """Pictures of 640 x 480 with questions of 30 tokens each."""
    rng, asked = np.random.default_rng(0), []
    for n in range(pictures):
        image = process_image(rng.integers(0, 256, (480, 640, 3), np.uint8), config)
        prefix = np.array([1, IMAGE_TOKEN_INDEX, 2, 3])
        suffixes = tuple(rng.integers(0, config.text.vocab_size, (questions, 30)))
        length = merged_length(prefix, [image.size], config)
        asked.append(LoadedGroup(Group(prefix, suffixes, tuple(range(questions)), n, length), [image]))
    return asked


class Bench:
    """A model of random weights in one precision, and its programs."""

    def __init__(self, config, int8: bool):
        self.config, self.int8, self.dtype = config, int8, half_precision(jax.devices()[0])
        self.params = random_params(config, self.dtype, int8)
        self.engines = {form: Engine(config, int8_prefix=int8) for form in ("", "kernel", "XLA")}

    def call(self, case: Case) -> Callable[[], float]:
        """What runs the case once, and returns its seconds."""
        if case.name == "pope":
            return partial(self.answer, self.engines[case.form], pope(self.config, *case.wave))
        programs, shape = self.engines[case.form].batch, batch(case.wave)
        embeds = jnp.zeros((1, PREFIX, self.config.text.hidden_size), self.dtype)
        if case.name == "encode":
            size, tiles = self.config.tile_size, self.config.max_tiles_per_image
            pixels = random_array((tiles, size, size, 3), jnp.uint8)
            rows = jnp.arange(PREFIX)[None] % (tiles * self.config.tokens_per_tile)
            kept = [embeds]
            return lambda: self.replacing(kept, lambda embeds: programs.place_image(self.params, embeds, pixels, rows))
        pool, first = self.pool(case.wave[0]), jnp.zeros(1, jnp.int32)
        if case.name == "prefill":
            return lambda: self.replacing(
                pool, lambda pool: programs.prefill_first(PREFIX, self.params, pool, embeds, first, first + PREFIX)
            )
        rows = [self.full_rows(programs, shape)]
        if case.name == "question":
            questions = self.questions(shape)
            return lambda: self.replacing(rows, lambda rows: self.admit(programs, pool[0], rows, questions))
        return lambda: self.step_seconds(programs, pool[0], rows, shape)

    @staticmethod
    def replacing(kept: list, run) -> float:
        """Seconds of a program that uses up what is kept, and gives it anew."""
        began = time.perf_counter()
        kept.append(jax.block_until_ready(run(kept.pop())))
        return time.perf_counter() - began

    def questions(self, shape: BatchShape) -> tuple:
        """What `admit` is told of a question for every row of the first prefix."""
        count, first = shape.admitted, jnp.zeros(1, jnp.int32)
        ids = jnp.broadcast_to(jnp.arange(QUESTION) % self.config.text.vocab_size, (1, count, QUESTION))
        questions = Questions(ids, jnp.full((1, count), QUESTION, jnp.int32), jnp.ones((1, count), bool))
        settings = jax.tree.map(lambda x: jnp.full((1, count, *x.shape), x), row_settings(RowOptions(SLOTS), SLOTS))
        nothing, said = jnp.zeros((1, count), jnp.int32), jnp.full((1, count, shape.max_model_len), -1, jnp.int32)
        row_ids = jnp.arange(count)[None]
        return jax.block_until_ready((first, row_ids, questions, settings, nothing, said))

    def admit(self, programs, pool, rows, questions: tuple):
        lengths = jnp.full(1, PREFIX, jnp.int32)
        return programs.admit(self.params, pool, lengths, rows, *questions)[0]

    def full_rows(self, programs, shape: BatchShape):
        """Rows that go on for ever, each after a whole prefix."""
        ((row_class,),) = [pool.classes for pool in shape.pools]
        rows = programs.empty_rows(shape.groups, *row_class, self.dtype)
        limits = dataclasses.replace(rows.settings, limit=jnp.full_like(rows.settings.limit, 1 << 30))
        suffix = dataclasses.replace(rows.suffix, valid=jnp.ones_like(rows.suffix.valid))
        position = jnp.full_like(rows.position, PREFIX)
        done = jnp.zeros_like(rows.done)
        return dataclasses.replace(rows, suffix=suffix, settings=limits, position=position, done=done)

    def step_seconds(self, programs, pool, kept: list, shape: BatchShape) -> float:
        """What a step more takes."""
        lengths = jnp.full(shape.groups, PREFIX, jnp.int32)

        def decode(steps: int) -> float:
            active = jnp.ones(kept[0].done.shape, bool)

            def run(rows):
                count = jnp.int32(steps)
                return programs.decode(
                    MANY_STEPS, self.params, [pool], [lengths], [[rows]], [active], count, jnp.int32(1 << 30)
                )[0][0]

            return self.replacing(kept, run)

        return (decode(MANY_STEPS) - decode(FEW_STEPS)) / (MANY_STEPS - FEW_STEPS)

    def answer(self, engine: Engine, asked: list[LoadedGroup]) -> float:
        """Seconds of answers of two tokens."""
        began = time.perf_counter()
        for phase in plan(engine, self.params, [group for group, _ in asked], 2):
            for _ in generate(engine, self.params, phase, asked, lambda question: RowOptions(2)):
                pass
        return time.perf_counter() - began

    def pool(self, groups: int) -> list:
        """[the pool of full prefixes of random keys and values]"""
        text = self.config.text
        shape = groups, text.num_key_value_heads, PREFIX, text.head_dim

        def one(seed: int):
            array = random_array(shape, self.dtype, seed=seed)
            return to_int8(array, -1) if self.int8 else array

        return [jax.block_until_ready([(one(2 * i), one(2 * i + 1)) for i in range(text.num_hidden_layers)])]


def batch(wave: tuple[int, int]) -> BatchShape:
    """So many prefixes, with so many rows each."""
    return one_pool(1, wave[0], PREFIX, wave[1], QUESTION, SLOTS)


def random_array(shape: tuple[int, ...], dtype, scale: float = 1.0, seed: int = 0):
    if dtype == jnp.uint8:
        return jax.random.bits(jax.random.key(seed), shape, dtype)
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(scale, dtype)


def random_params(config, dtype, int8: bool) -> dict:
    """Normal weights about as large as trained ones, made on the device one after another."""
    params: dict[str, Any] = {}
    for seed, (path, leaf) in enumerate(flatten_dict(param_shapes(config), sep="/").items()):
        if path.endswith(("scale", "bias")):
            params[path] = jnp.full(leaf.shape, path.endswith("scale"), dtype)
            continue
        params[path] = random_array(leaf.shape, dtype, leaf.shape[0] ** -0.5, seed)
        if int8 and is_quantized(path):
            params[path], params[f"{path.removesuffix('kernel')}{SCALE}"] = to_int8(params[path], 0)
    return unflatten_dict(params, sep="/")


def work_of(config, case: Case):
    """What the case cannot avoid."""
    work = works(config, batch(case.wave), 1, Precision("int8", True) if case.int8 else Precision())
    return work["step" if case.name == "decode" else case.name]


def peaks(kind: str):
    """(bytes a second, operations a second) of a card by its name, or None."""
    return {gpus.card.name: (gpus.card.bandwidth, gpus.flops) for gpus in GPUS.values()}.get(kind)


def measure(bench: Bench, case: Case, kind: str) -> dict:
    xla = mock.patch("llava_jax.models.cache_attention.target_gpu", lambda: None)  # what is traced now has no kernel
    row = case._asdict()
    if case.form == "XLA":
        xla.start()
    try:
        run, began = bench.call(case), time.perf_counter()
        run()
        row["first_seconds"] = time.perf_counter() - began
        row["seconds"] = statistics.median(run() for _ in range(CALLS))
    except RuntimeError as error:  # no room, most likely
        return row | {"error": str(error).splitlines()[0][:200]}
    finally:
        mock.patch.stopall()
    if case.name == "pope":
        return row | {"per_second": case.wave[0] * case.wave[1] / row["seconds"]}
    work, peak = work_of(bench.config, case), peaks(kind)
    if peak:
        row["of_bandwidth"] = work.moved / row["seconds"] / peak[0]
        row["of_flops"] = work.flops / row["seconds"] / peak[1]
    return row


def rows(config, kind: str, deadline: float) -> Iterator[dict]:
    """Until there is no time for one more like the slowest so far; then the cases that are left, without figures."""
    bench, slowest = None, 0.0
    for case in cases():
        began = time.perf_counter()
        if began + slowest > deadline:
            yield case._asdict() | {"error": "no time"}
            continue
        if bench is None or bench.int8 != case.int8:
            bench = None  # both would not fit
            bench = Bench(config, case.int8)
        yield measure(bench, case, kind)
        slowest = max(slowest, time.perf_counter() - began)


def describe(row: dict) -> str:
    cells = [row["name"], "int8" if row["int8"] else "half", row["form"], "{} x {}".format(*row["wave"])]
    if "error" in row:
        return "| " + " | ".join([*cells, row["error"]]) + " |"
    shares = [f"{row[name]:.0%}" if name in row else "" for name in ("of_bandwidth", "of_flops")]
    if "per_second" in row:
        shares = [f"{row['per_second']:.0f} questions/s", ""]
    return "| " + " | ".join([*cells, f"{1e3 * row['seconds']:.2f}", *shares, f"{row['first_seconds']:.0f}"]) + " |"


def model(tiny: bool):
    """A 7B that never ends an answer."""
    config = LlavaConfig.preset("1.6-vicuna-7b")
    config = config.replace(generation=dataclasses.replace(config.generation, eos_token_ids=()))
    if not tiny:
        return config
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return config.replace(
        text=dataclasses.replace(config.text, **text, head_dim=16, vocab_size=128),
        vision=dataclasses.replace(config.vision, **vision),
        mm_hidden_size=32,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file, written anew after each row")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (9.5)")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, and the tests only collected")
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no directory {args.output.parent}")
    looks = [sys.executable, "-c", "import jax; jax.devices()"]  # apart: JAX would take the memory that the tests need
    if subprocess.run(looks, capture_output=True).returncode:
        platforms = os.environ["JAX_PLATFORMS"]
        parser.error(f"JAX finds no device for JAX_PLATFORMS={platforms}; JAX_PLATFORMS=cpu with --tiny runs anywhere")
    began = time.perf_counter()
    tests = run_tests(args.tiny, TESTS_SHARE * 60 * args.minutes)
    print(f"pytest -m accelerator, {time.perf_counter() - began:.0f} s: {tests}", flush=True)

    kind = jax.devices()[0].device_kind
    report: dict[str, Any] = {"device": kind, "jax": jax.__version__, "tests": tests, "rows": []}
    print(f"\n{kind}, jax {jax.__version__}\n\n| | | attention | wave | ms | of bandwidth | of peak | first call, s |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for row in rows(model(args.tiny), kind, began + 60 * args.minutes):
        print(describe(row), flush=True)
        report["rows"].append(row)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
