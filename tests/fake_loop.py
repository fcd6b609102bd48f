"""What stands in for the engine's loop: it says scripted tokens from a thread of its own, stalls, fails, is full."""

import threading
import time
from dataclasses import dataclass

import numpy as np

from llava_jax.inference.requests import Finish, QueueFull, ScoreRequest, Scores, Stopped, Token, Update
from llava_jax.inputs.batch import merged_length

EOS = 2


@dataclass(frozen=True)
class Stats:
    running: int = 0
    waiting: int = 0
    rows: int = 8
    prefix_slots: int = 4
    prefix_slots_used: int = 1
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    failed: str | None = None


class FakeLoop:
    """Each step gives every answer that runs its next token, of `script(request)`, and then the end.

    Attributes:
        seen: all requests, in the order in which they came; cancelled: those that were.
        going: cleared, it stalls. stalls_at: the number of an answer's tokens after which it stalls by itself.
        full: it takes no more. failing: the error of the next step. pace: seconds of a step.
    """

    ready, starting, max_model_len, max_question = True, "", 4096, 512
    pace, stalls_at = 0.0, None

    def __init__(self, config, tokenizer, said="A red star, and a blue one."):
        self.config, self.tokenizer = config, tokenizer
        self.script = lambda request: tokenizer.encode(said)[1:]
        self.likely = lambda request: np.arange(len(request.candidates), dtype=np.float32)
        self.seen, self.cancelled, self.full, self.failing, self.failed = [], [], False, None, None
        self.going = threading.Event()
        self.going.set()
        self._running, self._prefixes, self._lock = {}, set(), threading.Lock()
        self._queries = self._hits = 0
        self._work, self._closed = threading.Condition(self._lock), False
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request):
        with self._work:
            if self._closed:
                raise Stopped
            if self.full:
                raise QueueFull
            self.seen.append(request)
            self._running[request] = []
            self._work.notify()

    def cancel(self, request):
        with self._work:
            if self._running.pop(request, None) is not None:
                self.cancelled.append(request)
                if not isinstance(request, ScoreRequest):
                    request.emit(Update(finish=Finish.CANCELLED))

    def stats(self):
        return Stats(len(self._running), prefix_queries=self._queries, prefix_hits=self._hits, failed=self.failed)

    def drain(self, timeout):
        with self._work:
            self._closed = True
            return not self._running

    def close(self, timeout=60):
        with self._work:
            self._closed = True

    def _run(self):
        while True:
            self.going.wait()
            time.sleep(self.pace)
            with self._work:
                self._work.wait_for(lambda: self._running)
                for request in list(self._running) if self.going.is_set() else ():
                    self._step(request, self._running[request])

    def _step(self, request, said):
        cached = 0 if said else self._look_up(request.prompt)
        if self.failing is not None:
            error, self.failing = self.failing, None
            nothing = Scores(np.zeros(0), np.zeros(0, bool), error)
            last = nothing if isinstance(request, ScoreRequest) else Update((), Finish.ERROR, error)
        elif isinstance(request, ScoreRequest):
            last = Scores(self.likely(request), np.zeros(len(request.candidates), bool), cached=cached)
        else:
            said.append(token := self._next(request, said))
            finish = Finish.STOP if token.id in request.options.end_ids else None
            finish = finish or (Finish.LENGTH if len(said) == request.options.max_new_tokens else None)
            last = Update((token,), finish, cached=cached)
            if len(said) == self.stalls_at:
                self.going.clear()
        if isinstance(last, Scores) or last.finish:
            del self._running[request]
        request.emit(last)

    def _next(self, request, said):
        script, most = self.script(request), request.options.top_logprobs
        token = script[len(said)] if len(said) < len(script) else EOS
        if most is None:
            return Token(token)
        return Token(token, -0.5, tuple((token if i == 0 else 300 + i, -0.5 - i) for i in range(most)))

    def _look_up(self, prompt):
        sizes = [image.size for image in prompt.images]
        prefix = prompt.ids[: prompt.shared]
        length = merged_length(prefix, sizes, self.config)
        key = (prefix.tobytes(), *(image.tiles.tobytes() for image in prompt.images))
        found = length if key in self._prefixes else 0
        self._prefixes.add(key)
        self._queries += length
        self._hits += found
        return found
