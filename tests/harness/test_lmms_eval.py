"""lmms-eval's own command line over drawn scenes: the plugin, the server and `llava-jax evaluate` give the same.

These run in lmms-eval's environment: `requirements.txt` says how to make it. They take three minutes on two cores.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="these are for lmms-eval's own environment, see requirements.txt")

import scenes
import scenes_data
from lmms_eval.api.instance import Instance
from PIL import Image
from served import served
from test_notebooks import committed, execute

from llava_jax.cli import main
from llava_jax.evaluation.benchmarks.pope import score_category
from llava_jax.evaluation.lmms_eval import LlavaJax, LlavaJaxSimple

pytestmark = pytest.mark.lmms_eval

HERE = Path(__file__).parent
TEMPLATE = "llava_v1"  # the bundled model's own


@pytest.fixture(scope="session")
def data(made_once):
    """(the folder where lmms-eval runs, {data set: its rows})"""

    def make(folder):
        tables = scenes_data.write(folder, 6)
        return {name: [row | {"image": None} for row in rows] for name, rows in tables.items()}

    return made_once("harness-data", make)


def lmms_eval(folder, out, model, model_args, tasks, *flags):
    """Its command, begun."""
    args = ",".join(f"{name}={value}" for name, value in model_args.items())
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", args, "--tasks", tasks, *flags]
    command += [
        "--include_path",
        str(HERE / "tasks"),
        "--output_path",
        str(out),
        "--log_samples",
        "--verbosity",
        "DEBUG",
    ]
    return command


def run(folder, out, *arguments, **environment):
    """What lmms-eval found: ({task: its scores}, {task: its answers in the order of the documents})."""
    command = lmms_eval(folder, out, *arguments)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return found(out)


def found(out):
    (results,) = out.glob("*/*_results.json")
    scores = json.loads(results.read_text())["results"]
    answers = {}
    for task in scores:
        (samples,) = out.glob(f"*/*_samples_{task}.jsonl")
        lines = sorted(scenes.read_lines(samples), key=lambda line: line["doc_id"])
        answers[task] = [line["filtered_resps"] for line in lines]
    return scores, answers


@pytest.fixture(scope="session")
def plugin(data, scenes_model, tmp_path_factory):
    """What the plugin found on both tasks."""
    out = tmp_path_factory.mktemp("plugin")
    args = {"pretrained": scenes_model, "mesh": "data=1,tensor=1"}  # as it is left of quotes that a shell took away
    return run(data[0], out, "llava_jax", args, "scenes_pope,scenes_choice")


def test_evaluate_gives_the_same_answers_and_scores(data, plugin, scenes_model, tmp_path):
    folder, tables = data
    scores, answers = plugin
    for name in ("pope", "choice"):
        flags = {"--model-path": scenes_model, "--question-file": folder / f"{name}.jsonl", "--max_new_tokens": 16}
        flags |= {"--image-folder": folder / "images", "--answers-file": tmp_path / f"{name}.jsonl"}
        assert main(scenes.command(flags)) == 0
        ours = [line["text"] for line in scenes.read_lines(tmp_path / f"{name}.jsonl")]
        assert ours == answers[f"scenes_{name}"]
        if name == "pope":
            figures = score_category(ours, [row["answer"] for row in tables["pope"]])
            assert scores["scenes_pope"]["pope_accuracy,none"] == pytest.approx(figures["accuracy"] / 100)
            assert scores["scenes_pope"]["pope_f1_score,none"] == pytest.approx(figures["f1"] / 100)
        else:
            right = [row["choices"][row["answer"]] == text for row, text in zip(tables[name], ours, strict=True)]
            assert scores["scenes_choice"]["exact,none"] == pytest.approx(sum(right) / len(right)) and sum(right) > 15


def test_the_server_gives_the_same_answers_and_scores(data, plugin, scenes_model, tmp_path):
    with served(scenes_model) as server:
        args = {"model": server.model, "base_url": f"{server.url}/v1", "api_key": "none", "num_cpus": 8}
        scores, answers = run(data[0], tmp_path, "async_openai", args, "scenes_pope,scenes_choice")
    assert answers == plugin[1]
    for task, figures in scores.items():
        for name in ("pope_accuracy,none", "pope_f1_score,none", "exact,none"):
            assert figures.get(name) == plugin[0][task].get(name)


def test_choices_by_their_likelihood(data, scenes_model, tmp_path):
    """lmms-eval takes the least of the losses."""
    folder, tables = data
    scores, answers = run(
        folder, tmp_path, "llava_jax", {"pretrained": scenes_model}, "scenes_likelihood", "--force_simple"
    )
    losses = [[float(loss) for loss, _ in replies] for replies in answers["scenes_likelihood"]]
    assert all(len(four) == 4 and all(loss > 0 for loss in four) for four in losses)
    right = [four.index(min(four)) == row["answer"] for four, row in zip(losses, tables["choice"], strict=True)]
    assert scores["scenes_likelihood"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert sum(right) > len(right) / 2  # of a quarter by chance


def test_rounds_follow_from_the_answers(data, scenes_model, bundled, load_once, tmp_path):
    """Each round of all documents is asked at once; the same in lmms-eval's other interface."""
    folder, tables = data
    rows = tables["choice"][:6]
    args = {"pretrained": scenes_model, "conv_template": TEMPLATE}
    _, answers = run(folder, tmp_path, "llava_jax", args, "scenes_rounds", "--limit", str(len(rows)))
    rounds = answers["scenes_rounds"]
    llava, params = bundled
    for row, said in zip(rows, rounds, strict=True):
        asked = [row["question"], *(f"Is there a {text} in the image?" for text in said)][: len(said)]
        picture = str(folder / "images" / row["image_source"])
        assert said == llava.generate_batch(params, [(picture, asked)], max_new_tokens=16)
    assert {len(said) for said in rounds} == {2, 3}

    lm = LlavaJaxSimple(str(scenes_model), TEMPLATE)
    pictures = [Image.open(folder / "images" / row["image_source"]) for row in rows]
    lm.task_dict = {"task": {"test": [row | {"image": picture} for row, picture in zip(rows, pictures, strict=True)]}}
    functions = importlib.import_module("tasks.rounds")
    how, told = {"max_new_tokens": 16}, {"task": "task", "repeats": 1}
    requests = [
        Instance(
            "generate_until_multi_round",
            (row["question"], how, functions.doc_to_visual, functions.doc_to_text, number, "task", "test"),
            0,
            told | {"doc_id": number},
        )
        for number, row in enumerate(rows)
    ]
    assert lm.generate_until_multi_round(requests) == rounds


def test_a_killed_command_goes_on(data, plugin, scenes_model, tmp_path):
    folder, cache = data[0], tmp_path / "cache"
    args = {"pretrained": scenes_model, "cache": cache}
    command = lmms_eval(folder, tmp_path / "killed", "llava_jax", args, "scenes_pope,scenes_choice")
    killed = subprocess.Popen(command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in cache.glob("*")) and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = sum(len(scenes.read_lines(path)) for path in cache.glob("*.jsonl"))
    again = run(folder, tmp_path / "again", "llava_jax", args, "scenes_pope,scenes_choice")
    assert kept and again == plugin


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


def side_by_side(folder, out, args, environments):
    """One process for each, all of one run; what they found, if they write it."""
    processes = []
    for number, environment in enumerate(environments):
        command = lmms_eval(folder, out / str(number), "llava_jax", args, "scenes_pope,scenes_choice")
        env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        processes.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors[0][-3000:] + errors[1][-3000:]
    return errors


def test_processes_of_jax_divide_the_pictures(data, plugin, scenes_model, tmp_path):
    """Each then has all answers, and scores them. Slurm's variables tell JAX of the others."""
    one = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    each = [one | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    errors = side_by_side(data[0], tmp_path, {"pretrained": scenes_model, "distributed": "true"}, each)
    assert all("on 3 prefixes" in error for error in errors)  # of 6 pictures
    assert found(tmp_path / "0") == found(tmp_path / "1") == plugin


def test_processes_of_lmms_eval_divide_the_documents(data, plugin, scenes_model, tmp_path):
    """As torchrun and accelerate start them; the first one has the scores."""
    one = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    each = [one | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2)]
    side_by_side(data[0], tmp_path, {"pretrained": scenes_model}, each)
    assert found(tmp_path / "0") == plugin and not (tmp_path / "1").exists()


def test_the_notebook_runs_the_plugin(tmp_path):
    """test_notebooks.py runs it where there is no lmms-eval; here, what the cell needs of it."""
    notebook = committed("batch_evaluation")
    notebook.cells = [cell for cell in notebook.cells if cell.id not in ("sheet", "stopped", "mesh")]
    cell = next(cell for cell in execute(notebook, tmp_path).cells if cell.id == "lmms-eval-pope")
    assert "the same answers: True" in cell.outputs[-1].text


@pytest.mark.parametrize(
    "args, problem",
    [
        ("pretrained={model},max_lenght=3", "llava_jax takes no max_lenght; it knows pretrained, conv_template"),
        ("mesh=data=2", "takes pretrained=DIR, which is missing"),
        ("pretrained={model},mesh=two", "--model_args mesh='two' is not like data=2"),
        ("pretrained={model},mesh=fsdp=2", "--mesh: fsdp is none of data, tensor"),
        ("pretrained={model},dtype=float8", "dtype='float8' must be one of float32, bfloat16, float16"),
        ("pretrained={model},quantize=int4", "quantize='int4' must be int8"),
        ("pretrained=/nowhere", "/nowhere"),
    ],
)
def test_wrong_arguments_are_named_at_once(args, problem, scenes_model):
    with pytest.raises((ValueError, OSError), match=problem):
        LlavaJax.create_from_arg_string(args.format(model=scenes_model), {"batch_size": 1, "device": None})


def test_two_ways_of_dividing_are_one_too_many(scenes_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="distributed=true: WORLD_SIZE=2 says that accelerate or torchrun"):
        LlavaJax(str(scenes_model), distributed=True)


@pytest.mark.parametrize("mesh", ["mesh=data=2,tensor=4", 'mesh="data=2,tensor=4"'])
def test_a_mesh_survives_the_shell(scenes_model, mesh):
    """Which takes the quotes away that would keep it together."""
    with pytest.raises(ValueError, match="mesh data=2,tensor=4: needs 8 devices, and here are 1"):
        LlavaJax.create_from_arg_string(f"pretrained={scenes_model},{mesh}")
