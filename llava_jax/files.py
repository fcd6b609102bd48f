"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from llava_jax.errors import reason_of


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that, whenever the process is killed, has all of its new content or all of the old."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # nothing is left on a full disk
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: epath.Path, content: bytes) -> None:
    """`write_atomically`, local or gs://, where an object appears whole anyway."""
    if is_local(path):
        write_atomically(Path(path), content)
    else:
        path.write_bytes(content)


@contextlib.contextmanager
def writing(path: epath.Path, remedy: str) -> Iterator[None]:
    """Whatever fails in this block is one OSError that names the file; object stores raise errors of their own."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path}: cannot be written ({reason_of(error)}); {remedy}") from error


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)
