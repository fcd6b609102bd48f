"""The pictures of an evaluation: their sizes before any work, their tiles by processes ahead of the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from llava_jax.config import LlavaConfig
from llava_jax.errors import reason_of
from llava_jax.inputs.groups import Group
from llava_jax.inputs.image import image_size, image_source, load_image, process_images
from llava_jax.inputs.sources import source_name
from llava_jax.inputs.types import ProcessedImage
from llava_jax.inputs.workers import WorkerDied, Workers

READERS = 32  # threads: an object store answers many requests at a time
WORKERS = 8  # processes, where there are so many cores
AHEAD = 16  # groups whose pictures are being loaded while the device works


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that questions share, before it is loaded; or that they have none."""

    source: str | bytes | None  # what `load_image` takes
    sizes: tuple[tuple[int, int], ...] = ()  # its (width, height), for which prompts and batches are planned, or none
    error: str | None = None  # why it cannot be read


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


def load_picture(config: LlavaConfig, rgb: bool, source: str | bytes) -> ProcessedImage:
    """One picture, as the original's evaluation programs see it: EXIF is ignored, `rgb` is the `Layout`'s. What is
    wrong with it is a ValueError."""
    try:
        image = load_image(source, exif=False, rgb=rgb)
    except OSError as error:
        raise ValueError(str(error)) from error
    try:
        (tiles,) = process_images([image], config)
        return ProcessedImage(tiles, image.size)
    except Exception as error:  # a mode that cannot be resized, or too little memory
        raise ValueError(f"{source_name(source)} cannot be made into tiles: {reason_of(error)}") from error


class LoadedOrLost(NamedTuple):
    """A group and its pictures, or what is wrong with one."""

    group: Group
    images: list[ProcessedImage] | ValueError


def load_ahead(config: LlavaConfig, rgb: bool, groups: Iterable[Group]) -> Generator[LoadedOrLost]:
    """Each group with its picture, which processes load while `AHEAD` groups before it are worked on: once for all of
    those that ask about the same one."""
    waiting: deque[tuple[Group, Future | None]] = deque()
    with Workers(partial(load_picture, config, rgb), min(WORKERS, os.cpu_count() or 1)) as workers:
        for group in groups:
            source = group.images.source
            same = next((future for other, future in waiting if other.images is group.images), None)
            waiting.append((group, None if source is None else same or workers.submit(source)))
            if len(waiting) > AHEAD:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())


def _finish(group: Group, future: Future | None) -> LoadedOrLost:
    return LoadedOrLost(group, _result(group.images, future))


def _result(picture: Picture, future: Future | None) -> list[ProcessedImage] | ValueError:
    if picture.source is None or future is None:
        return []
    name = source_name(picture.source)
    try:
        image = future.result()
    except ValueError as error:
        return error
    except WorkerDied:
        return ValueError(f"{name}: the process that read it died, perhaps for memory")
    if (image.size,) != picture.sizes:  # another picture by now, or a file that says two things; the prompt is planned
        return ValueError(f"{name}: was {[*picture.sizes]} (width, height) at first, and is {[image.size]} now")
    return [image]
