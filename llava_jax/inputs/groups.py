"""Prompts that share a beginning, and how many of them the device takes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.batch import bucket_count, bucket_length
from llava_jax.inputs.types import Questions

MAX_GROUPS = 8  # prefixes at a time on each shard: more gain nothing once the weights are read for all of them
PREFILL_POSITIONS = 4096  # positions at a time in prefill: more only crowd the caches and the memory
PREFILL_CHUNK = 512  # query rows whose attention scores are alive at once


@dataclass(frozen=True)
class Group:
    """Prompts on the same images, cut into what they share and what each goes on with."""

    prefix: np.ndarray  # ids, -200 where an image goes
    questions: tuple[np.ndarray, ...]  # for each row, at least one id
    places: tuple[int, ...]  # where each row's answer goes
    images: int  # which entry of the caller's pictures

    def prefix_length(self, sizes: Sequence[tuple[int, int]], config: LlavaConfig) -> int:
        """Positions that the prefix takes with images of these (width, height)."""
        text = int(np.sum(self.prefix != IMAGE_TOKEN_INDEX))
        return text + sum(int(num_image_tokens(*size, config)) for size in sizes)


def common_length(rows) -> int:
    """How many ids all rows begin with alike."""
    shortest = min(map(len, rows))
    alike = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if alike.all() else int(np.argmin(alike))


def group_prompts(rows, places, images: int) -> list[Group]:
    """One group of rows (int arrays of ids) if their shared prefix holds all their images, else a group for each row.

    At least one id stays in each question, so that there is something to predict from.
    """
    shared = min(common_length(rows), min(map(len, rows)) - 1)
    if len(rows) > 1 and any(np.any(row[shared:] == IMAGE_TOKEN_INDEX) for row in rows):
        return [
            group for row, place in zip(rows, places, strict=True) for group in group_prompts([row], [place], images)
        ]
    return [Group(rows[0][:shared], tuple(row[shared:] for row in rows), tuple(places), images)]


def bucket_rows(n: int) -> int:
    """Counts of questions to a few, but not as few as other counts: each row that only fills the shape costs work."""
    return bucket_count(n, per_doubling=4)


def pack_questions(questions, groups: int, rows: int) -> Questions[np.ndarray]:
    """`questions[g][r]`, ids, into bucketed arrays [groups, rows, Q]; what is not there is inactive."""
    longest = bucket_count(max(len(ids) for group in questions for ids in group))
    ids = np.zeros((groups, rows, longest), np.int32)
    lengths, active = np.ones((groups, rows), np.int32), np.zeros((groups, rows), bool)
    for g, group in enumerate(questions):
        for r, row in enumerate(group):
            ids[g, r, : len(row)], lengths[g, r], active[g, r] = row, len(row), True
    return Questions(ids, lengths, active)


def no_questions(groups: int) -> Questions[np.ndarray]:
    """One row for each prefix, which holds the whole prompt already (Q = 0)."""
    return Questions(np.zeros((groups, 1, 0), np.int32), np.zeros((groups, 1), np.int32), np.ones((groups, 1), bool))


@dataclass(frozen=True)
class PrefixBatch:
    """Groups that the device takes together: G prefixes of up to P positions, up to R rows of each at a time."""

    groups: tuple[Group, ...]  # one shard's after another's, the last ones perhaps missing
    per_shard: int
    at_once: int  # how many of them are prefilled together; divides their number
    rows: int
    bytes: int  # on one device


def plan_waves(
    groups,
    lengths,
    config: LlavaConfig,
    slots: int,
    itemsize: int,
    budget: int,
    shards: int = 1,
    tensor: int = 1,
    int8_prefix: bool = False,
) -> list[PrefixBatch]:
    """Groups of like length together, as many, and as many of their rows at a time, as the budget holds.

    Args:
        groups: what is to be answered; lengths: each one's prefix in positions.
        slots: room for new tokens in each row; itemsize: bytes of a cached value.
        budget: bytes of each device for the cache and the activations of one wave.
        shards: how many devices divide the prefixes among themselves; tensor: how many divide the heads.

    Returns:
        waves, the largest first; together they hold every group once. One group a shard is always taken, however small
        the budget.
    """
    padded_lengths = [bucket_length(length, config) for length in lengths]
    order = sorted(range(len(groups)), key=lambda i: (padded_lengths[i], len(groups[i].questions)), reverse=True)
    waves, start = [], 0
    while start < len(order):
        padded = padded_lengths[order[start]]
        same = [i for i in order[start : start + MAX_GROUPS * shards] if padded_lengths[i] == padded]
        count = max([n for n in range(1, len(same) // shards + 1) if bucket_count(n) == n], default=1)
        question = max(len(ids) for i in same for ids in groups[i].questions)
        cost = MemoryEstimate(config, padded, bucket_count(question), slots, itemsize, tensor, int8_prefix)
        while count > 1 and cost.bytes(count, 1) > budget:
            count = max(n for n in range(1, count) if bucket_count(n) == n)
        taken = [groups[i] for i in same[: count * shards]]
        rows = bucket_rows(max(len(group.questions) for group in taken))
        while rows > 1 and cost.bytes(count, rows) > budget:
            rows = max(n for n in range(1, rows) if bucket_rows(n) == n)
        waves.append(PrefixBatch(tuple(taken), count, cost.at_once(count), rows, cost.bytes(count, rows)))
        start += len(taken)
    return waves


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one wave on one device, from the config: prefix, suffix, the larger of the two prefills' activations."""

    config: LlavaConfig
    prefix: int
    question: int
    slots: int
    itemsize: int
    tensor: int = 1  # devices that divide the heads, where it divides their number, and the width of the MLP
    int8_prefix: bool = False

    def at_once(self, groups: int) -> int:
        """How many prefixes are prefilled together: the largest divisor of `groups` within PREFILL_POSITIONS."""
        most = max(1, PREFILL_POSITIONS // self.prefix)
        return max(n for n in range(1, min(groups, most) + 1) if groups % n == 0)

    def bytes(self, groups: int, rows: int) -> int:
        text = self.config.text
        by = self.tensor if text.num_key_value_heads % self.tensor == 0 else 1
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads // by  # keys and values, of all layers
        new = cached * text.head_dim * self.itemsize  # bytes of a position
        kept = cached * (text.head_dim + 4) if self.int8_prefix else new  # and of one of the prefix: with its scale
        cache = groups * (self.prefix * kept + rows * (self.question + self.slots) * new)
        wide = (4 * text.hidden_size + 3 * text.intermediate_size // by) * self.itemsize
        heads = 4 * text.num_attention_heads // by  # float32 scores
        prefill = self.at_once(groups) * (self.prefix * wide + heads * PREFILL_CHUNK * self.prefix)
        prefill = max(prefill, groups * self.prefix * kept)  # prefixes before and after they are joined
        asking = groups * rows * self.question * (wide + heads * (self.prefix + self.question + self.slots))
        return cache + max(prefill, asking) + 8 * groups * rows * text.vocab_size
