"""Many questions, all known beforehand: each image is prefilled once, and its questions share that prefix."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import BatchShape, decoding_cost, memory_bytes, offline_shape, side_by_side
from llava_jax.inference.continuous_batch import ContinuousBatch, run
from llava_jax.inference.engine import Engine
from llava_jax.inference.requests import Request, RowOptions, ScoreRequest, Scores, SplitPrompt, Update
from llava_jax.inputs.batch import bucket_length
from llava_jax.inputs.groups import Group
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.types import ProcessedImage
from llava_jax.models.llava_llama import param_bytes
from llava_jax.parallel.sharding import default_axes, make_mesh
from llava_jax.parallel.target import default_dtype

CPU_BUDGET = 4 << 30  # bytes; a GPU or TPU says how much it has
SHARE = 0.8  # of what an accelerator has free

Options = Callable[[Any], RowOptions]  # of a question


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


def local_mesh(axes: dict[str, int], config: LlavaConfig, dtype: str | None, quantize: str | None) -> Mesh | None:
    """The mesh of these axes, of this process's devices; without any, `default_mesh`.

    Raises:
        ValueError: there are fewer devices.
    """
    return make_mesh(jax.local_devices(), **axes) if axes else default_mesh(config, dtype, quantize)


@dataclass(frozen=True)
class Phase:
    """Groups in the order in which they are begun, and the batch for them; those of one pool are about as long."""

    groups: tuple[Group, ...]
    shape: BatchShape


class LoadedGroup(NamedTuple):
    """A group and its pictures."""

    group: Group
    images: Sequence[ProcessedImage]


def plan(
    engine: Engine,
    params,
    groups: Sequence[Group],
    output_capacity: int,
    budget: int | None = None,
    limit: Callable[[Any], int] = lambda question: 1,
) -> list[Phase]:
    """The groups in phases, the longest prefixes first, and in each the most work first; with a line on stderr.

    Groups of other lengths are a phase of their own where a batch of both is slower, or takes more than there is.

    Args:
        output_capacity: slots for new tokens in each row.
        budget: bytes of one device; None is most of those free.
        limit: new tokens of a question, at most, or what is in proportion.
    """

    def limits(group: Group) -> list[int]:
        return [limit(question) for question in group.questions]

    budget = memory_budget(params) if budget is None else whole_number("memory_budget", budget, 1, 1 << 62)
    config, layout = engine.config, engine.cache_layout(params)
    batches: list[_Batch] = []
    left = sorted(groups, key=lambda group: group.prefix_length, reverse=True)
    while left:
        least = bucket_length(left[0].prefix_length, config) // 2
        together = [group for group in left if bucket_length(group.prefix_length, config) > least]
        left = left[len(together) :]
        shape = offline_shape(together, config, layout, output_capacity, budget, limits)
        batches.append(_Batch(shape, [sorted(together, key=lambda group: sum(limits(group)), reverse=True)]))
        if len(batches) > 1:
            last, alone = batches[-2:]
            both = _Batch(side_by_side(last.shape, alone.shape), alone.pools + last.pools)
            faster = both.cost(limits) < last.cost(limits) + alone.cost(limits)
            if faster and memory_bytes(both.shape, config, layout) <= budget:
                batches[-2:] = [both]
    if batches:
        rows = sum(len(group.questions) for group in groups)
        needed = [memory_bytes(batch.shape, config, layout) for batch in batches]
        print(
            f"{rows} questions on {len(groups)} prefixes in {len(batches)} phases; the largest has room for "
            f"{_describe(batches[int(np.argmax(needed))].shape)}, and takes "
            f"{max(needed) / 2**30:.2f} of {budget / 2**30:.2f} GiB",
            file=sys.stderr,
        )
    return [Phase(batch.in_turn(limits), batch.shape) for batch in batches]


@dataclass(frozen=True)
class _Batch:
    """A batch and, for each of its pools, the groups that go there, those with the most work first."""

    shape: BatchShape
    pools: list[list[Group]]

    def cost(self, limits: Callable[[Group], list[int]]) -> int:
        return decoding_cost(self.shape, [list(map(limits, groups)) for groups in self.pools])

    def in_turn(self, limits: Callable[[Group], list[int]]) -> tuple[Group, ...]:
        """All groups, so that each pool has had about the same share of its work at any time."""
        begins: list[tuple[float, Group]] = []
        for groups in self.pools:
            work = np.cumsum([0, *(sum(limits(group)) for group in groups)])
            begins += zip((work / work[-1]).tolist(), groups, strict=False)
        return tuple(group for _, group in sorted(begins, key=lambda pair: pair[0]))


def _describe(shape: BatchShape) -> str:
    pools = [
        f"{shape.groups} prefixes of up to {pool.capacity} positions, {pool.classes[0].rows} rows each"
        for pool in reversed(shape.pools)
    ]
    return " and ".join(pools)


def generate(
    engine: Engine, params, phase: Phase, loaded: Iterable[LoadedGroup], options: Options
) -> Iterator[list[tuple[Any, np.ndarray]]]:
    """Questions, as the caller has them, and their new tokens, int32 [tokens]: lists of those that have just ended.

    `loaded` are the phase's groups, in its order, or some of them; they are taken as there is room for them.
    """
    ended: list[tuple[Any, np.ndarray]] = []
    requests = (request for group in loaded for request in _requests(group, options, ended))
    for _ in run(ContinuousBatch(engine, params, phase.shape), requests):
        if ended:
            yield ended.copy()
            ended.clear()


def _requests(loaded: LoadedGroup, options: Options, ended: list) -> Iterator[Request]:
    """A group's, the longest answers first; each puts its question and its tokens into `ended` when it has ended."""
    group, images = loaded
    asked = zip(group.suffixes, group.questions, map(options, group.questions), strict=True)
    for suffix, question, how in sorted(asked, key=lambda one: one[2].max_new_tokens, reverse=True):
        prompt = SplitPrompt(np.concatenate([group.prefix, suffix]), len(group.prefix), images)
        yield Request(prompt, how, _collect(question, ended))


def _collect(question, ended: list) -> Callable[[Update], None]:
    tokens: list[int] = []

    def emit(update: Update) -> None:
        tokens.extend(token.id for token in update.tokens)
        if update.finish is not None:
            ended.append((question, np.array(tokens, np.int32)))

    return emit


def score(engine: Engine, params, phase: Phase, loaded: LoadedGroup, starts: Sequence[int]) -> np.ndarray:
    """The log-likelihood of each of a group's suffixes, whose first id all have and does not count, float32.

    starts: how many more ids of each suffix do not count.
    """
    group, heard = loaded.group, list[Scores]()
    ids = np.concatenate([group.prefix, group.suffixes[0][:1]])
    prompt = SplitPrompt(ids, len(group.prefix), loaded.images)
    request = ScoreRequest(prompt, [suffix[1:] for suffix in group.suffixes], heard.append, starts)
    for _ in run(ContinuousBatch(engine, params, phase.shape), [request]):
        pass
    return heard[0].logprobs
