"""What everybody needs who serves a model to many: the loop that answers, a prompt in two parts, answers as text."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.batch_shape import ROWS, BatchShape, RowsPerPrefix, memory_bytes, serving_shape
from llava_jax.inference.batching import memory_budget
from llava_jax.inference.continuous_batch import ContinuousBatch
from llava_jax.inference.engine import Engine
from llava_jax.inference.engine_loop import EngineLoop
from llava_jax.inference.requests import Finish, Request, RowOptions, SplitPrompt, Token, Update
from llava_jax.inputs.detokenizer import IncrementalDetokenizer
from llava_jax.inputs.groups import common_length

# ---- the loop


def start_loop(
    engine: Engine,
    params: dict,
    max_num_seqs: int,
    max_model_len: int | None = None,
    rows: Sequence[RowsPerPrefix] = ROWS,
    max_waiting: int = 256,
) -> EngineLoop:
    """A loop whose batch is as large as the memory allows, which a table on stderr shows. It compiles at first.

    A CPU does not say how much there is; there, one prefix is always tried.

    Args:
        max_num_seqs, max_model_len, rows: as `serving_shape` takes them.
        max_waiting: requests that wait, at most.

    Raises:
        ValueError: as `serving_shape`.
    """
    config, layout, budget = engine.config, engine.cache_layout(params), memory_budget(params)
    (platform,) = {device.platform for device in jax.tree.leaves(params)[0].devices()}
    shape = serving_shape(config, layout, budget, max_model_len, max_num_seqs, rows, platform == "cpu")
    needed = memory_bytes(shape, config, layout)
    print(startup_table(config, shape, needed, budget, engine.mesh), file=sys.stderr, flush=True)
    return EngineLoop.start(ContinuousBatch(engine, params, shape), max_waiting)


def startup_table(
    config: LlavaConfig, shape: BatchShape, needed: int, budget: int, mesh: jax.sharding.Mesh | None = None
) -> str:
    """What is served, and how much of it at once. `needed` and `budget` are bytes of one device."""
    lines = [("model", f"{config.name}, {shape.max_model_len} positions of prompt and answer")]
    if mesh is not None:
        lines.append(("mesh", ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())))
    for pool in shape.pools:
        rows = " and ".join(f"{rows} rows of {slots} slots" for rows, slots in pool.classes)
        lines.append(("pool", f"{shape.groups} prefixes of up to {pool.capacity} positions, each with {rows}"))
    lines.append(("memory", f"an estimated {needed / 2**30:.2f} of {budget / 2**30:.2f} GiB, parameters aside"))
    return "\n".join(f"{name:8}{what}" for name, what in lines)


# ---- prompts


def shared_length(ids: Sequence[int], head: Sequence[int], max_question: int) -> int:
    """How many of a prompt's ids are its prefix: those of its head, so that all images are among them.

    After them come at least 1 and at most `max_question` ids.
    """
    whole = np.asarray(ids)
    images = np.flatnonzero(whole == IMAGE_TOKEN_INDEX)
    shared = max(common_length([whole, np.asarray(head)]), len(ids) - max_question, *(images[-1:] + 1), 0)
    return int(min(shared, len(ids) - 1))


# ---- answers


class NewText(NamedTuple):
    """What is new of one answer."""

    text: str  # final: never half a character, nor what may become a stop string
    tokens: tuple[Token, ...]
    finish: Finish | None  # on the last one


class AnswerText:
    """One answer's tokens as text, as they come."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._text = IncrementalDetokenizer(tokenizer, stop)

    def take(self, update: Update) -> NewText:
        """What is new with an update. If this finishes where the update does not, it has come to a stop string."""
        text = ""
        for count, token in enumerate(update.tokens, 1):
            text += self._text.push(token.id)
            if self._text.stopped:
                return NewText(text, update.tokens[:count], Finish.STOP)
        if update.finish is not None:
            text += self._text.flush()
        return NewText(text, update.tokens, update.finish)


class AnswerStream:
    """The text of one answer, piece by piece, for a thread that may wait for it.

    Raises:
        QueueFull, Stopped, ValueError: as `EngineLoop.submit`; when it is read, what the engine failed with.
    """

    def __init__(self, loop: EngineLoop, tokenizer, prompt: SplitPrompt, options: RowOptions, stop: Sequence[str] = ()):
        self._loop, self._text = loop, AnswerText(tokenizer, stop)
        self._updates: queue.SimpleQueue[Update | None] = queue.SimpleQueue()
        self._request = Request(prompt, options, self._updates.put)
        loop.submit(self._request)

    def __iter__(self) -> Iterator[str]:
        while (update := self._updates.get()) is not None:
            if update.error is not None:
                raise update.error
            new = self._text.take(update)
            if new.text:
                yield new.text
            if new.finish is not None:
                return self.close()

    def close(self) -> None:
        """End it, from any thread: whoever reads it gets what there is, and no more. Nothing if it has ended."""
        self._updates.put(None)
        self._loop.cancel(self._request)
