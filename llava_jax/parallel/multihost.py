"""The processes of a pod, one on each host, which run the same program in step. With one process this does nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import multihost as orbax_multihost

from llava_jax.parallel.sharding import batch_sharding, num_batch_shards

HEARTBEAT_INTERVAL = 3  # seconds between two heartbeats
HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat until a process counts as dead
ALIVE, ENDED = "llava_jax/alive/", "llava_jax/ended/"  # keys of the store that all processes share; + process index
BARRIER_TIMEOUT = 10 * 24 * 3600 * 1000  # milliseconds: however much slower the slowest process is


def is_primary() -> bool:
    """Whether this is process 0, which writes what only one process may write."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier of this name."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(name, BARRIER_TIMEOUT)


def allgather_max(values: Sequence[int]) -> list[int]:
    """The largest of each value over all processes."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.array(values, np.int32)).max(0).tolist()


def any_of(value: bool) -> bool:
    """Whether the value is true in any process."""
    return bool(allgather_max([value])[0])


def allgather_bytes(data: bytes) -> list[bytes]:
    """What each process has, in the order of the processes."""
    if jax.process_count() == 1:
        return [data]
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def local_shards(mesh: Mesh) -> list[int]:
    """Which shards of a batch's rows this process's devices hold, in order."""
    placed = batch_sharding(mesh).addressable_devices_indices_map((num_batch_shards(mesh),))
    return sorted({index[0].start or 0 for index in placed.values() if index is not None})


def place_rows(batch, mesh: Mesh):
    """A tree of global arrays over the mesh, from NumPy arrays that hold this process's shards."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


@contextlib.contextmanager
def abort_on_peer_failure(remedy: str) -> Iterator[None]:
    """A process that dies or fails in this block ends all the others too, within a minute and with a line on stderr.

    JAX's own heartbeat aborts them with a C++ stack trace, and says nothing of a process that failed with an exception.
    Where there are several processes, no exception leaves the block: it is printed, and the process exits with 1.

    Args:
        remedy: the end of that line.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    with _last_words(f"llava-jax: process {jax.process_index()} was stopped; {remedy}") as say_nothing:

        def end(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            time.sleep(2 * HEARTBEAT_INTERVAL if is_primary() else 0)  # the others read from the first process why
            say_nothing()
            os._exit(1)  # JAX's own way out would wait for the others

        watch = threading.Thread(target=_watch, args=(over, end, remedy), daemon=True)
        watch.start()
        try:
            yield
        except BaseException as error:
            known = isinstance(error, ValueError | OSError | KeyboardInterrupt)
            _client().key_value_set(f"{ENDED}{jax.process_index()}", str(error) or type(error).__name__)
            end(f"llava-jax: error: {error}" if known else traceback.format_exc())
        over.set()
        watch.join()


def _client():
    return orbax_multihost.get_jax_distributed_client()


def _watch(over: threading.Event, end: Callable[[str], None], remedy: str) -> None:
    """Send heartbeats, and look for those of the other processes."""
    me, beats = jax.process_index(), 0
    # The primary waits longest, for the others learn through it why they end.
    patience = HEARTBEAT_TIMEOUT + 2 * HEARTBEAT_INTERVAL * is_primary()
    seen = {process: ("", time.monotonic()) for process in range(jax.process_count()) if process != me}
    while not over.wait(HEARTBEAT_INTERVAL):
        beats += 1
        try:
            _client().key_value_set(f"{ALIVE}{me}", str(beats), allow_overwrite=True)
            signs, ended = _entries(ALIVE), _entries(ENDED)
        except jax.errors.JaxRuntimeError:
            signs, ended = {}, {0: "it keeps what the others say, and does not reply"}
        now = time.monotonic()
        for process, (sign, since) in seen.items():
            if signs.get(process, sign) != sign:
                seen[process] = signs[process], now
            elif now - since > patience:
                ended[process] = f"nothing was heard of it for {HEARTBEAT_TIMEOUT} seconds"
        if ended and not over.is_set():
            process, why = min(ended.items())
            end(f"llava-jax: process {process} has ended ({why}); {remedy}")


def _entries(prefix: str) -> dict[int, str]:
    return {int(key.removeprefix(prefix)): value for key, value in _client().key_value_dir_get(prefix)}


@contextlib.contextmanager
def _last_words(words: str) -> Iterator[Callable[[], None]]:
    """A child process prints `words` if this one is killed, or aborted by JAX; the yielded function cancels that."""
    script = 'read -r line || echo "$0" >&2'
    with subprocess.Popen(["sh", "-c", script, words], stdin=subprocess.PIPE, start_new_session=True) as child:

        def say_nothing() -> None:
            child.communicate(b"\n")

        yield say_nothing
        say_nothing()
