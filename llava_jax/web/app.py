"""`llava-jax web`: a page in a browser, in the spirit of the original's demo (llava/serve/gradio_web_server.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llava_jax.constants import ENGINE_CLOSING

if TYPE_CHECKING:
    from llava_jax.inference.engine_loop import EngineLoop
    from llava_jax.inference.llava import Llava

EXAMPLES = ((3, "reading"), (11, "position"), (9, "count"))  # scenes, and which kind of question is asked
ANSWERS = 4  # that decode at once, each about a picture of its own; others wait
LOOK = 0.2  # seconds between looks at the engine


def serve(
    llava: Llava, params: dict, host: str, port: int, conv_mode: str | None = None, max_model_len: int | None = None
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; its first answers wait until the engine has compiled.

    Args:
        conv_mode: the prompt template; None is the checkpoint's.
        max_model_len: positions of a conversation; None: what the model takes.

    Raises:
        RuntimeError: the engine has failed for good.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-jax-web-"))
        os.environ["GRADIO_TEMP_DIR"] = folder  # what is uploaded goes when the server ends
        from llava_jax.inference.batch_shape import ONE_ROW
        from llava_jax.inference.serving import start_loop
        from llava_jax.web.conversations import Conversations
        from llava_jax.web.page import build_page, launch

        loop = start_loop(llava.engine, params, ANSWERS, max_model_len, ONE_ROW)
        stack.callback(loop.close, ENGINE_CLOSING)
        page = build_page(Conversations(llava, loop, conv_mode), example_scenes(llava.config.name, folder))
        launch(page, host, port)
        stack.callback(page.close, verbose=False)
        print(f"http://{host}:{port} (Ctrl-C ends)", flush=True)
        _watch(loop)


def _watch(loop: EngineLoop) -> None:
    """Until the engine fails."""
    while (failed := loop.stats().failed) is None:
        time.sleep(LOOK)
    raise RuntimeError(f"the engine has failed: {failed}")


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
