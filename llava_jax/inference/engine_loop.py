"""A continuous batch in a thread of its own, for many who ask at the same time."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from llava_jax.config import LlavaConfig
from llava_jax.constants import ENGINE_THREAD
from llava_jax.inference.continuous_batch import ContinuousBatch
from llava_jax.inference.requests import QueueFull, Request, ScoreRequest, Scores, Stopped, Update

MOST_FAILURES = 3  # in a row, until the loop gives up


@dataclass(frozen=True)
class Stats:
    """What a loop does at the moment, and has done."""

    running: int = 0  # answers that decode
    waiting: int = 0  # for a place
    rows: int = 0  # answers that can decode at once
    prefix_slots: int = 0
    prefix_slots_used: int = 0
    prefix_queries: int = 0  # positions of prefixes that were asked for
    prefix_hits: int = 0  # those of them that were found
    preemptions: int = 0
    failed: str | None = None  # why the loop has given up


class EngineLoop:
    """Made by `EngineLoop.start`. All methods may be called from any thread.

    Attributes:
        starting: what it does until it is ready.
        compiled: how many programs there are, once it is ready.
    """

    def __init__(self, batch: ContinuousBatch, max_waiting: int):
        self._batch, self._max_waiting = batch, max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._submitted: set[Request | ScoreRequest] = set()  # that have not ended
        self._ready = threading.Event()
        self._stopping = self._closed = False
        self._failed: str | None = None
        self.starting, self.compiled = "starting", 0
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)

    @classmethod
    def start(cls, batch: ContinuousBatch, max_waiting: int = 256) -> EngineLoop:
        """A loop that compiles the batch's programs and then answers."""
        loop = cls(batch, max_waiting)
        loop._thread.start()
        return loop

    # ---- what there is

    @property
    def config(self) -> LlavaConfig:
        return self._batch.config

    @property
    def max_model_len(self) -> int:
        """Positions of a prompt and its answer together."""
        return self._batch.shape.max_model_len

    @property
    def max_question(self) -> int:
        """The most ids that may follow a prompt's shared ones."""
        return self._batch.shape.question

    @property
    def ready(self) -> bool:
        return self._ready.is_set() and self._failed is None

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Whether it is; at once if it has failed."""
        self._ready.wait(timeout)
        return self.ready

    def stats(self) -> Stats:
        scheduler, shape = self._batch.scheduler, self._batch.shape
        return Stats(
            running=len(scheduler.running),
            waiting=max(0, len(self._submitted) - len(scheduler.running)),
            rows=sum(shape.groups * shape.row_class(block).rows for block in shape.blocks),
            prefix_slots=shape.groups * len(shape.pools),
            prefix_slots_used=sum(table.used() for table in scheduler.tables),
            prefix_queries=scheduler.queried,
            prefix_hits=scheduler.hit,
            preemptions=scheduler.preemptions,
            failed=self._failed,
        )

    # ---- what is asked

    def submit(self, request: Request | ScoreRequest) -> None:
        """Have it answered.

        Raises:
            QueueFull: as many as may be wait already.
            Stopped: nothing is taken any more.
            ValueError: it does not fit.
        """
        active = self._batch.scheduler.check(request)
        with self._lock:
            if self._stopping or self._failed is not None:
                raise Stopped(self._failed or "the server is shutting down")
            if len(self._submitted) - len(self._batch.scheduler.running) >= self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests wait already")
            self._submitted.add(request)
            active.emit = self._noting(request)
            self._inbox.put(lambda: self._batch.scheduler.add(active))  # before anybody gives up, who then ends it

    def cancel(self, request: Request | ScoreRequest) -> None:
        """End it, wherever it is; nothing if it has ended."""
        self._inbox.put(lambda: self._batch.scheduler.cancel(request))

    def _noting(self, request: Request | ScoreRequest) -> Callable:
        """The request's `emit`, with its end noted; one that has gone away must not stop the others."""

        def noting(update: Update | Scores) -> None:
            if not isinstance(update, Update) or update.finish is not None:
                self._forget(request)
            try:
                request.emit(update)  # type: ignore[arg-type]
            except Exception:
                traceback.print_exc()

        return noting

    def _forget(self, request: Request | ScoreRequest) -> None:
        with self._lock:
            self._submitted.discard(request)

    def drain(self, timeout: float) -> bool:
        """Take no more, and finish what there is. Whether all of it has ended in so many seconds."""
        with self._lock:
            self._stopping = True
        deadline = time.monotonic() + timeout
        while self._submitted and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self._submitted

    def close(self, timeout: float = 60.0) -> None:
        """End all, and the thread, which must first finish what the device or the compiler does. If that takes more
        seconds than `timeout`, it is left to it."""
        with self._lock:
            self._stopping = True
        self._closed = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    # ---- the thread

    def _run(self) -> None:
        failures = 0
        try:
            self._warm_up()
        except Exception as error:
            traceback.print_exc()
            self._give_up(f"its programs could not be compiled: {type(error).__name__}")
        while not self._closed and self._failed is None:
            try:
                self._take_messages(block=self._batch.idle)
                self._batch.step()
                failures = 0
            except Exception as error:
                traceback.print_exc()
                failures += 1
                self._recover(error, failures)
        self._fail_all(Stopped(self._failed or "the server was closed"))

    def _warm_up(self) -> None:
        steps = self._batch.to_compile()
        for n, (name, compile_it) in enumerate(tqdm(steps, desc="compiling", unit="program", dynamic_ncols=True), 1):
            if self._closed:
                return
            self.starting = f"compiling {name} ({n} of {len(steps)})"
            compile_it()
        self.compiled = self._batch.programs.compiled
        self._ready.set()

    def _take_messages(self, block: bool) -> None:
        """What was asked meanwhile; if nothing else is to be done, wait for it."""
        if block:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _recover(self, error: Exception, failures: int) -> None:
        """What runs fails; the next requests find everything new, if the device still can."""
        self._fail_all(error)
        if failures >= MOST_FAILURES:
            return self._give_up(f"the device fails again and again: {type(error).__name__}")
        try:
            self._batch.reset()
        except Exception as again:
            traceback.print_exc()
            self._give_up(f"the device has failed: {type(again).__name__}")

    def _fail_all(self, error: Exception) -> None:
        while not self._inbox.empty():
            self._inbox.get()()
        self._batch.scheduler.fail_all(error)

    def _give_up(self, why: str) -> None:
        with self._lock:
            self._failed = why
        self._ready.set()
