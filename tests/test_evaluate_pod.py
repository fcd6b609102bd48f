"""Evaluation by several processes, over several devices, and killed: the answer file of one process left alone."""

import json
import os
import socket
import subprocess
import sys

import pytest
import scenes

from llava_jax.cli import main
from llava_jax.parallel import multihost

PROCESS = """
import json, os, signal, sys
import jax
from llava_jax.parallel import multihost
from llava_jax.cli import main
from llava_jax.evaluation.answers import AnswerShard
if __name__ == "__main__":
    address, processes, number, killed, flags = map(json.loads, sys.argv[1:])
    if processes > 1:
        jax.distributed.initialize(address, processes, number)
    multihost.HEARTBEAT_INTERVAL, multihost.HEARTBEAT_TIMEOUT = 0.5, 6
    if killed:
        append = AnswerShard.append

        def append_and_die(part, lines):
            lines = list(lines)
            append(part, lines)
            if lines:
                os.kill(os.getpid(), signal.SIGKILL)

        AnswerShard.append = append_and_die
    sys.exit(main(flags))
"""

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from llava_jax.cli import main
from llava_jax.evaluation import answers  # JAX is imported once; each child makes its own backend
from llava_jax.inference import batch_shape

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def append(part, lines):
    if text := "".join(lines).encode():
        AnswerShard.calls += 1
        with open(part.path, "ab") as file:
            if (AnswerShard.calls, "within") == kill_at:
                file.write(text[: len(text) // 2])
                file.flush()
                kill()
            file.write(text)
        if (AnswerShard.calls, "after") == kill_at:
            kill()

def write(path, content):
    path.write_bytes(content)
    kill()

batch_shape.MAX_GROUPS = 1  # a picture's answers at a time,
batch_shape.bucket_rows = lambda count: 8  # by one program
AnswerShard, AnswerShard.calls = answers.AnswerShard, 0
out, *flags = sys.argv[1:]
for kill_at in ((1, "within"), (1, "after"), (2, "within"), "merge", None):
    left = sum(path.stat().st_size for path in Path(out).parent.glob("answers.jsonl*part-*"))
    if (child := os.fork()) == 0:
        if kill_at == "merge":
            answers.write_whole = write
        elif kill_at:
            AnswerShard.append = append
        os._exit(main(flags))
    ended = os.waitpid(child, 0)[1]
    assert ended == (0 if kill_at is None else signal.SIGKILL), (kill_at, ended)
    print("left", left, flush=True)
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
def benchmark(tmp_path_factory, scenes_model):
    """(flags, questions, the answer file of one process left alone)"""
    folder = tmp_path_factory.mktemp("benchmark")
    flags, questions = scenes.write(folder, 4, scenes_model)
    (folder / "process.py").write_text(PROCESS)
    answers = folder / "answers.jsonl"
    assert main(scenes.command(flags, answers_file=answers)) == 0
    return flags, questions, answers


def start(folder, command, processes=1, devices=1, killed=None):
    """The command in so many processes, each with so many simulated devices; `killed` dies once it has answers."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    script, started = [sys.executable, str(folder / "process.py")], []
    for number in range(processes):
        told = map(json.dumps, (address, processes, number, number == killed, command))
        started.append(subprocess.Popen([*script, *told], env=env, stderr=subprocess.PIPE, text=True))
    return started


@pytest.mark.long  # every day two do so after a kill, and test_quantize.py has a batch over eight devices
@pytest.mark.parametrize(
    "processes, devices, mesh", [(2, 1, None), (4, 2, None), (1, 8, "data=2,tensor=4"), (1, 8, "tensor=8")]
)
def test_several_answer_as_one_does(benchmark, tmp_path, processes, devices, mesh):
    flags, _, answers = benchmark
    flags = flags | ({} if mesh is None else {"--mesh": mesh})
    command = scenes.command(flags, answers_file=tmp_path / "answers.jsonl")
    started = start(answers.parent, command, processes, devices)
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors
    assert (tmp_path / "answers.jsonl").read_bytes() == answers.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert all("questions on" in error for error in errors)  # each had its share


@pytest.mark.long
def test_killed_where_it_writes_it_gives_the_same_file(benchmark, tmp_path):
    """Within a line, between two pictures, within a later line, and before the parts are deleted."""
    flags, _, answers = benchmark
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, "-c", KILLED_AT, str(out), *scenes.command(flags, answers_file=out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    left = [int(line.removeprefix("left ")) for line in done.stdout.splitlines() if line.startswith("left ")]
    assert 0 == left[0] < left[1] < left[2] < left[3] < left[4]  # each went on where the one before was killed
    assert out.read_bytes() == answers.read_bytes() and [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.long
def test_killed_twenty_times_it_gives_the_same_file(benchmark, tmp_path):
    flags, _, answers = benchmark
    out = tmp_path / "answers.jsonl"
    (tmp_path / "answers.jsonl.wanted").write_bytes(answers.read_bytes())
    command = [sys.executable, "-c", KILLED, str(out), *scenes.command(flags, answers_file=out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("20 kills"), done.stderr[-3000:]


@pytest.mark.long  # it waits for the others' silence; every day one stops them by an error
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_several_is_killed_the_others_stop(benchmark, tmp_path, victim):
    flags, _, answers = benchmark
    assert multihost.HEARTBEAT_TIMEOUT + 4 * multihost.HEARTBEAT_INTERVAL < 60
    command = scenes.command(flags, answers_file=tmp_path / "answers.jsonl")
    started = start(answers.parent, command, processes=2, killed=victim)
    started[victim].wait(timeout=300)
    _, error = started[1 - victim].communicate(timeout=60)
    assert started[1 - victim].returncode not in (0, None)
    if victim == 0:  # process 1 asks it in vain, unless JAX, whose own call waits there, aborts first
        ended = "process 0 has ended (it keeps what the others say, and does not reply)", "process 1 was stopped"
    else:
        ended = ("process 1 has ended (nothing was heard of it for 6 seconds)",)
    assert any(words in error for words in ended) and "start it again, everywhere, to go on" in error
    started[victim].communicate()
    assert (tmp_path / f"answers.jsonl.part-{victim}").read_bytes()
    started = start(answers.parent, command, processes=2)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert (tmp_path / "answers.jsonl").read_bytes() == answers.read_bytes()


def test_an_error_of_one_stops_the_others(benchmark, tmp_path):
    flags, questions, answers = benchmark
    entries = [questions[0], questions[8] | {"image": "missing.png"}]
    scenes.write_lines(tmp_path / "questions.jsonl", entries)
    flags = flags | {"--question-file": tmp_path / "questions.jsonl", "--strict": True}
    command = scenes.command(flags, answers_file=tmp_path / "answers.jsonl")
    first, second = start(answers.parent, command, processes=2)
    _, error = second.communicate(timeout=60)
    assert second.returncode == 1 and "llava-jax: error: question" in error and "missing.png': no such file" in error
    _, error = first.communicate(timeout=60)
    assert first.returncode == 1 and "process 1 has ended (question" in error and "to go on" in error
