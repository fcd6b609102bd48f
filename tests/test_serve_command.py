"""`llava-jax serve`: what is wrong with its flags is said in one line, before a model is loaded."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_prompt import CONFIG
from test_serve_app import free_port

from llava_jax.cli import add_command
from llava_jax.cli.serve import run
from llava_jax.inference.batch_shape import serving_shape
from llava_jax.inference.serving import startup_table
from llava_jax.inputs.groups import CacheLayout
from llava_jax.serve.server import ServeOptions, media_policy


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_command(parser, "serve")
    return parser.parse_args(["--model-path", "there-is-no-model", *flags])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "0"], "--port=0 must be a whole number from 1 to 65535"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid"),
        (["--api-key", ""], "--api-key must be printable ASCII"),
        (["--api-key", "a\nb"], "--api-key must be printable ASCII"),
        (["--served-model-name", " "], "--served-model-name must be printable ASCII"),
        (["--max-model-len", "1"], "--max-model-len=1 must be a whole number"),
        (["--max-num-seqs", "0"], "--max-num-seqs=0 must be a whole number"),
        (["--max-queue", "-1"], "--max-queue=-1 must be a whole number"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout=-1.0 must not be negative"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout=nan must be a finite number"),
        (["--allowed-media-path", "/there/is/none"], "no such folder"),
        (["--allowed-media-domains", "http://a.example/"], "expected a host's name"),
        ([], "there-is-no-model"),
    ],
)
def test_a_wrong_flag_is_named_before_the_model_is_loaded(flags, said, monkeypatch):
    monkeypatch.setattr("llava_jax.load", lambda *args, **options: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises((ValueError, OSError), match=said) as error:
        run(parsed("--port", str(free), *flags))
    assert "\n" not in str(error.value)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ValueError, match="already in use"):
        run(parsed("--port", str(server.getsockname()[1])))


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r'needs uvicorn: pip install "llava-jax\[serve\]"'):
        run(parsed())


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "ending"), [("serve", signal.SIGTERM), ("serve", signal.SIGINT), ("web", signal.SIGTERM)]
)
def test_told_to_end_while_it_compiles_it_ends_at_once(scenes_model, tmp_path, command, ending):
    """Costs 10 s each: a process that loads a model, and compiles for some seconds."""
    if command == "web":
        pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "", "TMPDIR": str(tmp_path)}
    flags = ["--model-path", str(scenes_model), "--port", str(free_port())]
    server = [sys.executable, "-u", "-m", "llava_jax", command, *flags]
    with subprocess.Popen(server, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while not said.endswith("…"):  # it is compiling, and not done with it
                said += process.stderr.read(1) or pytest.fail(said)
            process.send_signal(ending)
            began = time.monotonic()
            said += process.communicate(timeout=60)[1]
            assert process.returncode == 0, said
            assert time.monotonic() - began < 5  # it is 1.5; and 20 until all is compiled
        finally:
            process.kill()
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_it_is_safe_by_default():
    args = parsed()
    assert (args.host, args.api_key) == ("127.0.0.1", None)
    policy = media_policy(args.allowed_media_domains, args.allowed_media_path)
    assert policy == ServeOptions().media and not policy.allowed_domains and policy.allowed_path is None


def test_the_startup_table_says_what_there_is():
    shape = serving_shape(CONFIG, CacheLayout(4), 64 << 30, 2048, 8)
    lines = startup_table(CONFIG, shape, 3 << 30, 64 << 30).splitlines()
    assert lines[0] == "model   llava-v1.6-random, 2048 positions of prompt and answer"
    assert lines[-1] == "memory  an estimated 3.00 of 64.00 GiB, parameters aside"
    assert [line.split()[0] for line in lines[1:-1]] == ["pool", "pool"] and "of up to 2048 positions" in lines[2]
