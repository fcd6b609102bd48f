"""What stands in each slot of a pool of prefixes: found by its ids and pixels, counted by its users, the one used
longest ago given up first. Host only."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.requests import SplitPrompt
from llava_jax.inputs.anyres import image_length
from llava_jax.inputs.groups import common_length

# Positions that two prefixes must share for one to be made from the other: more than a system prompt has.
LEAST_SHARED = 48


@dataclass(frozen=True, eq=False)
class PrefixKey:
    """A prefix as a row of numbers: its ids, and for each picture the two halves of its digest."""

    elements: np.ndarray  # int64 [n]
    positions: np.ndarray  # int32 [n], how many positions there are up to each element, itself included

    @cached_property
    def name(self) -> bytes:
        """Alike of the same prefixes only."""
        return self.elements.tobytes()

    @cached_property
    def length(self) -> int:
        """Positions."""
        return self.positions_of(len(self.elements))

    def positions_of(self, count: int) -> int:
        """Positions of the first `count` elements."""
        return int(self.positions[count - 1]) if count else 0

    def shared_with(self, other: PrefixKey) -> int:
        """How many elements both begin with."""
        if not (len(self.elements) and len(other.elements)):
            return 0
        return common_length([self.elements, other.elements])


def prefix_key(prompt: SplitPrompt, config: LlavaConfig) -> PrefixKey:
    """The key of a prompt's shared part."""
    elements, widths, image = [], [], 0
    for token in prompt.ids[: prompt.shared].tolist():
        if token == IMAGE_TOKEN_INDEX:
            shown = prompt.images[image]
            elements += [int(half) for half in np.frombuffer(shown.digest, np.int64)]
            widths += [0, image_length(*shown.size, config)]  # half a digest is no picture
            image += 1
        else:
            elements.append(token)
            widths.append(1)
    return PrefixKey(np.array(elements, np.int64), np.cumsum(widths, dtype=np.int32))


@dataclass(eq=False)
class PrefixSlot:
    """A place in a pool."""

    shard: int
    index: int  # within the shard
    key: PrefixKey | None = None  # of what it holds, or is to hold
    ready: bool = False  # it holds it
    users: int = 0  # who need it to stay
    last_used: int = 0
    free_rows: list[list[int]] = field(default_factory=list)  # of each class

    @property
    def length(self) -> int:
        """Positions of what it holds, or is to hold."""
        return 0 if self.key is None else self.key.length


@dataclass(frozen=True)
class Found:
    """A slot for a prefix, and how it comes to hold it."""

    slot: PrefixSlot
    start: int  # so many positions are there; the rest is to be prefilled
    source: PrefixSlot | None = None  # of the same shard: to be copied first

    @property
    def complete(self) -> bool:
        """There is nothing to do."""
        return self.source is None and self.start == self.slot.length


class PrefixTable:
    """The slots of one pool.

    Args:
        shards, per_shard: how many slots there are.
        rows: of each class, how many rows a slot has.
        grows: whether a prefix can be made from another one that begins like it.
        once: whether a prefix is in one slot only, whose rows all of its users wait for.
    """

    def __init__(self, shards: int, per_shard: int, rows: Sequence[int], grows: bool, once: bool = False):
        places = [(shard, index) for shard in range(shards) for index in range(per_shard)]
        self.slots = [PrefixSlot(*place, free_rows=[list(range(n)) for n in rows]) for place in places]
        self._most_users = sys.maxsize if once else sum(rows)
        self._grows, self._clock = grows, 0

    def used(self) -> int:
        """How many slots somebody needs."""
        return sum(slot.users > 0 for slot in self.slots)

    def take(self, key: PrefixKey) -> Found | None:
        """A slot for a prefix, with one user more, not ready until it is filled; None: there is none at present."""
        found = self._find(key)
        if found is None:
            return None
        slot = found.slot
        if slot.key is None or slot.key.name != key.name:
            slot.key = key
            slot.ready = found.complete
        self.hold(slot)
        return found

    def hold(self, slot: PrefixSlot) -> None:
        """One user more."""
        slot.users += 1
        self._touch(slot)

    def release(self, slot: PrefixSlot) -> None:
        """One user less. What the slot holds stays until the slot is needed for something else."""
        slot.users -= 1
        self._touch(slot)

    def _touch(self, slot: PrefixSlot) -> None:
        self._clock += 1
        slot.last_used = self._clock

    def _find(self, key: PrefixKey) -> Found | None:
        for slot in self.slots:
            if slot.key is not None and slot.key.name == key.name and slot.users < self._most_users:
                return Found(slot, key.length)
        if all(slot.users for slot in self.slots):
            return None
        count = len(key.elements)
        alike = [(slot, slot.key.shared_with(key)) for slot in self.slots if slot.key is not None]
        best = max(alike, key=lambda pair: (pair[1], pair[0].ready, -pair[0].users), default=None)
        if best is not None and count:
            slot, shared = best
            start = key.positions_of(shared)
            if shared == count or (self._grows and start >= LEAST_SHARED):
                return self._from(slot, start, shared == count)
        target = self._least_used(lambda other: True)
        return None if target is None else Found(target, 0)

    def _from(self, slot: PrefixSlot, start: int, whole: bool) -> Found | None:
        """A slot that goes on from what another one holds; or that one itself, if nobody needs it.

        Args:
            start: positions that are shared; `whole`: they are all of the prefix that is asked for.
        """
        if not slot.ready:
            return None
        if not slot.users and (whole or start == slot.length):
            return Found(slot, start)
        other = self._least_used(lambda other: other is not slot and other.shard == slot.shard)
        if other is not None and self._grows:
            return Found(other, start, slot)
        if not slot.users and self._grows:
            return Found(slot, start)
        free = self._least_used(lambda other: True)
        return None if free is None else Found(free, 0)

    def _least_used(self, wanted: Callable[[PrefixSlot], bool]) -> PrefixSlot | None:
        """Of those that nobody needs: an empty one, in the shard with the fewest users, or the one used longest ago."""
        free = [slot for slot in self.slots if not slot.users and wanted(slot)]
        busy = Counter({slot.shard: 0 for slot in self.slots})
        for slot in self.slots:
            busy[slot.shard] += slot.users
        return min(free, key=lambda slot: (slot.key is not None, busy[slot.shard], slot.last_used), default=None)
