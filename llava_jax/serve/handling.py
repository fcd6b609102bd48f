"""One request to an endpoint that answers: read, asked of the engine, sent back whole or in pieces, and logged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llava_jax.errors import reason_of
from llava_jax.serve.completions import Envelope, Form, Json, Piece, Tally
from llava_jax.serve.jobs import Job, Served
from llava_jax.serve.logprobs import Writer
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.protocol import ApiError, unavailable
from llava_jax.serve.running import choose, generate, internal_error, too_many

if TYPE_CHECKING:
    from llava_jax.inference.engine_loop import EngineLoop

MOST_BODY_BYTES = 64 << 20
BODY_SECONDS = 60  # in which a client has to send its request
MOST_BODIES_BYTES = 1 << 30  # of all requests that come in at a time
MOST_OPENING = 512  # requests that are prepared at a time
PICTURE_THREADS = 4
REQUEST_ID = "x-request-id"  # OpenAI's clients know this header
HANG_UP = {"Connection": "close"}  # to those who have not sent all of their body, nor shall
GONE = 499  # what the log says of a request whose client went away
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would wait for more
)

Result = TypeVar("Result")
log = logging.getLogger("llava_jax.serve")


def why_not(loop: EngineLoop) -> str | None:
    """Why the engine answers nothing now; None where it does."""
    if loop.stats().failed is not None:
        return "the engine has failed; the server's log says why"
    return None if loop.ready else f"not ready yet: {loop.starting}"


class Desk:
    """What all requests to a served model share."""

    def __init__(self, served: Served):
        self.served = served
        self.metrics = Metrics(served.name, served.loop)
        self.writer = Writer(served.tokenizer)
        self.threads = ThreadPoolExecutor(PICTURE_THREADS, thread_name_prefix="pictures")
        self.opening = 0  # requests
        self.body_bytes = 0  # of those that come in


@dataclass
class Seen:
    """What the log says of a request."""

    id: str
    started: float = field(default_factory=time.monotonic)
    status: int = 200
    problem: str = ""  # what the client was told instead of answers
    first: float | None = None  # when its first token came
    streams: bool = False  # its headers are sent
    ended: int = 0  # of its answers
    answers: int = 0
    n: int = 1
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application: POST a request, get its answers."""

    desk: Desk
    form: Form
    job: Callable[[Served, bytes], Job]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = Seen(self.form.prefix + uuid.uuid4().hex)
        try:
            job = await self._job(Request(scope, receive))
            seen.answers, seen.n, seen.tally.prompt_tokens = job.answers, job.n, job.positions
            await _unless_gone(receive, self._respond(job, seen, scope, receive, send))
        except ApiError as error:
            seen.status, seen.problem = error.status, error.message
            await error_response(error, seen.id)(scope, receive, send)
        except ClientDisconnect:
            seen.status = GONE
        except asyncio.CancelledError:  # the server's time to shut down is over
            seen.status = 503
            await _cut_off(seen, scope, receive, send)
        except Exception:
            seen.status = 500
            raise
        finally:
            self._note(seen)

    # ---- before the engine

    @contextlib.contextmanager
    def _opening(self):
        if self.desk.opening >= MOST_OPENING:
            raise too_many("too many requests come in at once; try again in a moment")
        self.desk.opening += 1
        try:
            yield
        finally:
            self.desk.opening -= 1

    async def _job(self, request: Request) -> Job:
        if reason := why_not(self.desk.served.loop):
            raise unavailable(reason)
        events, body = asyncio.get_running_loop(), bytearray()
        try:
            await self._read_body(request, body)
            with self._opening():
                reading = events.run_in_executor(self.desk.threads, self.job, self.desk.served, bytes(body))
                return await _unless_gone(request.receive, _awaited(reading))
        finally:
            self.desk.body_bytes -= len(body)

    async def _read_body(self, request: Request, body: bytearray) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("the Content-Type must be application/json", 415)
        message = f"the body has more than {MOST_BODY_BYTES} bytes"
        too_large = ApiError(message, 413, code="request_too_large", headers=HANG_UP)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MOST_BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self.desk.body_bytes += len(chunk)
                    if len(body) > MOST_BODY_BYTES:
                        raise too_large
                    if self.desk.body_bytes > MOST_BODIES_BYTES:
                        raise too_many("too much comes in at once; try again in a moment", HANG_UP)
        except TimeoutError:
            raise ApiError(f"the body did not come within {BODY_SECONDS} seconds", 408, headers=HANG_UP) from None

    # ---- answers

    async def _respond(self, job: Job, seen: Seen, scope: Scope, receive: Receive, send: Send) -> None:
        writer = self.desk.writer if job.tells_logprobs else None
        envelope = Envelope(self.form, seen.id, int(time.time()), self.desk.served.name, writer)
        async with contextlib.aclosing(self._pieces(job, seen)) as pieces:
            if job.stream:
                await self._stream(envelope, job, seen, pieces, send)
                return
            answers: list[list[Piece]] = [[] for _ in range(job.answers)]
            async for piece in pieces:
                answers[piece.answer].append(piece)
        whole = envelope.whole(answers, seen.tally.usage(job.n))
        await JSONResponse(whole, headers={REQUEST_ID: seen.id})(scope, receive, send)

    async def _stream(
        self, envelope: Envelope, job: Job, seen: Seen, pieces: AsyncGenerator[Piece], send: Send
    ) -> None:
        """Server-sent events. What goes wrong before the first token still has its status."""
        first = await anext(pieces)
        seen.streams = True
        headers = [*STREAM_HEADERS, (REQUEST_ID.encode(), seen.id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        no_usage: Json = {"usage": None} if job.tells_usage else {}
        offsets = dict.fromkeys(range(job.answers), 0)
        try:
            for chunk in envelope.opening(job.answers, no_usage):
                await _send_event(send, chunk)
            piece: Piece | None = first
            while piece is not None:
                if said := envelope.piece(piece, offsets[piece.answer], no_usage):
                    await _send_event(send, said)
                offsets[piece.answer] += envelope.length(piece)
                piece = await anext(pieces, None)
            if job.tells_usage:
                await _send_event(send, envelope.closing(seen.tally.usage(job.n)))
        except ApiError as error:
            seen.status, seen.problem = error.status, error.message
            await _send_event(send, error.body())
        except Exception:
            log.exception("%s failed", seen.id)
            seen.status = 500
            await _send_event(send, internal_error().body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _pieces(self, job: Job, seen: Seen) -> AsyncGenerator[Piece]:
        """The answers' pieces, timed and counted."""
        served, metrics = self.desk.served, self.desk.metrics
        if job.choices:
            source = choose(served.loop, job.choices, job.texts, seen.tally)
        else:
            source = generate(served.loop, served.tokenizer, job.rows, job.stop, seen.tally)
        last: dict[int, float] = {}
        async with contextlib.aclosing(source):
            async for piece in source:
                now = time.monotonic()
                if seen.first is None and piece.tokens:
                    seen.first = now
                    metrics.first_token.observe(now - seen.started)
                    metrics.prompt_tokens.inc(job.positions)
                if piece.tokens:
                    metrics.generation_tokens.inc(len(piece.tokens))
                    for _ in piece.tokens if piece.answer in last else ():
                        metrics.between_tokens.observe((now - last[piece.answer]) / len(piece.tokens))
                    last[piece.answer] = now
                if piece.finish:
                    seen.ended += 1
                    metrics.ended(piece.finish)
                yield piece

    # ---- afterwards

    def _note(self, seen: Seen) -> None:
        now, metrics, tally = time.monotonic(), self.desk.metrics, seen.tally
        if seen.status == 200:
            metrics.latency.observe(now - seen.started)
            metrics.request_prompt.observe(tally.prompt_tokens)
            metrics.request_generation.observe(tally.new_tokens)
        elif seen.ended < seen.answers and seen.status in (GONE, 500, 503):
            metrics.ended("error" if seen.status == 500 else "abort", seen.answers - seen.ended)
        first = "-" if seen.first is None else f"{seen.first - seen.started:.3f}s"
        decoding = now - (seen.first or now)
        speed = f"{(tally.new_tokens - seen.answers) / decoding:.1f}" if tally.new_tokens > seen.answers else "-"
        line = "%s %d prompt=%d cached=%d new=%d first=%s tokens/s=%s seconds=%.3f"
        cached = tally.cached_tokens(seen.n)
        numbers = tally.prompt_tokens, cached, tally.new_tokens, first, speed, now - seen.started
        problem = f" {reason_of(seen.problem)}" if seen.problem else ""  # on one line, whatever the client wrote
        log.info(line + "%s", seen.id, seen.status, *numbers, problem)


def error_response(error: ApiError, id: str | None = None) -> JSONResponse:
    """`id`: the request's, by which its line in the log is found."""
    return JSONResponse(error.body(), error.status, {**error.headers, **({REQUEST_ID: id} if id else {})})


async def _cut_off(seen: Seen, scope: Scope, receive: Receive, send: Send) -> None:
    """What the client of an answer that cannot be finished is told."""
    error = unavailable("the server is shutting down")
    if not seen.streams:
        await error_response(error, seen.id)(scope, receive, send)
        return
    await _send_event(send, error.body())
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send_event(send: Send, content: Json) -> None:
    await send({"type": "http.response.body", "body": f"data: {json.dumps(content)}\n\n".encode(), "more_body": True})


async def _awaited(future: asyncio.Future[Result]) -> Result:
    return await future


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled at once if the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
