"""The pictures of an evaluation: their sizes before any work, their tiles by processes ahead of the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from llava_jax.config import LlavaConfig
from llava_jax.errors import reason_of
from llava_jax.inputs.groups import PrefixBatch
from llava_jax.inputs.image import image_size, image_source, load_image, process_images
from llava_jax.inputs.sources import source_name
from llava_jax.inputs.types import ProcessedImage
from llava_jax.inputs.workers import WorkerDied, Workers

READERS = 32  # threads: an object store answers many requests at a time
WORKERS = 8  # processes, where there are so many cores
AHEAD = 2  # waves whose pictures are being loaded while the device works

Sizes = list[tuple[int, int]]  # (width, height) of a question's pictures, of which there are one or none


def picture_sizes(images: Sequence[str | bytes | None], folder: str) -> list[Sizes | ValueError]:
    """The sizes of each question's pictures, or what is wrong with its file."""

    def sizes(image):
        try:
            return [] if image is None else [image_size(_source(image, folder))]
        except (ValueError, OSError) as error:
            return ValueError(str(error))

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(sizes, images))


def _source(image: str | bytes, folder: str) -> str | bytes:
    return image_source(image, folder) if isinstance(image, str) else image


def load_picture(config: LlavaConfig, rgb: bool, source: str | bytes) -> ProcessedImage:
    """One picture, as the original's evaluation programs see it: EXIF is ignored.

    Args:
        rgb: convert to RGB before everything else, as the original's loader and vqa programs do, and its science and
            mmbench programs do not.

    Raises:
        ValueError: what is wrong with the picture.
    """
    try:
        image = load_image(source, exif=False, rgb=rgb)
    except OSError as error:
        raise ValueError(str(error)) from error
    try:
        (tiles,) = process_images([image], config)
        return ProcessedImage(tiles, image.size)
    except Exception as error:  # a mode that cannot be resized, or too little memory
        raise ValueError(f"{source_name(source)} cannot be made into tiles: {reason_of(error)}") from error


class Pictures:
    """Tiles of the waves' pictures, loaded by worker processes `AHEAD` waves before they are asked for.

    Args:
        images: of the questions, in the folder, as `picture_sizes` takes them.
        sizes: what it gave.
    """

    def __init__(
        self,
        config: LlavaConfig,
        rgb: bool,
        images: Sequence[str | bytes | None],
        folder: str,
        sizes: Sequence[Sizes | ValueError],
    ):
        self.images, self.folder, self.sizes = images, folder, sizes
        self.workers = Workers(partial(load_picture, config, rgb), min(WORKERS, os.cpu_count() or 1))

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_) -> None:
        self.workers.close()

    def of_waves(self, waves: Iterable[PrefixBatch]) -> Iterator[tuple[PrefixBatch, dict]]:
        """Each wave with {group.images: its pictures, one or none, or the ValueError of its picture}."""
        waiting: deque[tuple[PrefixBatch, dict[int, Future | None]]] = deque()
        for wave in waves:
            waiting.append((wave, {group.images: self._submit(group.images) for group in wave.groups}))
            if len(waiting) > AHEAD:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _submit(self, number: int) -> Future | None:
        image = self.images[number]
        return None if image is None else self.workers.submit(_source(image, self.folder))

    def _finish(self, wave: PrefixBatch, futures: dict[int, Future | None]):
        return wave, {number: self._result(number, future) for number, future in futures.items()}

    def _result(self, number: int, future: Future | None):
        image = self.images[number]
        if image is None or future is None:
            return []
        name = source_name(_source(image, self.folder))
        try:
            picture = future.result()
        except ValueError as error:
            return error
        except WorkerDied:
            return ValueError(f"{name}: the process that read it died, perhaps for memory")
        sizes = self.sizes[number]
        if [picture.size] != sizes:  # another picture by now, or a file that says two things; the prompt is planned
            return ValueError(f"{name}: was {sizes} (width, height) at first, and is {[picture.size]} now")
        return [picture]
