"""lmms-eval's plugin `llava_jax` against `llava-jax evaluate`, and against lmms-eval's own `llava_hf`: one table.

    pip install --editable ".[lmms-eval]"
    python tests/benchmarks/harness.py            # ten minutes on 2 cores
    python tests/benchmarks/harness.py --turns 1  # five

The work is `pope` of run.py, 18 questions on each of 8 pictures: for lmms-eval a data set that its POPE asks
(tests/harness/tasks/scenes_pope.yaml), for `evaluate` a question file and PNGs. The model is checkpoint.py's `scale`,
and `llava_hf` is given what `llava-jax export` makes of it. All compute in float32 on two threads, in the same
template. What is timed is `generate_until` and `evaluate`, the reading of pictures included. The three take turns, none
of them to spare; otherwise turns, first calls and how busy the machine was are as in run.py.

- `evaluate` loads the model, and `generate_until` when it is called first. Here `llava_jax.load` keeps what it has
  loaded, so that neither is timed while it loads; and the two must give the same answers.
- `llava_hf` takes one question at a time, however many there are, so it is timed on half of one picture's a turn, and
  questions a second are compared. Its answers are not: after `<image>` its tokenizer has no space, which the original
  has. It is the simple model (`--force_simple`), for the chat one wants a checkpoint with a chat template. lmms-eval
  0.7.3 needs two things for it here: `device_map="cpu"`, since transformers 5 refuses the empty one that it has by
  default; and where decord is not installed, which reads videos, two names in its place.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import checkpoint
from run import PHOTOS, POPE, Table, middle, picture
from sides import THREADS, Process

from llava_jax.checkpoint import load_config
from llava_jax.conversion.other_layout import write_processor
from llava_jax.conversion.to_hf import export

TASKS, TASK = Path(__file__).resolve().parents[1] / "harness" / "tasks", "scenes_pope"
TEMPLATE = "vicuna_v1"  # whose words are those of `llava_hf` for a checkpoint without a template
NEW = 3  # tokens of an answer
AT_ONCE = 6  # of a picture's questions stand side by side, as in each of POPE's three parts
ROWS = [
    (number, question)
    for start in range(0, len(POPE), AT_ONCE)
    for number in range(len(PHOTOS))
    for question in POPE[start : start + AT_ONCE]
]  # (picture, question)


def write_questions(folder: Path) -> None:
    """ROWS as the data set `pope`, and as pope.jsonl and images/."""
    import datasets

    images = [picture(size, seed) for seed, size in enumerate(PHOTOS)]
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "images" / f"{number}.png")
    rows = [
        {"question_id": str(n), "image": images[number], "question": question, "answer": "yes"}
        for n, (number, question) in enumerate(ROWS)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(test=table).save_to_disk(str(folder / "pope"))
    lines = [{"question_id": n, "image": f"{number}.png", "text": text} for n, (number, text) in enumerate(ROWS)]
    (folder / "pope.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def requests(model, folder: Path) -> list:
    """The task's requests of a model of lmms-eval, as its evaluator makes them."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with contextlib.chdir(folder):  # the task names its data set by a relative path
        task = get_task_dict([TASK], manager, "simple" if model.is_simple else "chat")[TASK]
    task.set_config("generation_kwargs", {"max_new_tokens": NEW}, update=True)
    task.build_all_requests()
    model.task_dict[TASK] = task.dataset
    return task.instances


class Ours:
    """The plugin and `evaluate`, in one process."""

    def __init__(self, model: Path, folder: Path):
        multiprocessing.current_process().daemon = False  # or `evaluate` could not start its processes
        os.environ["LLAVA_JAX_CACHE_DIR"] = ""  # the first call shows what compiling costs
        from lmms_eval.models import get_model

        import llava_jax

        llava_jax.load = functools.cache(llava_jax.load)
        self.model, self.folder, self.runs = str(model), folder, 0
        self.harness = get_model("llava_jax")(pretrained=self.model, conv_template=TEMPLATE)
        self.requests = requests(self.harness, folder)

    def plugin(self) -> list[str]:
        return self.harness.generate_until(self.requests)

    def evaluate(self) -> list[str]:
        from llava_jax.evaluation.evaluate_options import EvaluateOptions
        from llava_jax.evaluation.run import evaluate

        self.runs += 1
        answers = self.folder / f"answers-{self.runs}.jsonl"  # a file that is there would be gone on with
        options = EvaluateOptions(
            model_path=self.model,
            question_file=str(self.folder / "pope.jsonl"),
            answers_file=str(answers),
            image_folder=str(self.folder / "images"),
            conv_mode=TEMPLATE,
            max_new_tokens=NEW,
        )
        evaluate(options)
        return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


class LlavaHf:
    """lmms-eval's own model of llava-hf's checkpoints."""

    def __init__(self, model: Path, folder: Path):
        import torch
        from lmms_eval.models import get_model

        torch.set_num_threads(THREADS)
        if importlib.util.find_spec("decord") is None:
            sys.modules["decord"] = types.SimpleNamespace(VideoReader=None, cpu=None)
        options = dict(device="cpu", device_map="cpu", dtype="float32", batch_size=1)
        self.harness = get_model("llava_hf", force_simple=True)(pretrained=str(model), **options)
        self.requests = requests(self.harness, folder)

    def answer(self, documents: list[int]) -> list[str]:
        return self.harness.generate_until([self.requests[n] for n in documents])


def first_calls(ours: Process, theirs: Process) -> float:
    """Seconds of the plugin's; the others are made too, and `evaluate`'s answers compared."""
    start = time.perf_counter()
    plugin = ours.call("plugin")
    took = time.perf_counter() - start
    evaluate = ours.call("evaluate")
    if different := [n for n, (one, other) in enumerate(zip(plugin, evaluate, strict=True)) if one != other]:
        n = different[0]
        sys.exit(f"{len(different)} answers are not the same, as of row {n}: {plugin[n]!r}, evaluate's {evaluate[n]!r}")
    theirs.call("answer", on_picture(0)[:1])
    return took


def compare(ours: Process, theirs: Process, turns: int) -> Table:
    first, plugin, evaluate, llava_hf, busy = first_calls(ours, theirs), [], [], [], []
    for turn in range(turns):
        documents = on_picture(turn % len(PHOTOS))[: len(POPE) // 2]
        plugin.append(ours.time("plugin"))
        busy.append(ours.others)
        evaluate.append(ours.time("evaluate"))
        busy.append(ours.others)
        llava_hf.append(len(documents) / theirs.time("answer", documents))
        busy.append(theirs.others)
    table, speed = Table(), [len(ROWS) / took for took in plugin]
    others = f"others took up to {100 * max(busy):.0f} %, evaluate's readers among them"
    ratios = [a / b for a, b in zip(plugin, evaluate, strict=True)]
    notes = f"`theirs`: evaluate, the same answers; first call {first:.1f} s; {others}"
    met, what = statistics.median(ratios) <= 1.2, f"plugin, {len(ROWS)} questions, s"
    table.add(what, middle(plugin), middle(evaluate), ratios, "<= 1.2", met, notes)
    ratios = [a / b for a, b in zip(speed, llava_hf, strict=True)]
    notes = f"`theirs`: llava_hf, {len(documents)} of the questions a turn"
    met = statistics.median(ratios) >= 8
    table.add("plugin, questions/s", middle(speed), middle(llava_hf, 3), ratios, ">= 8", met, notes)
    return table


def on_picture(number: int) -> list[int]:
    """The documents on a picture."""
    return [n for n, (shown, _) in enumerate(ROWS) if shown == number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="how often each side is timed (3)")
    parser.add_argument("--directory", type=Path, help="where the checkpoints stand, or are to be written (temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(run(args.directory or Path(temporary), Path(temporary), args.turns))


def run(directory: Path, folder: Path, turns: int) -> Table:
    """directory: of run.py's checkpoints; folder: of what is made for this run."""
    _, model = checkpoint.write(directory, "scale")
    exported = export(model, folder / "exported", "llava-hf", progress=False)
    write_processor(exported, load_config(model))  # which checkpoint.py's lacks, and so what is exported of it
    write_questions(folder)
    with Process(Ours, model, folder) as ours, Process(LlavaHf, exported, folder) as theirs:
        return compare(ours, theirs, turns)


if __name__ == "__main__":
    main()
