"""`llava-jax web`: a page in a browser, in the spirit of the original's demo (llava/serve/gradio_web_server.py)."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llava_jax.web.conversations import Conversations

if TYPE_CHECKING:
    from llava_jax.inference.llava import Llava

EXAMPLES = ((3, "reading"), (11, "position"), (9, "count"))  # scenes, and which kind of question is asked


def serve(llava: Llava, params: dict, host: str, port: int, conv_mode: str | None = None) -> None:
    """Serve the page until Ctrl-C or SIGTERM. `conv_mode` is the prompt template; None is the checkpoint's."""
    with contextlib.ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-jax-web-"))
        os.environ["GRADIO_TEMP_DIR"] = folder  # what is uploaded goes when the server ends
        from llava_jax.web.page import build_page, launch

        conversations = Conversations(llava, params, conv_mode)
        page = build_page(conversations, example_scenes(llava.config.name, folder))
        launch(page, host, port)
        print(f"http://{host}:{port} (Ctrl-C ends)", flush=True)
        page.block_thread()
        conversations.close()


def check_address(host: str, port: int) -> None:
    """ValueError if nothing can listen there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} must be from 1 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is already in use; choose another") from None
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None


def check_gradio() -> None:
    """ValueError if the extra is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('llava-jax web needs gradio: pip install "llava-jax[web]"')


def example_scenes(name: str, folder: str) -> list[list[str]]:
    """[picture's file, question] of scenes new to the bundled model, written to a folder; for other models none."""
    from llava_jax.demo.held_out import held_out_scene, questions_about
    from llava_jax.demo.model import NAME
    from llava_jax.demo.scenes import draw

    if name != NAME:
        return []
    examples = []
    for number, kind in EXAMPLES:
        scene = held_out_scene(0, number)
        path = Path(folder) / f"scene-{number}.png"
        draw(scene).save(path)
        examples += [[str(path), asked.text] for asked in questions_about(scene, 0, number) if asked.kind == kind]
    return examples
