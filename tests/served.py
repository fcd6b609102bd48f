"""`llava-jax serve` as a process of its own, for what talks to it from outside; and pictures to ask it about."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_jax.demo.held_out import held_out_scene
from llava_jax.demo.scenes import draw

STARTS_WITHIN = 600.0  # seconds, to load and to compile


@dataclass(frozen=True)
class Server:
    """One that answers: where it is, what it calls its model, and its process."""

    url: str
    model: str
    pid: int

    def resident(self) -> int:
        """Bytes of memory that the process has; Linux."""
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[1]) << 10

    def metric(self, name: str) -> float:
        """A gauge or counter of /metrics, its labels summed up."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            text = reply.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"/metrics has no {name}")
        return sum(map(float, found))


@contextlib.contextmanager
def served(model: Path, *flags: str) -> Iterator[Server]:
    """Serves a model until the block is left; its log goes to stderr.

    Raises:
        RuntimeError: the process ended before it was ready, or not with 0 when it was told to.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llava_jax", "serve", "--model-path", str(model), "--port", str(port), *flags]
    process = subprocess.Popen([*command, "--served-model-name", "served"], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, f"{url}/health")
        yield Server(url, "served", process.pid)
        process.terminate()
        if process.wait(60) != 0:
            raise RuntimeError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen, health: str) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(health).close()
            return
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the server was not ready (exit status {process.returncode}); its log says why")
        time.sleep(0.5)


def scene_uri(seed: int, number: int) -> str:
    """A picture that the bundled model has not seen, as a data URI."""
    file = io.BytesIO()
    draw(held_out_scene(seed, number)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
