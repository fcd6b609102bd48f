"""Between the event loop and the engine's thread: requests go in, what the engine says of them comes out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_jax.errors import reason_of
from llava_jax.inference.requests import (
    Finish,
    QueueFull,
    Request,
    RowOptions,
    ScoreRequest,
    Scores,
    SplitPrompt,
    Stopped,
    Token,
    Update,
)
from llava_jax.inference.serving import AnswerText
from llava_jax.serve.completions import Piece, Tally
from llava_jax.serve.prompts import Choices
from llava_jax.serve.protocol import ApiError, unavailable

if TYPE_CHECKING:
    from llava_jax.inference.engine_loop import EngineLoop

RETRY_AFTER = 1  # seconds, that a client is asked to wait where the queue is full
UNANSWERED = "the model could not answer; the server's log says why"


def internal_error() -> ApiError:
    return ApiError(UNANSWERED, 500, type="server_error", code="internal_error")


def too_many(message: str, more_headers: Mapping[str, str] | None = None) -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER), **(more_headers or {})}
    return ApiError(message, 429, code="rate_limit_exceeded", type="rate_limit_error", headers=headers)


async def generate(
    loop: EngineLoop, tokenizer, rows: Sequence[tuple[SplitPrompt, RowOptions]], stop: Sequence[str], tally: Tally
) -> AsyncGenerator[Piece]:
    """The answers to (prompt, options) pairs, in pieces as they come; `tally` is kept.

    An answer that has come to a stop string is cancelled, and so are all when this generator is closed.

    Raises:
        ApiError: the queue is full, the engine takes no more, or it failed.
    """
    queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
    answers = [AnswerText(tokenizer, stop) for _ in rows]
    running: dict[int, Request] = {}
    try:
        for i, (prompt, options) in enumerate(rows):
            request = Request(prompt, options, _into(queue, i))
            _submit(loop, request)
            running[i] = request
        while running:
            i, update = await queue.get()
            if i not in running:  # it has come to a stop string
                continue
            if update.finish in (Finish.ERROR, Finish.CANCELLED):
                del running[i]
                raise _failed(update.error)
            piece = Piece(i, *answers[i].take(update))
            tally.new_tokens += len(piece.tokens)
            tally.cached[i] = max(update.cached, tally.cached.get(i, 0))
            if piece.finish:
                request = running.pop(i)
                if update.finish is None:
                    loop.cancel(request)
            yield piece
    finally:
        for request in running.values():
            loop.cancel(request)


async def choose(
    loop: EngineLoop, choices: Sequence[Choices], texts: Sequence[str], tally: Tally
) -> AsyncGenerator[Piece]:
    """The likeliest of the texts after each prompt, each as one piece.

    Raises:
        ApiError: as `generate`.
    """
    queue: asyncio.Queue[tuple[int, Scores]] = asyncio.Queue()
    running: dict[int, ScoreRequest] = {}
    try:
        for i, asked in enumerate(choices):
            request = ScoreRequest(asked.prompt, asked.candidates, _into(queue, i), asked.starts)
            _submit(loop, request)
            running[i] = request
        while running:
            i, scores = await queue.get()
            del running[i]
            if scores.error is not None:
                raise _failed(scores.error)
            best = int(np.argmax(scores.logprobs))
            own = choices[i].candidates[best][choices[i].starts[best] :]
            tokens = tuple(Token(int(token)) for token in own)
            tally.new_tokens += len(tokens)
            tally.cached[i] = scores.cached
            yield Piece(i, texts[best], tokens, "stop")
    finally:
        for request in running.values():
            loop.cancel(request)


def _into(queue: asyncio.Queue, i: int):
    """What the engine's thread calls: it hands over to the event loop, if that is still there."""
    events = asyncio.get_running_loop()

    def emit(said) -> None:
        with contextlib.suppress(RuntimeError):
            events.call_soon_threadsafe(queue.put_nowait, (i, said))

    return emit


def _submit(loop: EngineLoop, request: Request | ScoreRequest) -> None:
    try:
        loop.submit(request)
    except QueueFull:
        raise too_many("too many requests wait already; try again in a moment") from None
    except Stopped:
        raise unavailable("the server is shutting down") from None
    except ValueError as error:
        raise ApiError(reason_of(error)) from None


def _failed(error: Exception | None) -> ApiError:
    if error is None or isinstance(error, Stopped):
        return unavailable("the server is shutting down")
    return internal_error()
