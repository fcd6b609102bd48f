"""Prefixes on their way into the slots of a pool: text and pictures embedded, then prefilled a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from llava_jax.inference.batch_shape import BatchShape
from llava_jax.inference.engine import Engine
from llava_jax.inference.pool import Pool
from llava_jax.inference.requests import SplitPrompt
from llava_jax.inference.scheduler import Fill, FillLane, Scheduler
from llava_jax.inputs.batch import PlacedImage, bucket_length, place_images

NEXT_CHUNK = 512  # positions of a prefix that are prefilled at once behind others, where all else is
SHORT_CHUNK = 4  # times as short is the chunk for a few words
TOWER_SHARE = 4  # of a picture's positions in the tower, as many as one in the decoder: roughly

NOTHING = SplitPrompt(np.zeros(0, np.int64), 0)  # of a lane without a prefix


def lane_slots(engine: Engine, shape: BatchShape, lanes: Iterable, index: Callable) -> jax.Array | np.ndarray:
    """int32 [B]: of each lane; one behind the last slot where there is nothing to do."""
    found = [index(lane) if lane else None for lane in lanes]
    return engine.place(np.array([shape.per_shard if i is None else i for i in found], np.int32))


class Chunk(NamedTuple):
    """Positions of lanes, int32 [B], that are prefilled side by side."""

    size: int
    starts: np.ndarray
    begins: np.ndarray  # before `starts`, where it would else go beyond the capacity: then some are prefilled again


class PrefixFiller:
    """Fills slots of the pools, which it replaces in their list, as the scheduler says."""

    def __init__(self, engine: Engine, params, scheduler: Scheduler, pools: list[Pool]):
        self.engine, self.params, self.shape, self.pools = engine, params, scheduler.shape, pools
        self._scheduler = scheduler
        self.config, self.programs = engine.config, engine.batch
        self._filling: Iterator[None] | None = None
        self._spent = 0  # positions that were prefilled in this step

    @property
    def busy(self) -> bool:
        """There is more of what was begun."""
        return self._filling is not None

    def fill_some(self) -> None:
        """Prefill a chunk's worth of positions; or all that there are to prefill, if no stream waits for its tokens."""
        self._spent = 0
        while True:
            if self._filling is None:
                fill = self._scheduler.next_fill()
                if fill is None:
                    return
                self._filling = self._pieces(fill)
            for _ in self._filling:
                return
            self._filling = None

    def to_compile(self) -> list[tuple[str, Callable[[], object]]]:
        """As `ContinuousBatch.to_compile`; in this order, once."""
        shape, place, programs = self.shape, self.engine.place, self.programs
        last, nothing = len(shape.pools) - 1, place(np.zeros(shape.shards, np.int32))
        nowhere = lane_slots(self.engine, shape, [None] * shape.shards, lambda lane: 0)
        text = np.zeros((shape.shards, shape.pools[last].capacity), np.int32)
        side, most = self.config.tile_size, self.config.max_tiles_per_image
        tiles = np.zeros((shape.shards * most, side, side, 3), np.uint8)
        kept: list[jax.Array] = []

        def pictures() -> None:
            embeds = programs.embed_text(self.params, place(text))
            kept.append(programs.place_image(self.params, embeds, place(tiles), place(np.full_like(text, -1))))

        def first_chunk(n: int, size: int) -> None:
            self.pools[n] = programs.prefill_first(size, self.params, self.pools[n], kept[0], nowhere, nothing)

        def next_chunk(n: int, size: int) -> None:
            pool = programs.prefill_next(size, self.params, self.pools[n], kept[0], nowhere, nothing, nothing)
            self.pools[n] = programs.copy_slot(pool, shape.shards, nothing, nowhere)

        steps: list[tuple[str, Callable[[], object]]] = [("pictures", pictures)]
        for n, pool in enumerate(shape.pools):
            for size in self._first_sizes(pool.capacity):
                steps.append((f"prefill of {size} of {pool.capacity} positions", partial(first_chunk, n, size)))
        for size in self._next_sizes(shape.pools[last].capacity):
            steps.append((f"prefill of {size} later positions", partial(next_chunk, last, size)))
        return steps

    def _take_turn(self, positions: int) -> Iterator[None]:
        """Before so many positions are prefilled: yields if this step has had its share, and streams wait."""
        chunk = self.shape.chunk
        if chunk is not None and self._spent and self._spent + positions > chunk and self._scheduler.running:
            yield
        self._spent += positions

    def _pieces(self, fill: Fill) -> Iterator[None]:
        """Prefill the lanes' prefixes; yields where it may be left for the next step."""
        lanes, pool = fill.lanes, fill.pool
        if any(lane and lane.source for lane in lanes):
            sources = lane_slots(self.engine, self.shape, lanes, lambda lane: lane.source and lane.source.index)
            targets = lane_slots(self.engine, self.shape, lanes, lambda lane: lane.source and lane.slot.index)
            self.pools[pool] = self.programs.copy_slot(self.pools[pool], self.shape.shards, sources, targets)
        starts = np.array([lane.start if lane else 0 for lane in lanes], np.int32)
        lengths = np.array([lane.slot.length if lane else 0 for lane in lanes], np.int32)
        if (starts < lengths).any():
            chunks = self._chunks(starts, lengths, self.shape.pools[pool].capacity)
            embeds = yield from self._embed(lanes, np.min([chunk.begins for chunk in chunks], axis=0))
            yield from self._prefill(pool, lanes, embeds, lengths, chunks)
        self._scheduler.filled(fill)

    def _embed(self, lanes: list[FillLane | None], begins: np.ndarray) -> Generator[None, None, jax.Array]:
        """The prefixes' embeddings [B, P, E], one picture at a time, those aside that end before `begins`, int [B]."""
        config, capacity = self.config, self.shape.pools[-1].capacity
        text = np.zeros((len(lanes), capacity), np.int32)
        pictures: list[list[PlacedImage]] = []  # of each lane
        for b, lane in enumerate(lanes):
            prompt = lane.prompt if lane else NOTHING
            placed = place_images(prompt.ids[: prompt.shared], prompt.images, config)
            text[b, : len(placed.text_ids)] = placed.text_ids
            pictures.append([image for image in placed.images if image.end > begins[b]])
        embeds = self.programs.embed_text(self.params, self.engine.place(text))
        most = config.max_tiles_per_image
        for n in range(max(map(len, pictures))):
            yield from self._take_turn(most * config.tokens_per_tile // TOWER_SHARE)
            tiles = np.zeros((len(lanes), most, config.tile_size, config.tile_size, 3), np.uint8)
            indices = np.full(text.shape, -1, np.int32)
            for b, images in enumerate(pictures):
                if n < len(images):
                    image = images[n]
                    tiles[b, : len(image.tiles)] = image.tiles
                    indices[b, image.start : image.end] = image.rows
            flat = self.engine.place(tiles.reshape(-1, *tiles.shape[2:]))
            embeds = self.programs.place_image(self.params, embeds, flat, self.engine.place(indices))
        return embeds

    def _chunks(self, starts: np.ndarray, lengths: np.ndarray, capacity: int) -> list[Chunk]:
        """What is prefilled of lanes, int32 [B], that are filled as far as their starts."""
        chunks, sizes, longest = [], self._next_sizes(capacity), self.shape.pools[-1].capacity
        if not starts.any():
            size = self._first_size(int(lengths.max()), capacity)
            chunks.append(Chunk(size, starts, starts))
            starts = starts + size
        while (starts < lengths).any():
            left = int((lengths - starts).max())
            size = next((size for size in sizes if size >= left), sizes[-1])
            chunks.append(Chunk(size, starts, np.minimum(starts, longest - size)))
            starts = starts + size
        return chunks

    def _prefill(self, pool: int, lanes, embeds, lengths: np.ndarray, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Prefill what is missing of each lane."""
        place = self.engine.place
        for n, (size, starts, _) in enumerate(chunks):
            yield from self._take_turn(size)
            missing = [
                lane if start < length else None for lane, start, length in zip(lanes, starts, lengths, strict=True)
            ]
            slots = lane_slots(self.engine, self.shape, missing, lambda lane: lane.slot.index)
            given = size, self.params, self.pools[pool], embeds, slots
            if n == 0 and not starts.any():
                self.pools[pool] = self.programs.prefill_first(*given, place(lengths))
            else:
                at = np.minimum(starts, lengths).astype(np.int32)
                self.pools[pool] = self.programs.prefill_next(*given, place(at), place(lengths))

    def _first_size(self, longest: int, capacity: int) -> int:
        """Positions of a first chunk of prefixes of up to `longest`: what is served has two sizes."""
        if self.shape.chunk is None:
            return min(bucket_length(longest, self.config), capacity)
        return next(size for size in self._first_sizes(capacity) if size >= min(longest, self.shape.chunk))

    def _first_sizes(self, capacity: int) -> list[int]:
        chunk = min(self.shape.chunk or 0, capacity)
        return [chunk // SHORT_CHUNK, chunk] if capacity == self.shape.pools[0].capacity else [chunk]

    def _next_sizes(self, capacity: int) -> list[int]:
        """Positions of a chunk behind others: what is served has a short one, for the next turn of a chat."""
        size = min(self.shape.chunk or NEXT_CHUNK, capacity)
        return [size] if self.shape.chunk is None else [size // SHORT_CHUNK, size]
