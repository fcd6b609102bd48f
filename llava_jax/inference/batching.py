"""Many questions: each image is encoded and prefilled once, and its questions share that prefix."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.inference.engine import Engine
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inputs.batch import pack, room_for, stack_shards
from llava_jax.inputs.groups import Group, PrefixBatch, bucket_rows, pack_questions, plan_prefix_batches
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.types import Batch, ProcessedImage
from llava_jax.models.llava_llama import param_bytes
from llava_jax.parallel.sharding import default_axes, make_mesh
from llava_jax.parallel.target import default_dtype

CPU_BUDGET = 4 << 30  # bytes; a GPU or TPU says how much it has
SHARE = 0.8  # of what an accelerator has free

Images = Mapping[Any, Sequence[ProcessedImage]]  # Group.images → what they are


def memory_budget(params) -> int:
    """Bytes for one batch of prefixes: most of what the device of `params` has free."""
    device = min(jax.tree.leaves(params)[0].devices(), key=lambda d: d.id)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return CPU_BUDGET
    return int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))


def default_mesh(config: LlavaConfig, dtype: str | None, quantize: str | None) -> Mesh | None:
    """All devices of this process, as `default_axes` has them for a model of this dtype; None where there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    itemsize = (default_dtype(devices[0]) if dtype is None else jnp.dtype(dtype)).itemsize
    params = param_bytes(config, itemsize, quantize)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", CPU_BUDGET)
    return make_mesh(devices, **default_axes(len(devices), config.text.num_key_value_heads, params, memory))


def plan(
    engine: Engine, params, groups: Sequence[Group], output_capacity: int, budget: int | None = None
) -> list[PrefixBatch]:
    """`plan_prefix_batches`, with a line on stderr. `budget` is bytes of one device; None is most of those free."""
    budget = memory_budget(params) if budget is None else whole_number("memory_budget", budget, 1, 1 << 62)
    batches = plan_prefix_batches(groups, engine.config, engine.cache_layout(params), output_capacity, budget)
    if batches:
        rows, most = sum(len(group.questions) for group in groups), max(batches, key=lambda batch: batch.bytes)
        print(
            f"{rows} questions on {len(groups)} prefixes in {len(batches)} waves; the largest takes "
            f"{len(most.groups)} prefixes, {most.rows} rows each, {most.bytes / 2**30:.2f} of {budget / 2**30:.2f} GiB",
            file=sys.stderr,
        )
    return batches


def generate(
    engine: Engine, params, batch: PrefixBatch, images: Images, options: GenerationOptions
) -> Iterator[tuple[Any, np.ndarray]]:
    """(question, its tokens int32 [output_capacity]) of every question of a batch, as the caller has them."""

    answer = partial(engine.generate_from_prefix, params, options=options)
    return _over_rows(engine, params, batch, images, answer)


def score(engine: Engine, params, batch: PrefixBatch, images: Images) -> Iterator[tuple[Any, np.ndarray]]:
    """(question, log-probability of each token of its suffix but the first, float32 [Q - 1]) of every question."""

    def answer(prefix, last_hidden, questions):
        return engine.score(params, prefix, questions)

    return _over_rows(engine, params, batch, images, answer)


def _over_rows(
    engine: Engine, params, batch: PrefixBatch, images: Images, answer: Callable
) -> Iterator[tuple[Any, np.ndarray]]:
    """Prefill the prefixes once, and hand them and their questions, a few rows at a time, to `answer`."""
    prefix, last_hidden = prefill(engine, params, batch, images)
    for start in range(0, max(len(group.questions) for group in batch.groups), batch.rows):
        here = slice(start, start + batch.rows)
        suffixes = [group.suffixes[here] for group in batch.groups]
        rows = bucket_rows(max(map(len, suffixes)))
        questions = pack_questions(suffixes, batch.groups_per_shard * engine.num_shards, rows)
        results = answer(prefix, last_hidden, engine.place(questions))
        for group, of_group in zip(batch.groups, results, strict=False):
            yield from zip(group.questions[here], of_group, strict=False)


def prefill(engine: Engine, params, batch: PrefixBatch, images: Images):
    """(Prefix, last hidden states [G, E]) of a batch, `prefill_batch_size` prefixes of each shard after another."""
    size, each, shards, wave = batch.prefill_batch_size, batch.groups_per_shard, engine.num_shards, None
    for first in range(0, each, size):
        starts = range(first, each * shards, each)
        packed = [_pack_groups(engine.config, batch.groups[i : i + size], size, images) for i in starts]
        whole = packed[0] if shards == 1 else stack_shards(packed, room_for(packed), engine.config)
        wave = engine.add_to_wave(wave, engine.prefill(params, engine.place(whole)), first, each)
    return wave


def _pack_groups(config, groups: Sequence[Group], count: int, images: Images) -> Batch:
    """The prefixes of `count` groups; those that are missing are one token of padding."""
    rows = [group.prefix for group in groups] + [np.zeros(1, np.int64)] * (count - len(groups))
    return pack(rows, [image for group in groups for image in images[group.images]], config)
