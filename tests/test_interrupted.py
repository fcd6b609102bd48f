"""Ctrl-C where Python cannot run: the command ends with status 130, one line, and no crash."""

import os
import signal
import subprocess
import sys

import pytest

COMPILING = """
import logging, os, signal, sys, threading
import jax, jax.numpy as jnp
from llava_jax import cli

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Watch(logging.Handler):
    def emit(self, record):
        if "slow" in record.getMessage():
            threading.Timer(0.5, interrupt).start()  # by then XLA is at work

def slow(x):
    for i in range(200):
        x = jnp.sin(x @ x) + i
    return x

def run(*args):
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax").addHandler(Watch())
    jax.jit(slow)(jnp.ones((8, 8)))
    print("not interrupted")

from llava_jax.demo import show
show.run = run
sys.argv = ["llava-jax", "demo"]
sys.exit(cli.main())
"""

SLOWLY = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def test_an_interruption_while_xla_compiles(tmp_path):
    """Some 4 seconds. The interpreter's own way out ends in SIGSEGV here."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILING],
        capture_output=True,
        text=True,
        env={**os.environ, "LLAVA_JAX_CACHE_DIR": "", "JAX_PLATFORMS": "cpu"} | SLOWLY,
        cwd=tmp_path,
    )
    assert done.returncode == 130 and "not interrupted" not in done.stdout
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr


COLLECTING = """
import gc, signal, sys, time
from llava_jax import cli
from llava_jax.demo import show

def callback(*_):
    if not sent:
        sent.append(1)
        signal.raise_signal(signal.SIGINT)

def run(*args):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(100)
    print("not interrupted")

sent = []
show.run = run
sys.argv = ["llava-jax", "demo"]
sys.exit(cli.main())
"""


def test_an_interruption_while_garbage_is_collected(tmp_path):
    """JAX has such a callback, and Python drops its exceptions. Some 2 seconds: the sleep is interrupted."""
    done = subprocess.run([sys.executable, "-c", COLLECTING], capture_output=True, text=True, cwd=tmp_path, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_command_that_is_called_returns_its_status(monkeypatch, capsys):
    from llava_jax import cli
    from llava_jax.demo import show

    def run(*_):
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(show, "run", run)
    assert cli.main(["demo"]) == 130 and capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--seed", str(2**31)], ["--scenes", str(2**31)]])
def test_demos_numbers_are_looked_at_before_anything_is_made(flags, tmp_path, monkeypatch, capsys):
    from llava_jax import cli

    monkeypatch.chdir(tmp_path)
    for more in ([], ["--score"], ["--train"]):
        assert cli.main(["demo", *flags, *more, "--output", "out"]) == 1
        assert capsys.readouterr().err.startswith(f"llava-jax: error: {flags[0]} {flags[1]} must be ")
    assert not list(tmp_path.iterdir())


def test_a_demo_that_fails_or_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Some 3 seconds: the bundled model is converted."""
    from llava_jax.demo import show

    def ask(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show, "questions_about", ask)
    with pytest.raises(KeyboardInterrupt):
        show.run(None, "out", 1, 0)
    assert not list(tmp_path.iterdir())
