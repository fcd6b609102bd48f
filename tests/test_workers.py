"""Worker processes that crash, are killed, or raise whatever: their task fails by itself, and work goes on."""

import os
import signal
import time
from pathlib import Path

from llava_jax.inputs.workers import WorkerDied, Workers


def work(kind):
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise":
        raise KeyError("no such\nkey")
    if kind == "refuse":
        raise ValueError("no")
    if kind == "unpicklable":
        return lambda: None
    return kind


def test_a_task_fails_alone():
    with Workers(work, 1) as workers:
        tasks = ("a", "raise", "b", "die", "c", "refuse", "die", "unpicklable", "d")
        futures = [workers.submit(task) for task in tasks]
        said = [future.exception() or future.result() for future in futures]
    assert [said[n] for n in (0, 2, 4, 8)] == ["a", "b", "c", "d"]
    assert type(said[1]) is ValueError and str(said[1]) == r"KeyError: 'no such\nkey'"
    assert isinstance(said[3], WorkerDied) and isinstance(said[6], WorkerDied)
    assert "killed, perhaps for memory" in str(said[3])
    assert str(said[5]) == "no" and isinstance(said[7], ValueError)


def test_one_that_is_killed_while_idle_costs_nothing():
    with Workers(work, 1) as workers:
        assert workers.submit("a").result() == "a"
        (pid,) = workers.pids
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX":
            time.sleep(0.001)
        assert workers.submit("b").result() == "b" and workers.pids != [pid]
    assert not [pid for pid in workers.pids if Path(f"/proc/{pid}").exists()]


class Unstartable:
    """Work that cannot be received, as where a script has no `if __name__ == "__main__":`."""

    def __reduce__(self):
        return os._exit, (1,)


def test_workers_that_cannot_be_started_are_no_tasks_fault():
    with Workers(Unstartable(), 1) as workers:
        for _ in range(2):
            error = workers.submit("a").exception()
            assert type(error) is RuntimeError and 'no `if __name__ == "__main__":`' in str(error)
