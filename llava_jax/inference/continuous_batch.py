"""A wave that never ends: requests come and go while others decode. The scheduler says what, and this has it done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import jax
import numpy as np

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.batch_shape import BatchShape, Block
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import activation_dtype
from llava_jax.inference.pool import Pool
from llava_jax.inference.requests import Request, RowOptions, ScoreRequest, Token
from llava_jax.inference.rows import Chosen, Rows, row_settings
from llava_jax.inference.scheduler import (
    ActiveRequest,
    Admission,
    Fill,
    FillLane,
    Living,
    Move,
    Scheduler,
    Scoring,
)
from llava_jax.inputs.anyres import NEWLINE, image_index
from llava_jax.inputs.batch import bucket_length
from llava_jax.inputs.types import Questions

NEXT_CHUNK = 512  # positions of a prefix that are prefilled at once behind others, where all else is
SHORT_CHUNK = 4  # times as short is the chunk for prefixes of a few words
TOWER_SHARE = 4  # of a picture's positions in the tower, as many as one in the decoder: roughly


class ContinuousBatch:
    """The device's side of a batch of this shape, and the scheduler that fills it. One thread only."""

    def __init__(self, engine: Engine, params, shape: BatchShape):
        self.engine, self.params, self.shape = engine, params, shape
        self.config, self.programs = engine.config, engine.batch
        self.scheduler = Scheduler(engine.config, shape)
        self._filling: Iterator[None] | None = None
        self._spent = 0  # positions that were prefilled in this step
        self._unread: deque[Callable[[], None]] = deque()
        self._pools: list[Pool] = []
        self._rows: dict[Block, Rows] = {}
        self._allocate()

    def reset(self) -> None:
        """Begin anew with nothing, after a failure; whoever waits must have been told."""
        self._filling = None
        self._unread.clear()
        self._pools.clear()  # freed first
        self._rows.clear()
        self.scheduler = Scheduler(self.config, self.shape)
        self._allocate()

    def _allocate(self) -> None:
        shape, programs, dtype = self.shape, self.programs, activation_dtype(self.params)
        pools = [programs.empty_pool(shape.groups, pool.capacity, dtype) for pool in shape.pools]
        rows = {block: programs.empty_rows(shape.groups, *shape.row_class(block), dtype) for block in shape.blocks}
        if self.engine.mesh is None:  # bound to the device, as what programs make of them is: else they compile twice
            pools, rows = jax.device_put((pools, rows), jax.tree.leaves(self.params)[0].sharding)
        self._pools, self._rows = pools, rows

    # ---- for its owner

    @property
    def idle(self) -> bool:
        """Nothing is to be done until a request comes."""
        return self.scheduler.idle and not self._unread and self._filling is None

    def step(self) -> None:
        """Give the device what is next, and say what it has answered meanwhile: one chunk of decoding behind, but where
        only throughput counts and somebody waits for the rows of those who end in it."""
        self._fill_some()
        for found in self.scheduler.admissions():
            self._score(found) if isinstance(found, Scoring) else self._admit(found)
        for move in self.scheduler.moves():
            self._move(move)
        decoding = self._decode()
        ahead = int(decoding and not (self.shape.chunk is None and self.scheduler.somebody_waits))
        while len(self._unread) > ahead:
            self._unread.popleft()()

    def to_compile(self) -> list[tuple[str, Callable[[], object]]]:
        """Everything that can be asked of it: (its name, what has it compiled by doing it with nothing to do).

        With `shape.chunk` None there is a program for every bucket of prefix lengths, and those are left out.
        """
        shape, place, programs = self.shape, self.engine.place, self.programs
        nobody: list[Any] = [None] * shape.shards
        last, nothing = len(shape.pools) - 1, place(np.zeros(shape.shards, np.int32))
        nowhere = self._slots(nobody, lambda lane: 0)
        text = np.zeros((shape.shards, shape.pools[last].capacity), np.int32)
        side, most = self.config.tile_size, self.config.max_tiles_per_image
        tiles = np.zeros((shape.shards * most, side, side, 3), np.uint8)
        kept: list[jax.Array] = []

        def pictures() -> None:
            embeds = programs.embed_text(self.params, place(text))
            kept.append(programs.place_image(self.params, embeds, place(tiles), place(np.full_like(text, -1))))

        def first_chunk(n: int, size: int) -> None:
            self._pools[n] = programs.prefill_first(size, self.params, self._pools[n], kept[0], nowhere, nothing)

        def next_chunk(n: int) -> None:
            size = self._next_size(shape.pools[n].capacity)
            pool = programs.prefill_next(size, self.params, self._pools[n], kept[0], nowhere, nothing, nothing)
            self._pools[n] = programs.copy_slot(pool, shape.shards, nothing, nowhere)

        steps: list[tuple[str, Callable[[], object]]] = [("pictures", pictures)]
        for n, pool in enumerate(shape.pools):
            for size in self._first_sizes(pool.capacity) if shape.chunk is not None else ():
                steps.append((f"prefill of {size} of {pool.capacity} positions", partial(first_chunk, n, size)))
            if shape.chunk is not None and n == last:
                steps.append(("prefill of later chunks", partial(next_chunk, n)))
            steps.append((f"scores after {pool.capacity} positions", partial(self._score, Scoring(n, nobody))))
            for row_class in range(1, len(pool.classes)):
                move = Move(Block(n, row_class - 1), nobody, [0] * shape.shards)
                steps.append((f"moves after {pool.capacity} positions", partial(self._move, move)))
        for block in shape.blocks:
            name = f"{shape.row_class(block).slots} slots after {shape.pools[block.pool].capacity} positions"
            steps.append((f"questions, {name}", partial(self._admit, Admission(block, [[] for _ in nobody]))))
        alone = [[block] for block in shape.blocks if block.row_class == 0]
        for blocks in alone if alone == [shape.blocks] else [*alone, shape.blocks]:
            rows = sum(shape.groups * shape.row_class(block).rows for block in blocks)
            steps.append((f"decoding of {rows} rows", partial(self._decode_blocks, blocks, [])))
        return steps

    # ---- prefixes

    def _fill_some(self) -> None:
        """Prefill a chunk's worth of positions; or all that there are to prefill, if no stream waits for its tokens."""
        self._spent = 0
        while True:
            if self._filling is None:
                fill = self.scheduler.next_fill()
                if fill is None:
                    return
                self._filling = self._pieces(fill)
            for _ in self._filling:
                return
            self._filling = None

    def _take_turn(self, positions: int) -> Iterator[None]:
        """Before so many positions are prefilled: yields if this step has had its share, and streams wait."""
        chunk = self.shape.chunk
        if chunk is not None and self._spent and self._spent + positions > chunk and self.scheduler.running:
            yield
        self._spent += positions

    def _pieces(self, fill: Fill) -> Iterator[None]:
        """Prefill the lanes' prefixes; yields where it may be left for the next step."""
        lanes, pool = fill.lanes, fill.pool
        if any(lane and lane.source for lane in lanes):
            sources = self._slots(lanes, lambda lane: lane.source and lane.source.index)
            targets = self._slots(lanes, lambda lane: lane.source and lane.slot.index)
            self._pools[pool] = self.programs.copy_slot(self._pools[pool], self.shape.shards, sources, targets)
        starts = [lane.start if lane else 0 for lane in lanes]
        lengths = np.array([lane.key.length if lane else 0 for lane in lanes], np.int32)
        if any(start < length for start, length in zip(starts, lengths, strict=True)):
            embeds = yield from self._embed(lanes)
            yield from self._chunks(pool, lanes, embeds, np.array(starts, np.int32), lengths)
        self.scheduler.filled(fill)

    def _embed(self, lanes: list[FillLane | None]) -> Generator[None, None, jax.Array]:
        """The prefixes' embeddings [B, P, E], one picture at a time."""
        config, capacity = self.config, self.shape.pools[-1].capacity
        last_chunk = capacity - self._next_size(capacity)  # where one begins that would go beyond the capacity
        text = np.zeros((len(lanes), capacity), np.int32)
        pictures: list[list[tuple[int, np.ndarray, np.ndarray]]] = []  # of each lane: where it starts, index, tiles
        for b, lane in enumerate(lanes):
            placed, position, image = [], 0, 0
            for token in [] if lane is None else lane.prompt.ids[: lane.prompt.shared].tolist():
                if token != IMAGE_TOKEN_INDEX:
                    text[b, position] = token
                    position += 1
                    continue
                shown = lane.prompt.images[image]  # type: ignore[union-attr]
                index = image_index(shown.size, config)
                if position + len(index) > min(lane.start, last_chunk):  # type: ignore[union-attr]
                    placed.append((position, index, shown.tiles))
                position, image = position + len(index), image + 1
            pictures.append(placed)
        embeds = self.programs.embed_text(self.params, self.engine.place(text))
        most, newline = config.max_tiles_per_image, config.max_tiles_per_image * config.tokens_per_tile
        for n in range(max(map(len, pictures))):
            yield from self._take_turn(most * config.tokens_per_tile // TOWER_SHARE)
            tiles = np.zeros((len(lanes), most, config.tile_size, config.tile_size, 3), np.uint8)
            indices = np.full(text.shape, -1, np.int32)
            for b, placed in enumerate(pictures):
                if n < len(placed):
                    position, index, shown = placed[n]
                    tiles[b, : len(shown)] = shown
                    indices[b, position : position + len(index)] = np.where(index == NEWLINE, newline, index)
            flat = self.engine.place(tiles.reshape(-1, *tiles.shape[2:]))
            embeds = self.programs.place_image(self.params, embeds, flat, self.engine.place(indices))
        return embeds

    def _chunks(self, pool: int, lanes, embeds, starts: np.ndarray, lengths: np.ndarray) -> Iterator[None]:
        """Prefill what is missing of each lane, from its start on."""
        capacity = self.shape.pools[pool].capacity
        if not starts.any():
            size = self._first_size(int(lengths.max()), capacity)
            yield from self._take_turn(size)
            slots = self._slots(lanes, lambda lane: lane.slot.index)
            self._pools[pool] = self.programs.prefill_first(
                size, self.params, self._pools[pool], embeds, slots, self.engine.place(lengths)
            )
            starts = starts + size
        size = self._next_size(capacity)
        while (starts < lengths).any():
            yield from self._take_turn(size)
            behind = [
                lane if start < length else None for lane, start, length in zip(lanes, starts, lengths, strict=True)
            ]
            slots = self._slots(behind, lambda lane: lane.slot.index)
            self._pools[pool] = self.programs.prefill_next(
                size,
                self.params,
                self._pools[pool],
                embeds,
                slots,
                self.engine.place(np.minimum(starts, lengths).astype(np.int32)),
                self.engine.place(lengths),
            )
            starts = starts + size

    def _first_size(self, longest: int, capacity: int) -> int:
        """Positions of a first chunk of prefixes of up to `longest`: what is served has two sizes."""
        if self.shape.chunk is None:
            return min(bucket_length(longest, self.config), capacity)
        return next(size for size in self._first_sizes(capacity) if size >= min(longest, self.shape.chunk))

    def _first_sizes(self, capacity: int) -> list[int]:
        chunk = min(self.shape.chunk or 0, capacity)
        return [chunk // SHORT_CHUNK, chunk] if capacity == self.shape.pools[0].capacity else [chunk]

    def _next_size(self, capacity: int) -> int:
        """Positions of a chunk behind others."""
        return min(self.shape.chunk or NEXT_CHUNK, capacity)

    def _slots(self, lanes: Iterable, index: Callable) -> jax.Array | np.ndarray:
        """int32 [B]: of each lane; one behind the last slot where there is nothing to do."""
        found = [index(lane) if lane else None for lane in lanes]
        return self.engine.place(np.array([self.shape.per_shard if i is None else i for i in found], np.int32))

    # ---- rows

    def _admit(self, admission: Admission) -> None:
        lanes, shards = admission.lanes, self.shape.shards
        count = self._admitted(max(map(len, lanes)))
        options, nobody = [[RowOptions(1)] * count for _ in range(shards)], self.shape.row_class(admission.block).rows
        row_ids = np.full((shards, count), nobody, np.int32)
        steps, lengths = np.zeros((shards, count), np.int32), np.zeros(shards, np.int32)
        ids = np.zeros((shards, count, self.shape.question), np.int32)
        questions = Questions(ids, np.ones((shards, count), np.int32), np.zeros((shards, count), bool))
        said = np.full((shards, count, self.shape.max_model_len), -1, np.int32)
        limits = np.ones((shards, count), np.int32)
        asked: list[tuple[ActiveRequest, int, tuple[int, int]]] = []
        for b, lane in enumerate(lanes):
            for r, active in enumerate(lane):
                question, tokens = active.question, active.tokens
                ids[b, r, : len(question)], questions.lengths[b, r] = question, len(question)
                questions.active[b, r], row_ids[b, r], steps[b, r] = True, active.row, len(tokens)
                said[b, r, : len(tokens)] = tokens
                options[b][r], limits[b, r] = active.options, self.scheduler.limit_here(active)
                lengths[b] = active.key.length
                asked.append((active, active.epoch, (b, r)))
        settings = [row_settings(*pair) for row in zip(options, limits, strict=True) for pair in zip(*row, strict=True)]
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(shards, count, *np.shape(x[0])), *settings)
        slots = self._slots(lanes, lambda lane: lane[0].slot.index)
        pool = self._pools[admission.block.pool]
        place = self.engine.place
        self._rows[admission.block], chosen = self.programs.admit(
            self.params, pool, place(lengths), self._rows[admission.block], slots, place(row_ids), place(questions),
            place(stacked), place(steps), place(said),
        )  # fmt: skip
        self._unread.append(partial(self._read_first, chosen, asked))

    def _admitted(self, most: int) -> int:
        """Rows of an admission of up to `most`: 1, 4, 16, … or `shape.admitted`, so that there are few programs."""
        count = 1
        while count < most:
            count *= 4
        return min(count, self.shape.admitted)

    def _read_first(self, chosen: Chosen, asked) -> None:
        read = _Read(chosen, any(active.options.top_logprobs is not None for active, _, _ in asked))
        for active, epoch, place in asked:
            self.scheduler.said(active, epoch, [read.token(place, active.options)])

    def _move(self, move: Move) -> None:
        target = Block(move.source.pool, move.source.row_class + 1)
        lanes, rows = move.lanes, self._rows
        targets = np.array([active.row if active else 0 for active in lanes], np.int32)
        limits = np.array([self.scheduler.limit_here(active) if active else 0 for active in lanes], np.int32)
        slots = self._slots(lanes, lambda active: active.slot.index)
        sources, targets, limits = self.engine.place((np.array(move.rows, np.int32), targets, limits))
        rows[move.source], rows[target] = self.programs.move(
            rows[move.source], rows[target], self.shape.shards, slots, sources, targets, limits
        )

    def _decode(self) -> bool:
        """Ask for the next tokens of all rows that decode, if there are any."""
        living = self.scheduler.living()
        if living:
            self._decode_blocks(self._blocks({row.block for row in living}), living)
        return bool(living)

    def _decode_blocks(self, blocks: list[Block], living: list[Living]) -> None:
        active = {block: np.zeros((self.shape.groups, self.shape.row_class(block).rows), bool) for block in blocks}
        for row in living:
            active[row.block][row.group, row.row] = True
        lengths = [
            np.array([slot.length for slot in self.scheduler.tables[block.pool].slots], np.int32) for block in blocks
        ]
        left = max((self.scheduler.limit_here(row.active) - len(row.active.tokens) for row in living), default=1)
        most = 1 if self._filling is not None else self.shape.decode_steps  # then prefill has its next turn soon
        steps, leave = min(most, max(1, left)), self.scheduler.leave_after(len(living))
        rows, chosen, count = self.programs.decode(
            self.shape.decode_steps, self.params, [self._pools[block.pool] for block in blocks],
            self.engine.place(lengths), [self._rows[block] for block in blocks],
            self.engine.place([active[block] for block in blocks]), np.int32(steps), np.int32(leave),
        )  # fmt: skip
        self._rows |= zip(blocks, rows, strict=True)
        self._unread.append(partial(self._read_decoded, blocks, living, chosen, count))

    def _blocks(self, needed: set[Block]) -> list[Block]:
        """Those that decode together: one of short rows alone, or all, so that few programs serve every mix."""
        alone = len(needed) == 1 and next(iter(needed)).row_class == 0
        return list(needed) if alone else self.shape.blocks

    def _read_decoded(self, blocks: list[Block], living: list[Living], chosen: Chosen, count) -> None:
        widths = [self.shape.row_class(block).rows for block in blocks]
        starts = {block: sum(widths[:n]) for n, block in enumerate(blocks)}
        read = _Read(chosen, any(row.active.options.top_logprobs is not None for row in living))
        for row in living:
            places = [(step, row.group, starts[row.block] + row.row) for step in range(int(count))]
            tokens = [read.token(place, row.active.options) for place in places]
            self.scheduler.said(row.active, row.epoch, tokens)

    # ---- scores

    def _score(self, scoring: Scoring) -> None:
        shards, count = self.shape.shards, self.shape.admitted
        most = max((len(active.scores.candidates) for active in scoring.lanes if active), default=1)
        slots = self._slots(scoring.lanes, lambda active: active.slot.index)
        lengths = np.array([active.key.length if active else 0 for active in scoring.lanes], np.int32)
        parts = []
        for first in range(0, most, count):
            ids = np.zeros((shards, count, self.shape.question), np.int32)
            questions = Questions(ids, np.ones((shards, count), np.int32), np.zeros((shards, count), bool))
            for b, active in enumerate(scoring.lanes):
                for r, candidate in enumerate(active.scores.candidates[first : first + count] if active else ()):
                    row = np.concatenate([active.question, candidate])  # type: ignore[union-attr]
                    ids[b, r, : len(row)], questions.lengths[b, r], questions.active[b, r] = row, len(row), True
            pool = self._pools[scoring.pool]
            place = self.engine.place
            parts.append(self.programs.score(self.params, pool, shards, place(lengths), slots, place(questions)))
        self._unread.append(partial(self._read_scores, scoring, parts))

    def _read_scores(self, scoring: Scoring, parts: list[jax.Array]) -> None:
        logprobs = np.concatenate([np.asarray(part) for part in parts], axis=1)
        for b, active in enumerate(scoring.lanes):
            if active is not None:
                candidates, starts = active.scores.candidates, active.scores.starts or repeat(0)
                rows = zip(logprobs[b], candidates, starts, strict=False)
                sums = [row[start : len(candidate)].sum() for row, candidate, start in rows]
                self.scheduler.scored(active, np.array(sums, np.float32))


class _Read:
    """What was chosen, on the host; the log-probabilities only where somebody asked for them."""

    def __init__(self, chosen: Chosen, logprobs: bool):
        self._tokens = np.asarray(chosen.tokens)
        names = ("logprobs", "top_ids", "top_logprobs") if logprobs else ()
        self._arrays = {name: np.asarray(getattr(chosen, name)) for name in names}

    def token(self, place: tuple[int, ...], options: RowOptions) -> Token:
        token = int(self._tokens[place])
        if options.top_logprobs is None:
            return Token(token)
        ids, values = self._arrays["top_ids"][place], self._arrays["top_logprobs"][place]
        top = tuple(zip(ids[: options.top_logprobs].tolist(), values[: options.top_logprobs].tolist(), strict=True))
        return Token(token, float(self._arrays["logprobs"][place]), top)


def run(batch: ContinuousBatch, requests: Iterable[Request | ScoreRequest]) -> Iterator[None]:
    """Answer them all, in about this order; yields now and then, when some may have been answered.

    They are taken until one finds no slot, so that their pictures need not all be in memory.
    """
    source, scheduler = iter(requests), batch.scheduler
    while True:
        while not scheduler.waiting and (request := next(source, None)) is not None:
            scheduler.add(scheduler.check(request))
            scheduler.place()
        if batch.idle:
            return
        batch.step()
        yield
