"""The processes of a pod, one on each host, which run the same program in step. Alone, all of this is nothing."""

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

BEAT = 3  # seconds between two signs of life
HEARTBEAT_TIMEOUT = 30  # seconds without any, after which a process is taken to be dead
ALIVE, ENDED = "llava_jax/alive/", "llava_jax/ended/"  # where processes say so, by their number
BARRIER = 10 * 24 * 3600 * 1000  # milliseconds: however much slower the slowest process is


def is_primary() -> bool:
    """Whether this process is the one that writes what only one can."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Until every process has come to the place of that name."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(name, BARRIER)


def allgather_max(values: Sequence[int]) -> list[int]:
    """Of each value, the largest that any process has."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.array(values, np.int32)).max(0).tolist()


def any_of(value: bool) -> bool:
    """Whether it is so in any process."""
    return bool(allgather_max([value])[0])


def local_shards(mesh: Mesh) -> list[int]:
    """Which shards of a batch's rows this process has devices for, in order."""
    placed = batch_sharding(mesh).addressable_devices_indices_map((num_batch_shards(mesh),))
    return sorted({index[0].start or 0 for index in placed.values() if index is not None})


def place_rows(batch, mesh: Mesh):
    """A tree of arrays that hold this process's shards, as the whole of them, over the mesh."""
    sharding, here = batch_sharding(mesh), local_shards(mesh)

    def place(local: np.ndarray) -> jax.Array:
        rows = len(local) // len(here)

        def part(index):
            at = here.index((index[0].start or 0) // rows) * rows
            return local[at : at + rows]

        return jax.make_array_from_callback((num_batch_shards(mesh) * rows, *local.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


@contextlib.contextmanager
def abort_on_peer_failure(remedy: str) -> Iterator[None]:
    """A process that dies or fails within this ends all the others too, within a minute and with a line on stderr.

    Alone, a process would wait for it for ever, or be ended by JAX with a stack trace. No exception comes out of this
    where there are several processes: it is printed, and the process ends with status 1.

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
            time.sleep(2 * BEAT if is_primary() else 0)  # the others read from the first process why
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
    """Give signs of life, and look for those of the others."""
    me, beats = jax.process_index(), 0
    seen = {process: ("", time.monotonic()) for process in range(jax.process_count()) if process != me}
    while not over.wait(BEAT):
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
            elif (
                now - since > HEARTBEAT_TIMEOUT + 2 * BEAT * is_primary()
            ):  # all are cut off once the first process ends
                ended[process] = f"nothing was heard of it for {HEARTBEAT_TIMEOUT} seconds"
        if ended and not over.is_set():
            process, why = min(ended.items())
            end(f"llava-jax: process {process} has ended ({why}); {remedy}")


def _entries(prefix: str) -> dict[int, str]:
    return {int(key.removeprefix(prefix)): value for key, value in _client().key_value_dir_get(prefix)}


@contextlib.contextmanager
def _last_words(words: str) -> Iterator[Callable[[], None]]:
    """A child prints `words` if this process is killed, or aborted by JAX; what is yielded tells it to say nothing."""
    script = 'read -r line || echo "$0" >&2'
    with subprocess.Popen(["sh", "-c", script, words], stdin=subprocess.PIPE, start_new_session=True) as child:

        def say_nothing() -> None:
            child.communicate(b"\n")

        yield say_nothing
        say_nothing()
