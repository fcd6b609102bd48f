"""Evaluation by several processes, over several devices, and killed: the answer file of one process left alone."""

import os
import socket
import subprocess
import sys
import time

import pytest
import scenes

from llava_jax import hosts

PROCESS = """
import json, sys
import jax
from llava_jax import hosts
from llava_jax.cli import main
if __name__ == "__main__":
    address, processes, number, flags = map(json.loads, sys.argv[1:])
    if processes > 1:
        jax.distributed.initialize(address, processes, number)
    hosts.SILENCE = 8
    sys.exit(main(flags))
"""

KILLED = """
import os, random, signal, sys, time
from llava_jax.cli import main
import llava_jax.evaluation.run  # JAX is imported once; each child makes its own backend

answers, *flags = sys.argv[1:]
rng, kills, longest = random.Random(0), 0, float("inf")
while True:
    began, child = time.monotonic(), os.fork()
    if child == 0:
        os._exit(main(flags))
    deadline = began + rng.uniform(0.2, min(longest, 20))
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and (kills == 20 or time.monotonic() < deadline):
        time.sleep(0.002)
    if ended != (0, 0):
        assert ended[1] == 0, ended
        longest = time.monotonic() - began
        with open(answers, "rb") as file:
            finished = file.read()
        print(kills, "kills,", len(finished), "bytes", flush=True)
        assert finished == open(answers + ".wanted", "rb").read()
        if kills == 20:
            break
        os.remove(answers)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
"""


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """(flags, questions, the answer file of one process left alone, the environment: compiled programs are kept)"""
    folder = tmp_path_factory.mktemp("benchmark")
    flags, questions = scenes.write(folder, 8)
    env = {**os.environ, "LLAVA_JAX_CACHE_DIR": str(folder / "compiled"), "JAX_PLATFORMS": "cpu"}
    (folder / "process.py").write_text(PROCESS)
    answers = folder / "answers.jsonl"
    (process,) = start(folder, env, scenes.command(flags, answers_file=answers))
    assert process.wait(timeout=300) == 0, process.stderr.read()
    return flags, questions, answers, env


def start(folder, env, command, processes=1, devices=1):
    """The command in so many processes, each with so many simulated devices."""
    import json

    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    env = env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    told = [json.dumps(value) for value in (address, processes)]
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "process.py"), *told, str(number), json.dumps(command)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


@pytest.mark.parametrize(
    "processes, devices, mesh", [(2, 1, None), (4, 2, None), (1, 8, "data=2,tensor=4"), (1, 8, "tensor=8")]
)
def test_several_answer_as_one_does(benchmark, tmp_path, processes, devices, mesh):
    flags, _, answers, env = benchmark
    flags = flags | ({} if mesh is None else {"--mesh": mesh})
    command = scenes.command(flags, answers_file=tmp_path / "answers.jsonl")
    started = start(answers.parent, env, command, processes, devices)
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors
    assert (tmp_path / "answers.jsonl").read_bytes() == answers.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert all("questions on" in error for error in errors)  # each had its share


def test_killed_twenty_times_it_gives_the_same_file(benchmark, tmp_path):
    flags, _, answers, env = benchmark
    out = tmp_path / "answers.jsonl"
    (tmp_path / "answers.jsonl.wanted").write_bytes(answers.read_bytes())
    command = [sys.executable, "-c", KILLED, str(out), *scenes.command(flags, answers_file=out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("20 kills"), done.stderr[-3000:]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_several_is_killed_the_others_stop(benchmark, tmp_path, victim):
    flags, _, answers, env = benchmark
    assert hosts.SILENCE + 4 * hosts.BEAT < 60
    command = scenes.command(flags, answers_file=tmp_path / "answers.jsonl")
    started = start(answers.parent, env, command, processes=2)
    part = tmp_path / f"answers.jsonl.part-{victim}"
    while not part.exists() or not part.read_bytes():
        assert started[victim].poll() is None, started[victim].stderr.read()
        time.sleep(0.01)
    started[victim].kill()
    _, error = started[1 - victim].communicate(timeout=60)
    assert started[1 - victim].returncode not in (0, None)
    ended = "process 1 has ended (nothing was heard of it for 8 seconds)", "process 1 was stopped"
    assert ended[victim == 0] in error and "start it again, everywhere, to go on" in error
    started[victim].communicate()
    started = start(answers.parent, env, command, processes=2)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert (tmp_path / "answers.jsonl").read_bytes() == answers.read_bytes()


def test_an_error_of_one_stops_the_others(benchmark, tmp_path):
    flags, questions, answers, env = benchmark
    entries = [questions[0], questions[8] | {"image": "missing.png"}]
    scenes.write_lines(tmp_path / "questions.jsonl", entries)
    flags = flags | {"--question-file": tmp_path / "questions.jsonl", "--strict": True}
    command = scenes.command(flags, answers_file=tmp_path / "answers.jsonl")
    first, second = start(answers.parent, env, command, processes=2)
    _, error = second.communicate(timeout=60)
    assert second.returncode == 1 and "llava-jax: error: question" in error and "missing.png': no such file" in error
    _, error = first.communicate(timeout=60)
    assert first.returncode == 1 and "process 1 has ended (question" in error and "to go on" in error
