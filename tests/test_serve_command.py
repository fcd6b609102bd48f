"""`llava-jax serve`: what is wrong with its flags is said in one line, before a model is loaded."""

import argparse
import socket
import sys

import pytest

from llava_jax.cli import add_command
from llava_jax.cli.serve import run
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


def test_it_is_safe_by_default():
    args = parsed()
    assert (args.host, args.api_key) == ("127.0.0.1", None)
    policy = media_policy(args.allowed_media_domains, args.allowed_media_path)
    assert policy == ServeOptions().media and not policy.allowed_domains and policy.allowed_path is None
