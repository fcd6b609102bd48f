"""The benchmarks of LLaVA's eval folder, one table: how each one's questions are read and asked.

Source: `scripts/v1_5/eval/*.sh` and the programs that they run, which decode greedily with the vicuna_v1 template.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from llava_jax.evaluation.questions import LANGUAGES, LAYOUTS


@dataclass(frozen=True)
class Task:
    """A benchmark as its script runs it.

    Attributes:
        name: what `--task` calls it.
        layout: of its question file, one of `questions.LAYOUTS`.
        max_new_tokens: what its program generates at most.
        single_pred_prompt: its script passes `--single-pred-prompt`.
        langs: what `--lang` may be.
        conv_mode, temperature: what its script passes; without a script the programs take llava_v1 (science:
            llava_v0) and 0.2.
        note: what becomes of the answers.
    """

    name: str
    layout: str
    max_new_tokens: int
    single_pred_prompt: bool = False
    langs: tuple[str, ...] = ("en",)
    conv_mode: str = "vicuna_v1"
    temperature: float = 0.0
    note: str = ""


TASKS = {
    task.name: task
    for task in (
        Task("pope", "loader", 128, note="scored here, with POPE's coco folder"),
        Task("textvqa", "loader", 128, note="scored here, with TextVQA_0.5.1_val.json"),
        Task("vqav2", "loader", 128, note="the server scores test-dev; val is scored here, with its annotations"),
        Task("gqa", "loader", 128, note="scored here or by GQA's eval.py, with testdev_balanced_questions.json"),
        Task("vizwiz", "loader", 128, note="the server scores test; val is scored here, with its annotations"),
        Task("scienceqa", "science", 1024, True, note="scored here, with problems.json and pid_splits.json"),
        Task("mmbench", "mmbench", 1024, True, LANGUAGES, note="the server scores test; dev is scored here"),
        Task("mme", "loader", 128, note="scored here, with MME_Benchmark_release_version"),
        Task("seed", "loader", 128, note="scored here, with SEED-Bench.json"),
        Task("llava-bench", "vqa", 1024, note="judged by GPT-4, which is not done here"),
        Task("mm-vet", "vqa", 1024, note="judged by GPT-4, which is not done here"),
    )
}
# What each program generates at most: its default, or, of all but the loader, a constant.
MAX_NEW_TOKENS = {layout: 128 if layout == "loader" else 1024 for layout in LAYOUTS}
_BY_ENDING = {".jsonl": "loader", ".json": "science", ".tsv": "mmbench"}


def layout_for(task: str | None, path) -> str:
    """The layout of a question file: the task's, or without a task what the file's ending says.

    Raises:
        ValueError: nobody knows the task, or, without one, the ending.
    """
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not known; use one of {', '.join(TASKS)}")
        return TASKS[task].layout
    ending = PurePath(str(path)).suffix
    if ending not in _BY_ENDING:
        raise ValueError(f"{path}: its ending is none of {', '.join(_BY_ENDING)}; name the --task that it belongs to")
    return _BY_ENDING[ending]
