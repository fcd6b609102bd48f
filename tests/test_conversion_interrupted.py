"""Conversions killed, interrupted, two at once, in batches, and by the command."""

import os
import signal
import subprocess
import sys
import time

import pytest
from flax.traverse_util import flatten_dict
from make_7b import ROOT
from orbax.checkpoint import v1 as ocp
from published import check_values

from llava_jax import checkpoint
from llava_jax.cli import script
from llava_jax.conversion.from_hf import convert

# ---- interrupted

# Converts, saying "half" when some tensors are written, and then waits to be killed (or for its input to end).
STOP_HALFWAY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
from orbax.checkpoint import v1 as ocp
from llava_jax import checkpoint
from llava_jax.cli import script
checkpoint.BATCH_BYTES = 2000
save, written = ocp.partial.save, []
def halfway(path, tree):
    written.append(path)
    if len(written) == 4:
        print("half", flush=True)
        sys.stdin.read()
    return save(path, tree)
ocp.partial.save = halfway
script("from_hf.py", "convert", sys.argv[1:])
"""


def start_and_stop_halfway(tiny, output):
    command = [sys.executable, "-c", STOP_HALFWAY, str(tiny.path), "--output", str(output)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    while (line := process.stdout.readline()) != "half\n":
        assert line or process.poll() is None, process.stderr.read()
    return process


def test_killed_and_run_again(tiny, tmp_path):
    output = tmp_path / "out"
    process = start_and_stop_halfway(tiny, output)
    with pytest.raises(FileExistsError, match="another conversion is writing it"):
        convert(tiny.path, output, progress=False)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    left = list(tmp_path.glob(".*"))
    assert len(left) == 1 and not (left[0] / "llava_jax.json").exists() and not (left[0] / "params").exists()
    (left[0] / "stale").write_text("x")
    assert check_values(convert(tiny.path, output, progress=False), tiny.tensors) == set(tiny.tensors)
    assert not (output / "stale").exists() and not list(tmp_path.glob(".*"))


def test_two_at_once(tiny, tmp_path):
    output = tmp_path / "out"
    process = start_and_stop_halfway(tiny, output)
    with pytest.raises(FileExistsError, match="another conversion is writing it"):
        convert(tiny.path, output, progress=False)
    _, errors = process.communicate("")
    assert process.returncode == 0, errors
    assert check_values(output, tiny.tensors) == set(tiny.tensors)


def test_interrupted_by_ctrl_c_leaves_nothing(tiny, tmp_path):
    process = start_and_stop_halfway(tiny, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while list(tmp_path.glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_streams_in_batches(tiny, tmp_path, monkeypatch):
    """No more tensors are held than a batch has room for, however many there are."""
    written = []
    save = ocp.partial.save
    monkeypatch.setattr(checkpoint, "BATCH_BYTES", 4000)
    monkeypatch.setattr(ocp.partial, "save", lambda path, tree: (written.append(tree), save(path, tree)))
    output = convert(tiny.path, tmp_path / "out", progress=False)
    sizes = [[leaf.nbytes for leaf in flatten_dict(tree).values()] for tree in written]
    assert len(sizes) > 3 and all(sum(batch) < 4000 + max(batch) for batch in sizes)
    assert check_values(output, tiny.tensors) == set(tiny.tensors)


# ---- the command


def test_hub_cache_offline(tiny, tmp_path):
    """A hub id out of huggingface_hub's cache, at a revision, through the script; and one that is not there."""
    repo = tmp_path / "hub" / "models--somebody--llava-v1.6-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    (repo / "snapshots").mkdir()
    tiny.path.rename(repo / "snapshots" / commit)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "JAX_PLATFORMS": "cpu"}

    def run(*args):
        command = [sys.executable, str(ROOT / "convert" / "from_hf.py"), *args]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    done = run("somebody/llava-v1.6-tiny", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert "bytes" in done.stderr or "B/s" in done.stderr  # the bar
    assert check_values(tmp_path / "llava-v1.6-tiny", tiny.tensors) == set(tiny.tensors)
    failed = run("somebody/else")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: somebody/else: no such directory here, not in the hub's local cache")
    assert "Traceback" not in failed.stderr


def test_default_output_is_the_name(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert convert(tiny.path, progress=False) == tmp_path / "here" / "llava-v1.6-tiny"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="--output"):  # the source itself
        convert("llava-v1.6-tiny", progress=False)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        script("from_hf.py", "convert", ["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--output", "--revision", "--dtype", "--vision-tower", "--model-base"))
