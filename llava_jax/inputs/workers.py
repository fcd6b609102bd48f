"""Host processes that work ahead of the device. Imports neither JAX nor torch."""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

from llava_jax.errors import reason_of


class WorkerDied(RuntimeError):
    """A worker was killed, or crashed, while it worked on a task."""


class Workers:
    """`count` processes that each do `work`, a picklable function, on one task at a time; a context manager.

    They are spawned, so a script that makes them needs `if __name__ == "__main__":`. They do not outlive a killed
    parent. One that dies costs its task alone and is replaced; a ProcessPoolExecutor breaks, and loses every task.
    """

    def __init__(self, work: Callable, count: int):
        self._work = work
        self._processes = [Worker(work) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._processes:
            self._idle.put(worker)
        self._closing = threading.Event()
        self.close = weakref.finalize(self, _stop, self._processes, self._threads, self._closing)
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

        The future's exceptions: a ValueError, the work's own or one that says what else it raised; WorkerDied if the
        worker died over this task; or a RuntimeError if workers cannot be started at all.
        """
        return self._threads.submit(self._ask, task)

    def map(self, tasks: Iterable[tuple], ahead: int) -> Iterator:
        """`work(*task)` of each task in their order; `ahead` more are begun than have been asked for."""
        waiting: deque[Future] = deque()
        for task in tasks:
            waiting.append(self.submit(*task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, task):
        worker = self._idle.get()
        try:
            if not worker.process.is_alive():  # killed while it had nothing to do, which is not this task's fault
                worker = self._replaced(worker)
            return worker.ask(task)
        except WorkerDied:
            worker = self._replaced(worker)
            raise
        finally:
            self._idle.put(worker)

    def _replaced(self, dead: Worker) -> Worker:
        if self._closing.is_set():
            return dead
        dead.stop()
        new = self._processes[self._processes.index(dead)] = Worker(self._work)
        return new


class Worker:
    """One process, and the pipe to it."""

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
                self.pipe.send(self.unsent[0])
                self.pipe.recv()  # it has it
                self.unsent.pop()
            self.pipe.send(task)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            died = "a data worker died: killed, perhaps for memory (use fewer workers)"
            if not self.unsent:
                raise WorkerDied(died) from error
            unguarded = 'or the script that started it has no `if __name__ == "__main__":`'
            raise RuntimeError(f"{died}, {unguarded}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes: the parent decides, and saves first
        signal.signal(number, signal.SIG_IGN)
    try:
        work = pipe.recv()
        pipe.send(None)
        while True:
            task = pipe.recv()
            try:
                answer = ForkingPickler.dumps(work(*task))
            except Exception as error:  # whatever a decoder raises, or too little memory for this task
                reason = str(error) if isinstance(error, ValueError) else reason_of(error)
                answer = ForkingPickler.dumps(ValueError(reason))
            pipe.send_bytes(answer)
    except (EOFError, OSError):
        return  # the parent has gone


def _stop(processes: list[Worker], threads: ThreadPoolExecutor, closing: threading.Event) -> None:
    closing.set()
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in list(processes):
        worker.process.kill()  # which ends the threads' waiting
    threads.shutdown()
    for worker in processes:
        worker.stop()
