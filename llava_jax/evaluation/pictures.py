"""The pictures of an evaluation: their sizes before any work, their tiles by processes ahead of the device."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from llava_jax.config import LlavaConfig
from llava_jax.errors import reason_of
from llava_jax.inference.batching import LoadedGroup
from llava_jax.inputs.groups import Group
from llava_jax.inputs.image import image_size, image_source, load_image, process_images
from llava_jax.inputs.sources import source_name
from llava_jax.inputs.types import ProcessedImage
from llava_jax.inputs.workers import WorkerDied, Workers

READERS = 32  # threads: an object store answers many requests at a time
WORKERS = 8  # processes, where there are so many cores
TEXT_ONLY = 16  # questions without a picture that share a prefix
AHEAD = 16  # groups whose pictures are being loaded while the device works

T = TypeVar("T")


class Shared(Protocol):
    """The pictures that questions share, before they are loaded; or none."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each, for which prompts and batches are planned."""

    @property
    def name(self) -> str:
        """What an error calls them."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that questions share, before it is loaded; or that they have none."""

    source: str | bytes | None  # what `load_image` takes
    sizes: tuple[tuple[int, int], ...] = ()  # its (width, height), or none
    error: str | None = None  # why it cannot be read

    @property
    def name(self) -> str:
        return source_name(self.source or b"")


def by_pictures(asked: Iterable[T], pictures: Callable[[T], Hashable]) -> list[list[T]]:
    """What is asked about the same pictures together; what is about none, whose key is None, a few together."""
    together: dict[Hashable, list[T]] = {}
    for one in asked:
        together.setdefault(pictures(one), []).append(one)
    without = together.pop(None, [])
    return [*together.values(), *(without[i : i + TEXT_ONLY] for i in range(0, len(without), TEXT_ONLY))]


def find_pictures(images: Iterable[str | bytes | None], folder: str) -> list[Picture]:
    """Each question's picture, in an image folder or wherever else it is, with the size that its file says."""

    def find(image: str | bytes | None) -> Picture:
        try:
            source = image_source(image, folder) if isinstance(image, str) else image
            return Picture(source, () if source is None else (image_size(source),))
        except (ValueError, OSError) as error:
            return Picture(image, error=str(error))

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(find, images))


def load_picture(config: LlavaConfig, rgb: bool, source) -> ProcessedImage:
    """One picture, as `load_image` takes it, as the original's evaluation programs see it: EXIF is ignored, `rgb` is
    the `Layout`'s. What is wrong with it is a ValueError."""
    try:
        image = load_image(source, exif=False, rgb=rgb)
    except OSError as error:
        raise ValueError(str(error)) from error
    try:
        (tiles,) = process_images([image], config)
        return ProcessedImage(tiles, image.size)
    except Exception as error:  # a mode that cannot be resized, or too little memory
        raise ValueError(f"{source_name(source)} cannot be made into tiles: {reason_of(error)}") from error


def load_pictures(config: LlavaConfig, rgb: bool, *sources) -> list[ProcessedImage]:
    """`load_picture` of each."""
    return [load_picture(config, rgb, source) for source in sources]


class LoadedOrLost(NamedTuple):
    """A group and its pictures, or what is wrong with one."""

    group: Group
    images: list[ProcessedImage] | ValueError


def load_ahead(groups: Iterable[Group], begin: Callable[[Any], Future | None]) -> Generator[LoadedOrLost]:
    """Each group with its pictures, which others load while `AHEAD` groups before it are worked on: once for all of
    those that ask about the same ones.

    begin: has the pictures of a group, a `Shared`, loaded; None where there are none.
    """
    waiting: deque[tuple[Group, Future | None]] = deque()
    for group in groups:
        same = next((future for other, future in waiting if other.images is group.images), None)
        waiting.append((group, same or begin(group.images)))
        if len(waiting) > AHEAD:
            yield _finish(*waiting.popleft())
    while waiting:
        yield _finish(*waiting.popleft())


@contextlib.contextmanager
def load_ahead_in_processes(
    config: LlavaConfig, rgb: bool, groups: Iterable[Group]
) -> Iterator[Iterator[LoadedOrLost]]:
    """`load_ahead` of groups whose images are a `Picture` each."""
    with Workers(partial(load_pictures, config, rgb), min(WORKERS, os.cpu_count() or 1)) as workers:
        yield load_ahead(groups, lambda picture: None if picture.source is None else workers.submit(picture.source))


def without_lost(
    loaded: Iterable[LoadedOrLost], lost: Callable[[Sequence[Any], ValueError], None]
) -> Iterator[LoadedGroup]:
    """The groups whose pictures could be read; `lost` is told the questions of the others, and why."""
    for group, images in loaded:
        if isinstance(images, ValueError):
            lost(group.questions, images)
        else:
            yield LoadedGroup(group, images)


def _finish(group: Group, future: Future | None) -> LoadedOrLost:
    return LoadedOrLost(group, [] if future is None else _result(group.images, future))


def _result(pictures: Shared, future: Future) -> list[ProcessedImage] | ValueError:
    try:
        images = future.result()
    except ValueError as error:
        return error
    except WorkerDied:
        return ValueError(f"{pictures.name}: the process that read it died, perhaps for memory")
    sizes = [image.size for image in images]
    if sizes != [*pictures.sizes]:  # others by now, or a file that says two things; the prompt is planned
        return ValueError(f"{pictures.name}: was {[*pictures.sizes]} (width, height) at first, and is {sizes} now")
    return images
