"""How many prefixes and rows a continuous batch has, and of what length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class RowClass(NamedTuple):
    """Rows of one length."""

    rows: int  # for each prefix
    slots: int  # of a row, for its question and its answer


class PoolShape(NamedTuple):
    """Prefixes of up to `capacity` positions, and the classes of their rows, the short one first."""

    capacity: int
    classes: tuple[RowClass, ...]


@dataclass(frozen=True)
class BatchShape:
    """What the compiled programs of a continuous batch depend on."""

    shards: int
    per_shard: int  # prefixes of each pool
    pools: tuple[PoolShape, ...]  # the one of short prefixes first
    question: int  # ids that may follow a prefix
    admitted: int  # questions on one prefix that are prefilled together
    decode_steps: int  # at most, until the host looks again
    chunk: int | None  # positions of a prefix that are prefilled at a time; None: all
    max_model_len: int  # positions of a prompt and its answer

    @property
    def groups(self) -> int:
        """G, of each pool."""
        return self.shards * self.per_shard

    @property
    def blocks(self) -> list[Block]:
        """All of them, in order."""
        return [Block(n, m) for n, pool in enumerate(self.pools) for m in range(len(pool.classes))]

    def row_class(self, block: Block) -> RowClass:
        return self.pools[block.pool].classes[block.row_class]


class Block(NamedTuple):
    """The rows of one class in one pool."""

    pool: int
    row_class: int
