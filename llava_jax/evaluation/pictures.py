"""The pictures of an evaluation: their sizes before any work, their tiles by processes ahead of the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from llava_jax.config import LlavaConfig
from llava_jax.inputs.groups import Wave
from llava_jax.inputs.image import image_size, load_image, process_images
from llava_jax.inputs.workers import Workers

READERS = 32  # threads: an object store answers many requests at a time
WORKERS = 8  # processes, where there are so many cores
AHEAD = 2  # waves whose pictures are being loaded while the device works


def picture_source(image: str | bytes | None, folder: str) -> str | bytes | None:
    """What `load_image` takes: a question's image in its folder."""
    return os.path.join(folder, image) if isinstance(image, str) else image


def picture_sizes(sources: Sequence[str | bytes | None]) -> list[list[tuple[int, int]] | ValueError]:
    """For each picture its (width, height), in a list; for none an empty list; or what is wrong with its file."""

    def sizes(source):
        try:
            return [] if source is None else [image_size(source)]
        except (ValueError, OSError) as error:
            return ValueError(str(error))

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(sizes, sources))


def load_tiles(config: LlavaConfig, rgb: bool, source: str | bytes):
    """(tiles, sizes) of one picture, as the original's evaluation programs see it: EXIF is ignored.

    Args:
        rgb: convert to RGB before everything else, as the original's loader and vqa programs do, and its science and
            mmbench programs do not.
    """
    try:
        image = load_image(source, exif=False, rgb=rgb)
    except OSError as error:
        raise ValueError(str(error)) from error
    return process_images([image], config), [image.size]


class Pictures:
    """Tiles of the waves' pictures, loaded by worker processes `AHEAD` waves before they are asked for."""

    def __init__(self, config: LlavaConfig, rgb: bool, sources: Sequence[str | bytes | None]):
        self.sources = sources
        self.workers = Workers(partial(load_tiles, config, rgb), min(WORKERS, os.cpu_count() or 1))

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_) -> None:
        self.workers.close()

    def of_waves(self, waves: Iterable[Wave]) -> Iterator[tuple[Wave, dict]]:
        """Each wave with {group.images: (tiles, sizes) or the ValueError of its picture}."""
        waiting: deque[tuple[Wave, dict[int, Future | None]]] = deque()
        for wave in waves:
            waiting.append((wave, {group.images: self._submit(group.images) for group in wave.groups}))
            if len(waiting) > AHEAD:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _submit(self, number: int) -> Future | None:
        source = self.sources[number]
        return None if source is None else self.workers.submit(source)

    def _finish(self, wave: Wave, futures: dict[int, Future | None]):
        def result(future):
            try:
                return ([], []) if future is None else future.result()
            except ValueError as error:
                return error

        return wave, {number: result(future) for number, future in futures.items()}
