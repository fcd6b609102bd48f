"""Questions whose prompts share a beginning, and how many of them the device takes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inputs.batch import bucket_count, merged_length
from llava_jax.inputs.types import Questions

MAX_GROUPS = 8  # prefixes at a time on each shard: more gain nothing once the weights are read for all of them
PREFILL_CHUNK = 512  # query rows whose attention scores are alive at once
SCORE_BYTES = 7  # of a score where attention is not by a kernel: float32, its weight, and some of both at once


class Prompt(NamedTuple):
    """A question as the caller has it, and its whole prompt."""

    question: Any  # the caller's own object, which comes back with the answer
    ids: np.ndarray  # -200 where an image goes


@dataclass(frozen=True)
class Group:
    """Questions on the same images: what their prompts share, and what each goes on with."""

    prefix: np.ndarray  # ids, -200 where an image goes
    suffixes: tuple[np.ndarray, ...]  # of each question, at least one id
    questions: tuple[Any, ...]  # the caller's own objects
    images: Any  # the caller's own: a key to these images
    prefix_length: int  # positions, those of the images included


def common_length(rows) -> int:
    """How many ids all rows begin with alike."""
    shortest = min(map(len, rows))
    alike = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if alike.all() else int(np.argmin(alike))


def group_prompts(prompts: Sequence[Prompt], images, sizes, config: LlavaConfig) -> list[Group]:
    """One group of all prompts if what they share holds all their images, else a group for each.

    At least one id stays in each suffix, so that there is something to predict from. `images` is what the caller calls
    the images; sizes: (width, height) of each.
    """
    rows = [prompt.ids for prompt in prompts]
    shared = min(common_length(rows), min(map(len, rows)) - 1)
    if len(rows) > 1 and any(np.any(row[shared:] == IMAGE_TOKEN_INDEX) for row in rows):
        return [group for prompt in prompts for group in group_prompts([prompt], images, sizes, config)]
    prefix, suffixes = rows[0][:shared], tuple(row[shared:] for row in rows)
    questions = tuple(prompt.question for prompt in prompts)
    return [Group(prefix, suffixes, questions, images, merged_length(prefix, sizes, config))]


def bucket_rows(n: int) -> int:
    """Counts of questions to a few, but not as few as other counts: each row that only fills the shape costs work."""
    return bucket_count(n, per_doubling=4)


def pack_questions(
    suffixes: Sequence[Sequence[np.ndarray]], groups: int, rows: int, length: int | None = None
) -> Questions[np.ndarray]:
    """`suffixes[g][r]`, ids, into arrays [groups, rows, length]; what is not there is inactive. `length` is the bucket
    of the longest, unless it is given."""
    if length is None:
        length = bucket_count(max(len(ids) for group in suffixes for ids in group))
    ids = np.zeros((groups, rows, length), np.int32)
    lengths, active = np.ones((groups, rows), np.int32), np.zeros((groups, rows), bool)
    for g, group in enumerate(suffixes):
        for r, row in enumerate(group):
            ids[g, r, : len(row)], lengths[g, r], active[g, r] = row, len(row), True
    return Questions(ids, lengths, active)


def no_questions(groups: int) -> Questions[np.ndarray]:
    """One row for each prefix, which holds the whole prompt already (Q = 0)."""
    return Questions(np.zeros((groups, 1, 0), np.int32), np.zeros((groups, 1), np.int32), np.ones((groups, 1), bool))


# ---- what fits


@dataclass(frozen=True)
class CacheLayout:
    """How keys and values lie on the devices: what a plan must know of the hardware and of the model's dtype."""

    itemsize: int  # bytes of a cached value
    shards: int = 1  # devices that divide the prefixes among themselves
    tensor: int = 1  # devices that divide the heads, where it divides their number, and the width of the MLP
    int8_prefix: bool = False
    keeps_scores: bool = True  # of all heads of questions at once, as attention does that is not by a kernel
