"""Whatever goes wrong in a command is one line and a status; the traceback is there for the asking."""

import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from make_7b import ROOT

from llava_jax import cli, compiling
from llava_jax.cli.failures import exit_status
from llava_jax.constants import ENGINE_THREAD

ENV = {key: value for key, value in os.environ.items() if key != "LLAVA_JAX_TRACEBACK"}


class Panic(BaseException):
    """As a Rust library's own, which derives from no Exception."""


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--x 3 is wrong"), "p: error: --x 3 is wrong"),
        (FileNotFoundError("/a: no such file"), "p: error: /a: no such file"),
        (OverflowError("too large\nfor C"), "p: error: OverflowError: too large for C (LLAVA_JAX_TRACEBACK=1 shows"),
        (RuntimeError("\n\na data worker died\n"), "p: error: RuntimeError: a data worker died (LLAVA_JAX_TRACEBACK=1"),
        (RecursionError(), "p: error: RecursionError (LLAVA_JAX_TRACEBACK=1 shows where)"),
        (ValueError(), "p: error: ValueError (LLAVA_JAX_TRACEBACK=1 shows where)"),
        (Panic("index out of bounds"), "p: error: Panic: index out of bounds (LLAVA_JAX_TRACEBACK=1 shows where)"),
        (MemoryError("Unable to allocate 9"), "p: error: not enough memory (MemoryError: Unable to allocate 9); ask"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory."), "p: error: not enough memory (RuntimeError"),
        (ValueError("a file named '\udcff'"), r"p: error: a file named '\udcff'"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_status_1(error, line, capsys, monkeypatch):
    monkeypatch.delenv("LLAVA_JAX_TRACEBACK", raising=False)
    assert exit_status("p", raising(error)) == 1
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == 1
    monkeypatch.setenv("LLAVA_JAX_TRACEBACK", "1")
    assert exit_status("p", raising(error)) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and told.splitlines()[-1].startswith(line)


def test_statuses(capsys):
    assert exit_status("p", lambda: None) == 0 and exit_status("p", lambda: 3) == 3
    assert exit_status("p", raising(KeyboardInterrupt())) == 130
    assert exit_status("p", raising(KeyboardInterrupt("saved at step 5"))) == 130
    assert capsys.readouterr().err == "interrupted\nsaved at step 5\n"
    with pytest.raises(SystemExit, match="2"):
        exit_status("p", raising(SystemExit(2)))
    assert exit_status("p", raising(BrokenPipeError("a worker's pipe"))) == 1  # standard output is well
    assert "a worker's pipe" in capsys.readouterr().err


def test_an_engine_at_work_is_left_as_it_is(monkeypatch):
    """Python's own way out would end in a crash while XLA compiles."""
    ended, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr("llava_jax.compiling.stop_keeping", lambda: statuses.append("nothing is kept"))
    assert exit_status("p", lambda: 0, own_process=True) == 0 and not statuses
    engine = threading.Thread(target=ended.wait, name=ENGINE_THREAD, daemon=True)
    engine.start()
    assert exit_status("p", lambda: 0) == 0 and not statuses  # others are in this process
    exit_status("p", lambda: 0, own_process=True)
    exit_status("p", raising(ValueError("x")), own_process=True)
    ended.set()
    engine.join()
    assert statuses == ["nothing is kept", 0, "nothing is kept", 1]


def test_nothing_is_kept_of_what_is_compiled_from_then_on(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        jax.jit(lambda x: x + 1)(np.ones(3))
        kept = set(tmp_path.iterdir())
        compiling.stop_keeping()
        jax.jit(lambda x: x * 2 + 1)(np.ones(3))
        assert kept and set(tmp_path.iterdir()) == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@pytest.mark.parametrize("error", [OverflowError("Python int too large"), MemoryError(), RuntimeError("died")])
def test_both_ways_in_use_it(monkeypatch, capsys, error):
    monkeypatch.setattr("llava_jax.conversion.from_hf.convert", lambda *args: raising(error)())
    assert cli.main(["convert", "x"]) == 1
    assert capsys.readouterr().err.startswith("llava-jax: error: ")
    with pytest.raises(SystemExit, match="1"):
        cli.script("from_hf.py", "convert", ["x"])
    assert capsys.readouterr().err.startswith("error: ")


def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, **options)


def test_a_reader_that_is_gone_is_no_error():
    code = "import sys\nfrom llava_jax.cli.failures import exit_status\n"
    code += "sys.exit(exit_status('p', lambda: [print('x' * 1000) for _ in range(10000)] and None))"
    process = python(code, stdout=subprocess.PIPE, env=ENV)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_terminal_that_cannot_show_an_answer():
    code = r"""
import sys
from llava_jax.cli.failures import exit_status
def run():
    print("caf\u00e9 \udcff")
    raise ValueError("na\u00efve \udcfe")
sys.exit(exit_status("p", run))
"""
    process = python(code, stdout=subprocess.PIPE, env={**ENV, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert (out, err, process.returncode) == (b"caf\\xe9 \\udcff\n", b"p: error: na\\xefve \\udcfe\n", 1)


def test_odd_bytes_on_the_command_line():
    command = [sys.executable, "-m", "llava_jax", "ask", "--model-path", b"/no\xffwhere", "--query", "Hi"]
    done = subprocess.run(command, cwd=ROOT, env={**ENV, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("llava-jax: error: ") and done.stderr.count("\n") == 1
    done = subprocess.run([*command[:3], b"\xff"], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice" in done.stderr
