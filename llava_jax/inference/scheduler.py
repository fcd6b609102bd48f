"""Who is prefilled, who decodes, what is given up: the host's side of a continuous batch. It looks at no device array.

A request waits for a slot of a pool that holds its prefix, then for one of the slot's rows, then decodes there. What
is returned here must be done in the order in which it was returned; the device may be behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import BatchShape, Block
from llava_jax.inference.prefix_table import PrefixKey, PrefixSlot, PrefixTable, prefix_key
from llava_jax.inference.requests import (
    Finish,
    Request,
    RowOptions,
    ScoreRequest,
    Scores,
    SplitPrompt,
    Stopped,
    Token,
    Update,
)

LOOKAHEAD = 64  # waiting requests that are looked at for a slot
MOST_OVERTAKEN = 32  # requests that may find a slot before the one that has waited longest


@dataclass(eq=False)
class ActiveRequest:
    """A request on its way."""

    request: Request | ScoreRequest
    prompt: SplitPrompt  # its answer so far included, if it was preempted
    key: PrefixKey  # of the prompt's prefix
    emit: Callable  # the request's
    limit: int = 0  # new tokens at most
    tokens: list[int] = field(default_factory=list)  # new ones, as far as they were read
    slot: PrefixSlot | None = None
    block: Block | None = None
    row: int = 0
    cached: int = 0  # positions that were found in the pool
    epoch: int = 0  # counts its rows: what an earlier one still says is not said of it
    overtaken: int = 0
    ended: bool = False

    @property
    def options(self) -> RowOptions:
        """Of a request for an answer."""
        assert isinstance(self.request, Request)
        return self.request.options

    @property
    def scores(self) -> ScoreRequest:
        """The request, if it is for scores."""
        assert isinstance(self.request, ScoreRequest)
        return self.request

    @property
    def question(self) -> np.ndarray:
        """The ids behind the prefix."""
        return self.prompt.ids[self.prompt.shared :]

    @property
    def steps(self) -> int:
        """New tokens that the prompt holds already."""
        return len(self.prompt.ids) - len(self.request.prompt.ids)


class FillLane(NamedTuple):
    """A prefix on its way into a slot."""

    slot: PrefixSlot
    prompt: SplitPrompt
    start: int  # so many positions are there already, or once the source is copied
    source: PrefixSlot | None


class Fill(NamedTuple):
    """Prefixes of one pool that are prefilled side by side, at most one in each shard."""

    pool: int
    lanes: list[FillLane | None]


class Admission(NamedTuple):
    """Questions that get their rows: in each shard those of one slot."""

    block: Block
    lanes: list[list[ActiveRequest]]


class Scoring(NamedTuple):
    """Requests whose candidates are scored: in each shard one."""

    pool: int
    lanes: list[ActiveRequest | None]


class Move(NamedTuple):
    """A row that goes on among the following block's."""

    source: Block
    row: int  # where it was
    active: ActiveRequest | None  # in its new place; None: nothing moves


class Living(NamedTuple):
    """A row that decodes, as it is when it is asked to."""

    active: ActiveRequest
    epoch: int
    block: Block
    group: int
    row: int


class Scheduler:
    """What a continuous batch of this shape does next.

    Attributes:
        preemptions: answers that were put back to be prefilled again with what they had.
        queried, hit: positions of prefixes that were asked for, and those that were found.
    """

    def __init__(self, config: LlavaConfig, shape: BatchShape):
        self.config, self.shape = config, shape
        last, grows = len(shape.pools) - 1, shape.chunk is not None
        self.tables = [
            PrefixTable(shape.shards, shape.per_shard, [c.rows for c in pool.classes], grows and n == last, not grows)
            for n, pool in enumerate(shape.pools)
        ]
        self.waiting: deque[ActiveRequest] = deque()  # for a slot
        self.placed: list[ActiveRequest] = []  # for the slot to be filled, and for a row
        self.running: list[ActiveRequest] = []
        self.outgrown: list[ActiveRequest] = []  # of the running: for a longer row
        self.scoring: list[ActiveRequest] = []
        self._fills: deque[tuple[int, FillLane]] = deque()
        self.preemptions = self.queried = self.hit = 0

    # ---- in and out

    def check(self, request: Request | ScoreRequest) -> ActiveRequest:
        """A request, ready to be added. ValueError if it does not fit the batch's shape."""
        prompt, most = request.prompt, self.shape.max_model_len
        if isinstance(request, ScoreRequest):
            prompt = prompt._replace(shared=len(prompt.ids) - 1)  # so that most is left to the candidates
        key, behind = prefix_key(prompt, self.config), len(prompt.ids) - prompt.shared
        length, limit = key.length + behind, 0  # all images are in the prefix
        if length >= most:
            raise ValueError(f"prompt: {length} positions leave no room for an answer within {most}")
        if isinstance(request, ScoreRequest):
            behind += max(map(len, request.candidates))
        else:
            limit = min(request.options.max_new_tokens, most - length)
        if behind > self.shape.question:
            raise ValueError(f"prompt: {behind} ids behind its prefix are more than {self.shape.question}")
        if key.length > self.shape.pools[-1].capacity:
            raise ValueError(f"prompt: a prefix of {key.length} positions is more than {self.shape.pools[-1].capacity}")
        return ActiveRequest(request, prompt, key, request.emit, limit)

    def add(self, active: ActiveRequest) -> None:
        self.waiting.append(active)

    def cancel(self, request: Request | ScoreRequest) -> None:
        """It decodes no more; nothing if it has ended."""
        for active in self._all():
            if active.request is request:
                self._break_off(active, Finish.CANCELLED, Stopped("it was cancelled"))
                break

    def fail_all(self, error: Exception) -> None:
        """Every request ends with an error."""
        for active in self._all():
            self._break_off(active, Finish.ERROR, error)

    def _all(self) -> list[ActiveRequest]:
        return [*self.waiting, *self.placed, *self.running, *self.scoring]

    @property
    def idle(self) -> bool:
        return not (self._all() or self._fills)

    def _break_off(self, active: ActiveRequest, finish: Finish, error: Exception) -> None:
        scores = isinstance(active.request, ScoreRequest)
        nothing = Scores(np.zeros(0, np.float32), np.zeros(0, bool), error)
        self._end(active, nothing if scores else Update(finish=finish, error=error))

    def _end(self, active: ActiveRequest, last: Update | Scores) -> None:
        self._leave(active)
        active.ended = True
        active.emit(last)

    def _leave(self, active: ActiveRequest) -> None:
        """Give up its place, whatever it is."""
        for those in (self.waiting, self.placed, self.running, self.outgrown, self.scoring):
            if active in those:
                those.remove(active)
        if active.slot is not None:
            if active.block is not None:
                active.slot.free_rows[active.block.row_class].append(active.row)
            self.tables[self._pool_of(active.key)].release(active.slot)
        active.slot = active.block = None

    def _pool_of(self, key: PrefixKey) -> int:
        return next(n for n, pool in enumerate(self.shape.pools) if key.length <= pool.capacity)

    # ---- prefixes

    def next_fill(self) -> Fill | None:
        """Prefixes to be prefilled next. They hold their slots until `filled` is said of them."""
        self.place()
        if not self._fills:
            return None
        pool = self._fills[0][0]
        lanes: list[FillLane | None] = [None] * self.shape.shards
        left: deque[tuple[int, FillLane]] = deque()
        passed: set[int] = set()  # shards of which one waits longer, in whatever pool
        for of_pool, lane in self._fills:
            shard = lane.slot.shard
            if of_pool != pool or shard in passed:
                left.append((of_pool, lane))
            else:
                lanes[shard] = lane
            passed.add(shard)
        self._fills = left
        return Fill(pool, lanes)

    def filled(self, fill: Fill) -> None:
        """All of it was given to the device."""
        for lane in filter(None, fill.lanes):
            lane.slot.ready = True
            self.tables[fill.pool].release(lane.slot)

    def place(self) -> None:
        """Give slots to those who wait."""
        first = None  # that finds none
        for active in list(islice(self.waiting, LOOKAHEAD)):
            if first is not None and first.overtaken >= MOST_OVERTAKEN:
                break
            pool = self._pool_of(active.key)
            found = self.tables[pool].take(active.key)
            if found is None:
                first = first or active
                continue
            if first is not None:
                first.overtaken += 1
            self.waiting.remove(active)
            self.placed.append(active)
            active.slot = found.slot
            if not active.steps:
                active.cached = found.start
                self.queried, self.hit = self.queried + active.key.length, self.hit + found.start
            if not found.complete:
                self.tables[pool].hold(found.slot)  # until it is filled, whoever goes
                self._fills.append((pool, FillLane(found.slot, active.prompt, found.start, found.source)))

    # ---- rows

    def admissions(self) -> list[Admission | Scoring]:
        """Who gets a row now, or is scored."""
        by_slot: dict[tuple[Block, PrefixSlot], list[ActiveRequest]] = {}
        scored: list[ActiveRequest] = []
        for active in list(self.placed):
            slot = active.slot
            assert slot is not None
            if not slot.ready:
                continue
            pool = self._pool_of(active.key)
            if isinstance(active.request, ScoreRequest):
                self.placed.remove(active)
                self.scoring.append(active)
                scored.append(active)
                continue
            row_class = next((n for n, rows in enumerate(slot.free_rows) if rows), None)
            if row_class is None:
                continue
            active.block, active.row = Block(pool, row_class), slot.free_rows[row_class].pop(0)
            active.epoch += 1
            self.placed.remove(active)
            self.running.append(active)
            by_slot.setdefault((active.block, slot), []).append(active)
        found: list[Admission | Scoring] = []
        for block in dict.fromkeys(block for block, _ in by_slot):
            lanes: list[list[list[ActiveRequest]]] = [[] for _ in range(self.shape.shards)]
            for (of, slot), actives in by_slot.items():
                if of == block:
                    lanes[slot.shard] += _pieces(actives, self.shape.admitted)
            found += [Admission(block, list(piece)) for piece in zip_longest(*lanes, fillvalue=[])]
        for pool in range(len(self.shape.pools)):
            each: list[list[ActiveRequest]] = [[] for _ in range(self.shape.shards)]
            for active in scored:
                if self._pool_of(active.key) == pool:
                    each[active.slot.shard].append(active)  # type: ignore[union-attr]
            found += [Scoring(pool, list(piece)) for piece in zip_longest(*each)]
        return found

    def limit_here(self, active: ActiveRequest) -> int:
        """New tokens until an answer ends, or has outgrown its row."""
        assert active.block is not None
        slots = self.shape.row_class(active.block).slots
        return min(active.limit, active.steps + 1 + slots - len(active.question))

    def moves(self) -> list[Move]:
        """Rows that are to go on among longer ones; what has outgrown the longest is put back into the queue."""
        moves = []
        for active in list(self.outgrown):
            slot, block = active.slot, active.block
            assert slot is not None and block is not None
            following = block.following
            if following.row_class == len(slot.free_rows):
                self._preempt(active)
            elif slot.free_rows[following.row_class]:
                moves.append(Move(block, active.row, active))
                slot.free_rows[block.row_class].append(active.row)
                active.block, active.row = following, slot.free_rows[following.row_class].pop(0)
                active.epoch += 1
                self.outgrown.remove(active)
        return moves

    def _preempt(self, active: ActiveRequest) -> None:
        """Back into the queue, with what it has said as a part of its prompt."""
        self._leave(active)
        said = np.asarray(active.tokens, np.int64)
        ids = np.concatenate([active.request.prompt.ids, said])
        active.prompt = SplitPrompt(ids, len(ids) - 1, active.prompt.images)  # the newest is in no cache yet
        active.key = prefix_key(active.prompt, self.config)
        self.waiting.appendleft(active)
        active.epoch += 1
        self.preemptions += 1

    def living(self) -> list[Living]:
        """The rows that decode, as far as the host knows."""
        stuck, each, found = set(map(id, self.outgrown)), self.shape.per_shard, []
        for active in self.running:
            if id(active) not in stuck:
                assert active.slot is not None and active.block is not None
                group = active.slot.shard * each + active.slot.index
                found.append(Living(active, active.epoch, active.block, group, active.row))
        return found

    @property
    def somebody_waits(self) -> bool:
        """For a slot, or a row."""
        return bool(self.waiting or self.placed)

    def leave_after(self, living: int) -> int:
        """How many rows must have ended for decoding to stop before its time: more than there are, if nobody waits."""
        if not self.somebody_waits:
            return living + 1
        return 1 if self.shape.chunk is not None else max(1, living // 8)

    # ---- what the device says

    def said(self, active: ActiveRequest, epoch: int, tokens: Sequence[Token]) -> None:
        """New tokens of a row that was living when they were asked for; those behind its end are not its own."""
        if active.ended or epoch != active.epoch or not isinstance(active.request, Request):
            return
        options, mine = active.options, []
        for token in tokens:
            if active in self.outgrown:
                break
            mine.append(token)
            active.tokens.append(token.id)
            if token.id in options.end_ids:
                return self._end(active, Update(tuple(mine), Finish.STOP, cached=active.cached))
            if len(active.tokens) >= active.limit:
                return self._end(active, Update(tuple(mine), Finish.LENGTH, cached=active.cached))
            if len(active.tokens) >= self.limit_here(active):
                self.outgrown.append(active)
        if mine:
            active.emit(Update(tuple(mine), cached=active.cached))

    def scored(self, active: ActiveRequest, logprobs: np.ndarray, greedy: np.ndarray) -> None:
        """The log-likelihoods of a request's candidates, and which of them are the likeliest token by token."""
        if not active.ended:
            self._end(active, Scores(logprobs, greedy, cached=active.cached))


def _pieces(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
