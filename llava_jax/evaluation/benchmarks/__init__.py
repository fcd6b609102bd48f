"""The benchmarks, by the names that `--task` has for them; to add one: a file here, and its name in this list."""

from __future__ import annotations

from importlib import import_module
from pathlib import PurePath

from llava_jax.evaluation.benchmarks.benchmark import Benchmark
from llava_jax.evaluation.questions import Layout

TASKS = ("pope", "textvqa", "vqav2", "gqa", "vizwiz", "scienceqa", "mmbench", "mme", "seed", "llava-bench", "mm-vet")
BENCHMARKS: dict[str, Benchmark] = {
    task: import_module(f"{__name__}.{task.replace('-', '_')}").BENCHMARK for task in TASKS
}


def layout_for(task: str | None, path) -> Layout:
    """A question file's layout: the task's, or without a task what the file's ending says; ValueError if unknown."""
    if task is not None:
        if task not in BENCHMARKS:
            raise ValueError(f"task={task!r} is not known; use one of {', '.join(BENCHMARKS)}")
        return BENCHMARKS[task].layout
    by_ending = {b.layout.ending: b.layout for b in BENCHMARKS.values() if b.layout.ending}
    ending = PurePath(str(path)).suffix
    if ending not in by_ending:
        raise ValueError(f"{path}: its ending is none of {', '.join(by_ending)}; name the --task that it belongs to")
    return by_ending[ending]
