"""How many prefixes and rows a continuous batch has, and of what length."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llava_jax.config import LlavaConfig
from llava_jax.inputs.batch import bucket_count, bucket_length
from llava_jax.inputs.groups import MAX_GROUPS, PREFILL_CHUNK, SCORE_BYTES, CacheLayout, Group, bucket_rows


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

    @property
    def following(self) -> Block:
        """The longer rows of the same pool."""
        return self._replace(row_class=self.row_class + 1)


# ---- what fits


def memory_bytes(shape: BatchShape, config: LlavaConfig, layout: CacheLayout) -> int:
    """Bytes on one device that a continuous batch takes, parameters aside: its pools and rows, and the largest of its
    programs' temporaries."""
    text = config.text
    divided_by = layout.tensor if text.num_key_value_heads % layout.tensor == 0 else 1
    vectors = 2 * text.num_hidden_layers * text.num_key_value_heads // divided_by  # of a position
    position = vectors * text.head_dim * layout.itemsize
    in_prefix = vectors * (text.head_dim + 4) if layout.int8_prefix else position
    activations = (3 * text.hidden_size + 2 * text.intermediate_size // divided_by) * layout.itemsize
    scores = SCORE_BYTES * text.num_attention_heads // divided_by if layout.keeps_scores else 0
    longest = shape.pools[-1].capacity

    prefixes = sum(pool.capacity for pool in shape.pools) * in_prefix
    classes = [row_class for pool in shape.pools for row_class in pool.classes]
    rows = sum(row_class.rows * (row_class.slots * position + text.vocab_size) for row_class in classes)

    chunk = shape.chunk or longest
    one_prefix = longest * (in_prefix + text.hidden_size * layout.itemsize)  # read from its slot; its embeddings
    prefill = chunk * activations + scores * PREFILL_CHUNK * longest
    question = shape.question * (activations + scores * (longest + shape.question))
    admission = shape.admitted * (question + 8 * text.vocab_size)
    decoding = 8 * shape.per_shard * sum(row_class.rows for row_class in classes) * text.vocab_size
    return shape.per_shard * (prefixes + rows) + max(one_prefix + max(prefill, admission), decoding)


# ---- serving

QUESTION = 64  # ids behind a prefix: more of a prompt becomes its prefix
SHORT_PREFIX = 512  # positions
SHORT_ANSWER, LONG_ANSWER = 128, 512  # slots
CHUNK = 512  # positions that are prefilled between two decodings: a stream waits for no more
DECODE_STEPS = 4  # new tokens between two looks
MOST_PREFIXES = 16  # on each shard
MAX_NUM_SEQS = 64  # answers that decode at once, unless something else is asked for
LONGEST_BY_DEFAULT = 4096  # positions, of models that could take many more


class RowsPerPrefix(NamedTuple):
    """Answers that decode on one prefix at once."""

    short: int
    long: int


ROWS = RowsPerPrefix(4, 2), RowsPerPrefix(2, 1), RowsPerPrefix(1, 1)
ONE_ROW = (RowsPerPrefix(1, 1),)  # where each asks about something of his own


def model_len(config: LlavaConfig, asked: int | None) -> int:
    """Positions of a prompt and its answer; not asked for: what the model takes, but LONGEST_BY_DEFAULT at most.

    Raises:
        ValueError: it takes fewer, or they are too few for a prompt.
    """
    most = config.text.max_position_embeddings
    length = min(most, LONGEST_BY_DEFAULT) if asked is None else asked
    if not QUESTION < length <= most:
        raise ValueError(f"--max-model-len {length} must be from {QUESTION + 1} to this model's {most}")
    return length


def serving_shape(
    config: LlavaConfig,
    layout: CacheLayout,
    budget: int,
    max_model_len: int | None,
    max_num_seqs: int,
    rows: Sequence[RowsPerPrefix] = ROWS,
    one_prefix_fits: bool = False,
) -> BatchShape:
    """The largest batch for a server within a budget of bytes on each device.

    Args:
        max_model_len: as `model_len` takes it.
        max_num_seqs: answers that decode at once, at most.
        rows: what to try, in this order, until it fits.
        one_prefix_fits: a batch of one prefix is returned whatever the budget is.

    Raises:
        ValueError: the budget holds not even one prefix, or the numbers are out of range.
    """
    length = model_len(config, max_model_len)
    if max_num_seqs < 1:
        raise ValueError(f"--max-num-seqs {max_num_seqs} must be at least 1")
    capacity = bucket_length(length, config)
    for short, long in rows:
        if short * layout.shards > max_num_seqs and short > 1:
            continue
        classes = RowClass(short, SHORT_ANSWER), RowClass(long, LONG_ANSWER)
        pools = [PoolShape(size, classes) for size in (SHORT_PREFIX, capacity) if size <= capacity]
        shape = BatchShape(layout.shards, 1, tuple(dict.fromkeys(pools)), QUESTION, 1, DECODE_STEPS, CHUNK, length)
        for count in range(min(MOST_PREFIXES, max(1, max_num_seqs // (short * layout.shards))), 0, -1):
            shape = replace(shape, per_shard=count)
            if memory_bytes(shape, config, layout) <= budget:
                return shape
    if one_prefix_fits:
        return shape
    needed = memory_bytes(shape, config, layout) / 2**30
    raise ValueError(
        f"one prefix of {capacity} positions takes {needed:.2f} GiB, and there are {budget / 2**30:.2f} GiB for it: "
        "give a smaller --max-model-len, --quantize int8 or --int8-prefix"
    )


# ---- everything known beforehand

STEP_COST = 64  # what a step takes beside its rows, for the weights and the prefixes, in rows: roughly, of any device
OFFLINE_STEPS = 16  # new tokens between two looks


def one_pool(shards: int, per_shard: int, capacity: int, rows: int, question: int, output_capacity: int) -> BatchShape:
    """A batch of prefixes of up to `capacity` positions, with so many rows each, whose questions come all at once."""
    slots = question + output_capacity
    pools = (PoolShape(capacity, (RowClass(rows, slots),)),)
    return BatchShape(shards, per_shard, pools, question, rows, OFFLINE_STEPS, None, capacity + slots)


def offline_shape(
    groups: Sequence[Group],
    config: LlavaConfig,
    layout: CacheLayout,
    output_capacity: int,
    budget: int,
    limits: Callable[[Group], Sequence[int]],
) -> BatchShape:
    """The batch that answers these groups fastest within a budget of bytes on each device.

    It has a slot for one prefix, and a row, on each shard however small the budget is.

    Args:
        output_capacity: slots for new tokens in each row.
        limits: new tokens of each question of a group, at most, or what is in proportion.
    """
    question = bucket_count(max(len(ids) for group in groups for ids in group.suffixes))
    capacity = bucket_length(max(group.prefix_length for group in groups), config)
    asked = [limits(group) for group in groups]

    def shape(per_shard: int, rows: int) -> BatchShape:
        return one_pool(layout.shards, per_shard, capacity, rows, question, output_capacity)

    def fits(per_shard: int, rows: int) -> bool:
        return memory_bytes(shape(per_shard, rows), config, layout) <= budget

    def cost(rows: int) -> int:
        return decoding_cost(shape(per_shard, rows), [asked])

    most = min(MAX_GROUPS, -(-len(groups) // layout.shards))
    per_shard = next((n for n in range(most, 1, -1) if fits(n, 1)), 1)
    buckets = {bucket_rows(n) for n in range(1, max(map(len, asked)) + 1)}
    return shape(per_shard, min((n for n in buckets if n == 1 or fits(per_shard, n)), key=cost))


def side_by_side(one: BatchShape, other: BatchShape) -> BatchShape:
    """The pools of both, made by `one_pool`, in a batch whose rows decode together."""
    pools = sorted(one.pools + other.pools)
    slots = max(row_class.slots for pool in pools for row_class in pool.classes)
    return replace(
        one,
        per_shard=max(one.per_shard, other.per_shard),
        pools=tuple(PoolShape(pool.capacity, (RowClass(pool.classes[0].rows, slots),)) for pool in pools),
        question=max(one.question, other.question),
        admitted=max(one.admitted, other.admitted),
        max_model_len=max(one.max_model_len, other.max_model_len),
    )


def decoding_cost(shape: BatchShape, asked: Sequence[Sequence[Sequence[int]]]) -> int:
    """About what decoding takes, in rows: those of each pool for as many steps as it has, and STEP_COST a step.

    asked: for each pool, and each prefix that it is to hold, the new tokens of its questions.
    """
    rows = [pool.classes[0].rows for pool in shape.pools]
    steps = [
        _last_end([_last_end(lengths, count) for lengths in of_pool], shape.groups)
        for count, of_pool in zip(rows, asked, strict=True)
    ]
    return STEP_COST * max(steps) + shape.per_shard * sum(map(operator.mul, rows, steps))


def _last_end(lengths: Iterable[int], count: int) -> int:
    """How long `count` workers take for pieces of these lengths; whoever is free begins the longest that is left."""
    busy = [0] * count
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(busy, busy[0] + length)
    return max(busy)
