"""Host processes that work ahead of the device. Imports neither JAX nor torch."""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Workers:
    """Processes that each do `work` on one task at a time; a context manager.

    They are spawned, so a script that makes them needs `if __name__ == "__main__":`. They do not outlive a killed
    parent.

    Args:
        work: a picklable function; a ValueError that it raises comes back, any other exception is its end.
        count: how many, at least 1.
    """

    def __init__(self, work: Callable, count: int):
        self._processes = [_Worker(work) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._processes:
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop, self._processes, self._threads)
        atexit.register(self.close)  # runs before multiprocessing's own, which would wait for the workers

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        """End the workers; what they were doing is dropped."""
        self.close()

    @property
    def pids(self) -> list[int | None]:
        return [worker.process.pid for worker in self._processes]

    def submit(self, *task) -> Future:
        """`work(*task)`, done by whichever is free; tasks are begun in order.

        The future's exceptions: the work's ValueError, or a RuntimeError if the worker died.
        """
        return self._threads.submit(self._ask, task)

    def _ask(self, task):
        worker = self._idle.get()
        try:
            return worker.ask(task)
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self, work: Callable):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, its_end = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(its_end,), daemon=True)
        self.process.start()
        its_end.close()
        self.unsent = [work]  # sent with the first task: the processes then start side by side

    def ask(self, task):
        try:
            while self.unsent:
                self.pipe.send(self.unsent.pop())
            self.pipe.send(task)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a data worker died: killed, perhaps for memory (use fewer workers), or the script that started it "
                'has no `if __name__ == "__main__":`'
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes: the parent decides, and saves first
        signal.signal(number, signal.SIG_IGN)
    try:
        work = pipe.recv()
        while True:
            task = pipe.recv()
            try:
                answer = work(*task)
            except ValueError as error:
                answer = error
            pipe.send(answer)
    except (EOFError, OSError):
        return  # the parent has gone


def _stop(processes: list[_Worker], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in processes:
        worker.process.kill()
    threads.shutdown()
    for worker in processes:
        worker.process.join()
        worker.pipe.close()
