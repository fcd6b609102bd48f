"""A model over HTTP until SIGTERM or Ctrl-C: what runs is then finished, and nothing more is taken."""

from __future__ import annotations

import importlib.util
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llava_jax.constants import ENGINE_CLOSING
from llava_jax.inputs.numbers import finite_number, whole_number
from llava_jax.serve.media import MediaPolicy, load_picture

if TYPE_CHECKING:
    from llava_jax.inference.llava import Llava
    from llava_jax.serve.jobs import Served

PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
LOOK = 0.2  # seconds between looks at the engine


@dataclass(frozen=True)
class ServeOptions:
    """How a model is served.

    Raises:
        ValueError: a number is out of range, or a key or name is none; the message names the flag.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None  # None: the checkpoint's
    conv_mode: str | None = None
    max_model_len: int | None = None  # positions of a prompt and its answer; None: what the model takes
    max_num_seqs: int = 64  # answers that decode at once
    max_queue: int = 256  # requests that wait
    shutdown_timeout: float = 30.0  # seconds for what runs
    media: MediaPolicy = field(default_factory=MediaPolicy)

    def __post_init__(self):
        whole_number("--port", self.port, 1, 65535)
        whole_number("--max-num-seqs", self.max_num_seqs, 1, 1 << 16)
        whole_number("--max-queue", self.max_queue, 1, 1 << 20)
        if self.max_model_len is not None:
            whole_number("--max-model-len", self.max_model_len, 2, 1 << 20)
        if finite_number("--shutdown-timeout", self.shutdown_timeout) < 0:
            raise ValueError(f"--shutdown-timeout={self.shutdown_timeout} must not be negative")
        for flag, text in (("--api-key", self.api_key), ("--served-model-name", self.served_model_name)):
            if text is not None and not (text.isascii() and text.isprintable() and text.strip() == text != ""):
                raise ValueError(f"{flag} must be printable ASCII, without spaces around it")


def media_policy(domains: list[str], folder: str | None) -> MediaPolicy:
    """Where pictures may come from, as the flags say it."""
    return MediaPolicy(tuple(domains), None if folder is None else Path(folder))


def check_packages() -> None:
    """ValueError if the extra is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'llava-jax serve needs {", ".join(missing)}: pip install "llava-jax[serve]"')


def serve(llava: Llava, params: dict, options: ServeOptions) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Raises:
        RuntimeError: the engine has failed for good.
    """
    from llava_jax.inference.serving import start_loop
    from llava_jax.serve.jobs import Served

    most, length, waiting = options.max_num_seqs, options.max_model_len, options.max_queue
    with asked_to_stop() as stop:  # from when it compiles
        loop = start_loop(llava.engine, params, most, length, max_waiting=waiting)
        name = options.served_model_name or llava.config.name
        picture = partial(load_picture, policy=options.media)
        served = Served(name, loop, llava.tokenizer, picture, options.conv_mode, options.api_key)
        run_server(served, options, stop)


def run_server(served: Served, options: ServeOptions, stop: threading.Event) -> None:
    """Listen at once, also while the engine compiles; `/health` says when it is ready. Until `stop` is set."""
    import uvicorn

    from llava_jax.serve.api import build_app

    grace = max(1, round(options.shutdown_timeout)) if options.shutdown_timeout else 0
    config = uvicorn.Config(
        build_app(served),
        host=options.host,
        port=options.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    # Not in the main thread it leaves signals alone, which otherwise would end the process by the signal itself.
    server = uvicorn.Server(config)
    listening = threading.Thread(target=server.run, name="llava-jax server", daemon=True)
    listening.start()
    try:
        _watch(served, options, listening, stop)
    finally:
        server.should_exit = True  # it takes no more connections, and finishes what there is
        listening.join(grace + 5)
        served.loop.drain(0)
        served.loop.close(ENGINE_CLOSING)


def _watch(served: Served, options: ServeOptions, listening: threading.Thread, stop: threading.Event) -> None:
    """Until somebody asks to stop; says when the engine is ready."""
    told, loop = False, served.loop
    host = f"[{options.host}]" if ":" in options.host else options.host
    while not stop.wait(LOOK):
        if (failed := loop.stats().failed) is not None:
            raise RuntimeError(f"the engine has failed: {failed}")
        if not listening.is_alive():
            raise RuntimeError("the server has ended by itself")
        if loop.ready and not told:
            print(f"{served.name} at http://{host}:{options.port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
            told = True


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM and Ctrl-C; the second one ends the process."""
    stop, names = threading.Event(), (signal.SIGTERM, signal.SIGINT)

    def asked(number: int, frame: object) -> None:
        stop.set()
        for name in names:
            signal.signal(name, signal.default_int_handler)

    before = [signal.signal(name, asked) for name in names]
    try:
        yield stop
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def log_requests() -> None:
    """A line on stderr for each request."""
    handler, log = logging.StreamHandler(), logging.getLogger("llava_jax.serve")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
