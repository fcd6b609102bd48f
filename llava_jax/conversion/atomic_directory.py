"""An output directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llava_jax import checkpoint

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a quota, the largest file that is allowed


def check_output(output: Path) -> None:
    """FileExistsError unless nothing, or an empty directory, stands there."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if (output / checkpoint.MANIFEST).is_file():
        raise FileExistsError(f"{output}: converted already; delete it, or give another directory with --output")
    if output.exists():
        raise FileExistsError(f"{output}: exists and is not empty; give another directory with --output")


@contextlib.contextmanager
def new_directory(output: Path, nbytes: int) -> Iterator[Path]:
    """A temporary sibling that becomes `output` if the block succeeds, and is removed if it fails.

    It is locked, so that a second conversion into one place fails, and what a killed one left is known to be stale.

    Args:
        nbytes: how much will be written.

    Raises:
        FileExistsError: `output` is there, or another process is writing it.
        OSError: not enough disk space, now or part-way.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.converting"
    temporary.mkdir(exist_ok=True)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = temporary.is_dir() and os.path.samestat(os.fstat(handle), temporary.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise FileExistsError(
                f"{output}: another conversion is writing it; wait for that, or give another --output"
            )
        try:
            for stale in temporary.iterdir():
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            check_output(output)
            _check_space(output, nbytes)
            yield temporary
            check_output(output)
            temporary.rename(output)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; nothing is left of {output}") from error
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise OSError(
                    f"{output}: the disk became full ({os.strerror(error.errno)}); free {nbytes / 2**30:.1f} GiB, or "
                    "give another place with --output"
                ) from error
            raise
    finally:
        os.close(handle)


def _check_space(output: Path, nbytes: int) -> None:
    needed, free = nbytes + nbytes // 100 + (64 << 20), shutil.disk_usage(output.parent).free
    if free < needed:
        raise OSError(
            f"{output}: not enough disk space: {needed} bytes ({needed / 2**30:.1f} GiB) are needed, "
            f"{free} ({free / 2**30:.1f} GiB) are free; free some, or give another place with --output"
        )
