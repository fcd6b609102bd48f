"""The states of a run on disk: whole ones are gone on from, damaged ones are named and set aside."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from llava_jax.errors import reason_of
from llava_jax.models.ops import flat_positions
from llava_jax.parallel import multihost


class States:
    """Saves a run's state while it goes on, and gives the newest whole one back; a context manager.

    Beside its arrays a state holds the checksum of each, taken on the device, and compared when it is read.

    Args:
        directory: where they are kept, one for each step.
        keep: how many, the newest.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory, self._saved = directory.absolute(), 0
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            self._directory, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_) -> None:
        """Wait for the last save."""
        self._orbax.close()

    def newest(self, state):
        """The newest whole state; `state` itself, which gives its structure, where none was saved.

        Newer ones that are damaged are named on stderr and moved out of the way.

        Raises:
            ValueError: there are states, and all are damaged.
        """
        steps = sorted((saved.step for saved in self._orbax.checkpoints), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                found = self._read(step, state)
            except ValueError as error:
                damaged[step] = str(error)
                continue
            if damaged:
                self._set_aside(damaged, step)
            self._saved = step
            return found
        if damaged:
            told = "; ".join(f"that of step {step}: {problem}" for step, problem in damaged.items())
            raise ValueError(f"{self._directory}: no saved state is whole ({told}); delete it to start anew")
        return state

    def save(self, step: int, state) -> None:
        """Begin to save, after a save that is still going on. The step that was saved last is not saved again.

        Raises:
            ValueError: something in the state is not finite. It is not saved, and what was saved before stays.
        """
        if step == self._saved:
            return
        found = survey(state)
        if not found.finite:
            raise ValueError(
                f"the parameters after step {step} are not finite, and are not saved; lower the learning rate"
            )
        self._orbax.save_async(step, {"state": state, "checksums": found.checksums}, force=True)
        self._saved = step

    def wait(self) -> None:
        """Wait until the last save is on the disk."""
        self._orbax.wait()

    def _read(self, step: int, state):
        """The state of a step; a ValueError in every process if any cannot read it."""
        wanted = {"state": state, "checksums": np.zeros(len(jax.tree.leaves(state)), np.uint32)}
        found: Any = None
        problem = "cannot be read in another process"
        try:
            with _quiet():
                found = self._orbax.load(step, abstract_state=wanted)
        except (MemoryError, jax.errors.JaxRuntimeError):  # the directory is not to blame
            raise
        except Exception as error:
            problem = f"cannot be read ({_first_cause(error)})"
        if multihost.any_of(found is None):
            raise ValueError(problem)
        if not np.array_equal(survey(found["state"]).checksums, found["checksums"]):
            raise ValueError("changed since it was saved (its checksums differ)")
        return found["state"]

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Move damaged states away, that newer ones may take their place, and say so."""
        if multihost.is_primary():
            for number, problem in damaged.items():
                aside = _free(self._directory.with_name(f"damaged-{number}"))
                (self._directory / str(number)).rename(aside)
                print(
                    f"the state of step {number} {problem}; moved to {aside}, going on from step {step}",
                    file=sys.stderr,
                )
        multihost.barrier("damaged states are out of the way")
        self._orbax.reload()


@dataclass(frozen=True)
class Survey:
    """What `survey` finds."""

    checksums: np.ndarray  # uint32, one for each array
    finite: bool  # all numbers in all of them


def survey(state) -> Survey:
    """A look at every number of a tree of arrays, on the devices where they are."""
    # One after another: collectives of several programs at once can wait for each other for ever on a CPU.
    leaves = jax.tree.leaves(state)
    checksums = [jax.device_get(_checksum(leaf)) for leaf in leaves]
    return Survey(np.array(checksums, np.uint32), all(bool(_is_finite(leaf)) for leaf in leaves))


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """A uint32 in which every bit counts: each word is multiplied by an odd number that depends on its place."""
    size = array.dtype.itemsize
    words = array if size == 1 else jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}"))
    return jnp.sum(words.astype(jnp.uint32) * (2 * flat_positions(array.shape) + 1), dtype=jnp.uint32)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what asyncio prints about the tasks that Orbax leaves behind when one fails."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, Exception) else hook(dropped)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


def _first_cause(error: BaseException) -> str:
    """What began a chain of exceptions."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return reason_of(error)


def _free(path: Path) -> Path:
    """The path, or with a number after it if there is something already."""
    paths = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(path for path in paths if not path.exists())
