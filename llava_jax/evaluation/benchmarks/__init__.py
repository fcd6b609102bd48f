"""The benchmarks, by the names that `--task` has for them; to add one: a file here, and its line in this table."""

from __future__ import annotations

from pathlib import PurePath

from llava_jax.evaluation.benchmarks import (
    gqa,
    llava_bench,
    mm_vet,
    mmbench,
    mme,
    pope,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqav2,
)
from llava_jax.evaluation.benchmarks.benchmark import Benchmark
from llava_jax.evaluation.questions import Layout

BENCHMARKS: dict[str, Benchmark] = {
    "pope": pope.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "vqav2": vqav2.BENCHMARK,
    "gqa": gqa.BENCHMARK,
    "vizwiz": vizwiz.BENCHMARK,
    "scienceqa": scienceqa.BENCHMARK,
    "mmbench": mmbench.BENCHMARK,
    "mme": mme.BENCHMARK,
    "seed": seed.BENCHMARK,
    "llava-bench": llava_bench.BENCHMARK,
    "mm-vet": mm_vet.BENCHMARK,
}


def layout_for(task: str | None, path) -> Layout:
    """The layout of a question file: the task's, or without a task what the file's ending says.

    Raises:
        ValueError: nobody knows the task, or, without one, the ending.
    """
    if task is not None:
        if task not in BENCHMARKS:
            raise ValueError(f"task={task!r} is not known; use one of {', '.join(BENCHMARKS)}")
        return BENCHMARKS[task].layout
    by_ending = {b.layout.ending: b.layout for b in BENCHMARKS.values() if b.layout.ending}
    ending = PurePath(str(path)).suffix
    if ending not in by_ending:
        raise ValueError(f"{path}: its ending is none of {', '.join(by_ending)}; name the --task that it belongs to")
    return by_ending[ending]
