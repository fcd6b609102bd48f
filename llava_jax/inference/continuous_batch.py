"""Continuous batching: requests come and go while others decode. The scheduler says what, and this has it done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, repeat
from typing import Any

import jax
import numpy as np

from llava_jax.inference.batch_shape import BatchShape, Block
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import ScoredTokens, activation_dtype
from llava_jax.inference.pool import Pool
from llava_jax.inference.prefix_filler import PrefixFiller, lane_slots
from llava_jax.inference.requests import Request, RowOptions, ScoreRequest, Token
from llava_jax.inference.rows import Chosen, Rows, row_settings
from llava_jax.inference.scheduler import (
    LOOKAHEAD,
    ActiveRequest,
    Admission,
    Living,
    Move,
    Scheduler,
    Scoring,
)
from llava_jax.inputs.groups import pack_questions


class ContinuousBatch:
    """The device's side of a batch of this shape, and the scheduler that fills it. One thread only."""

    def __init__(self, engine: Engine, params, shape: BatchShape):
        self.engine, self.params, self.shape = engine, params, shape
        self.config, self.programs = engine.config, engine.batch
        self.scheduler = Scheduler(engine.config, shape)
        self._unread: deque[Callable[[], None]] = deque()
        self._pools: list[Pool] = []
        self._rows: dict[Block, Rows] = {}
        self._filler = PrefixFiller(engine, params, self.scheduler, self._pools)
        self._allocate()

    def reset(self) -> None:
        """Begin anew with nothing, after a failure; whoever waits must have been told."""
        self._unread.clear()
        self._pools.clear()  # freed first
        self._rows.clear()
        self.scheduler = Scheduler(self.config, self.shape)
        self._filler = PrefixFiller(self.engine, self.params, self.scheduler, self._pools)
        self._allocate()

    def _allocate(self) -> None:
        shape, programs, dtype = self.shape, self.programs, activation_dtype(self.params)
        pools = [programs.empty_pool(shape.groups, pool.capacity, dtype) for pool in shape.pools]
        rows = {block: programs.empty_rows(shape.groups, *shape.row_class(block), dtype) for block in shape.blocks}
        if self.engine.mesh is None:  # bound to the device, as what programs make of them is: else they compile twice
            pools, rows = jax.device_put((pools, rows), jax.tree.leaves(self.params)[0].sharding)
        self._pools += pools
        self._rows |= rows

    # ---- for its owner

    @property
    def idle(self) -> bool:
        """Nothing is to be done until a request comes."""
        return self.scheduler.idle and not self._unread and not self._filler.busy

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Give the device what is next, and say what it has answered meanwhile: one chunk of decoding behind, but where
        only throughput counts and somebody waits for the rows of those who end in it.

        meanwhile: what is to be done while the device works.
        """
        self._filler.fill_some()
        for found in self.scheduler.admissions():
            self._score(found) if isinstance(found, Scoring) else self._admit(found)
        for move in self.scheduler.moves():
            self._move(move)
        decoding = self._decode()
        meanwhile()
        ahead = int(decoding and not (self.shape.chunk is None and self.scheduler.somebody_waits))
        while len(self._unread) > ahead:
            self._unread.popleft()()

    def to_compile(self) -> list[tuple[str, Callable[[], object]]]:
        """Everything that can be asked of it: (its name, what has it compiled by doing it with nothing to do).

        With `shape.chunk` None there is a program for every bucket of prefix lengths, and those are left out.
        """
        shape = self.shape
        nobody: list[Any] = [None] * shape.shards
        steps = self._filler.to_compile() if shape.chunk is not None else []
        for n, pool in enumerate(shape.pools):
            steps.append((f"scores after {pool.capacity} positions", partial(self._score, Scoring(n, nobody))))
            for row_class in range(1, len(pool.classes)):
                move = Move(Block(n, row_class - 1), 0, None)
                steps.append((f"moves after {pool.capacity} positions", partial(self._move, move)))
        for block in shape.blocks:
            name = f"{shape.row_class(block).slots} slots after {shape.pools[block.pool].capacity} positions"
            steps.append((f"questions, {name}", partial(self._admit, Admission(block, [[] for _ in nobody]))))
        alone = [[block] for block in shape.blocks if block.row_class == 0]
        for blocks in alone if alone == [shape.blocks] else [*alone, shape.blocks]:
            rows = sum(shape.groups * shape.row_class(block).rows for block in blocks)
            steps.append((f"decoding of {rows} rows", partial(self._decode_blocks, blocks, [])))
        return steps

    # ---- rows

    def _admit(self, admission: Admission) -> None:
        lanes, shards = admission.lanes, self.shape.shards
        count = self._admitted(max(map(len, lanes)))
        options, nobody = [[RowOptions(1)] * count for _ in range(shards)], self.shape.row_class(admission.block).rows
        row_ids = np.full((shards, count), nobody, np.int32)
        steps, lengths = np.zeros((shards, count), np.int32), np.zeros(shards, np.int32)
        questions = pack_questions([[a.question for a in lane] for lane in lanes], shards, count, self.shape.question)
        said = np.full((shards, count, self.shape.max_model_len), -1, np.int32)
        limits = np.ones((shards, count), np.int32)
        asked: list[tuple[ActiveRequest, int, tuple[int, int]]] = []
        for b, lane in enumerate(lanes):
            for r, active in enumerate(lane):
                row_ids[b, r], steps[b, r] = active.row, len(active.tokens)
                said[b, r, : len(active.tokens)] = active.tokens
                options[b][r], limits[b, r] = active.options, self.scheduler.limit_here(active)
                lengths[b] = active.key.length
                asked.append((active, active.epoch, (b, r)))
        settings = [row_settings(*pair) for row in zip(options, limits, strict=True) for pair in zip(*row, strict=True)]
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(shards, count, *np.shape(x[0])), *settings)
        slots = lane_slots(self.engine, self.shape, lanes, lambda lane: lane[0].slot.index)
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
        target, rows, active = move.source.following, self._rows, move.active
        shard = active.slot.shard if active and active.slot else None
        lanes = [active if n == shard else None for n in range(self.shape.shards)]
        targets = np.array([active.row if active else 0 for active in lanes], np.int32)
        limits = np.array([self.scheduler.limit_here(active) if active else 0 for active in lanes], np.int32)
        slots = lane_slots(self.engine, self.shape, lanes, lambda active: active.slot.index)
        sources, targets, limits = self.engine.place((np.full_like(targets, move.row), targets, limits))
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
        pools = sorted({block.pool for block in blocks})
        lengths = [np.array([slot.length for slot in self.scheduler.tables[n].slots], np.int32) for n in pools]
        of_pools = [[self._rows[block] for block in blocks if block.pool == n] for n in pools]
        left = max((self.scheduler.limit_here(row.active) - len(row.active.tokens) for row in living), default=1)
        most = 1 if self._filler.busy else self.shape.decode_steps  # then prefill has its next turn soon
        steps, leave = min(most, max(1, left)), self.scheduler.leave_after(len(living))
        rows, chosen, count = self.programs.decode(
            self.shape.decode_steps, self.params, [self._pools[n] for n in pools],
            self.engine.place(lengths), of_pools,
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
        slots = lane_slots(self.engine, self.shape, scoring.lanes, lambda active: active.slot.index)
        lengths = np.array([active.key.length if active else 0 for active in scoring.lanes], np.int32)
        parts = []
        for first in range(0, most, count):
            here = slice(first, first + count)
            rows = [
                [np.concatenate([active.question, candidate]) for candidate in active.scores.candidates[here]]
                if active
                else []
                for active in scoring.lanes
            ]
            questions = pack_questions(rows, shards, count, self.shape.question)
            pool = self._pools[scoring.pool]
            place = self.engine.place
            parts.append(self.programs.score(self.params, pool, shards, place(lengths), slots, place(questions)))
        self._unread.append(partial(self._read_scores, scoring, parts))

    def _read_scores(self, scoring: Scoring, parts: list[ScoredTokens]) -> None:
        logprobs, likeliest = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        for b, active in enumerate(scoring.lanes):
            if active is not None:
                candidates, starts = active.scores.candidates, active.scores.starts or repeat(0)
                own = [slice(start, len(ids)) for ids, start in zip(candidates, starts, strict=False)]
                sums = [row[ids].sum() for row, ids in zip(logprobs[b], own, strict=False)]
                greedy = [row[ids].all() for row, ids in zip(likeliest[b], own, strict=False)]
                self.scheduler.scored(active, np.array(sums, np.float32), np.array(greedy, bool))


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

    They are taken while the device works, and no more than may find a slot next: their pictures need not all be in
    memory.
    """
    source, scheduler = iter(requests), batch.scheduler

    def take() -> None:
        scheduler.place()
        while new := list(islice(source, max(0, LOOKAHEAD - len(scheduler.waiting)))):
            for request in new:
                scheduler.add(scheduler.check(request))
            scheduler.place()

    take()
    while not batch.idle:
        batch.step(meanwhile=take)
        yield
