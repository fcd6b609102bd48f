"""Many questions, all known beforehand: each image is prefilled once, and its questions share that prefix."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import BatchShape, decoding_cost, memory_bytes, offline_shape, side_by_side
from llava_jax.inference.continuous_batch import ContinuousBatch, run
from llava_jax.inference.engine import Engine
from llava_jax.inference.requests import Finish, Request, RowOptions, ScoreRequest, Scores, SplitPrompt, Update
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
Ends = Callable[[int], bool]  # told an answer's tokens one by one: whether the answer ends with this one


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
    engine: Engine,
    params,
    phase: Phase,
    loaded: Iterable[LoadedGroup],
    options: Options,
    ends: Callable[[Any], Ends | None] = lambda question: None,
) -> Iterator[list[tuple[Any, np.ndarray]]]:
    """Questions, as the caller has them, and their new tokens, int32 [tokens]: lists of those that have just ended.

    Args:
        loaded: the phase's groups, in its order, or some of them; they are taken as there is room for them.
        ends: of a question whose answer may end before `options` say so.
    """
    answers = _Answers()
    requests = (request for group in loaded for request in _requests(group, options, ends, answers))
    batch = ContinuousBatch(engine, params, phase.shape)
    for _ in run(batch, requests):
        while answers.cut:
            batch.scheduler.cancel(answers.cut.pop())
        if answers.ended:
            yield answers.ended.copy()
            answers.ended.clear()


@dataclass(frozen=True)
class _Answers:
    """What the answers to a phase's requests have come to since it was looked at last."""

    ended: list[tuple[Any, np.ndarray]] = field(default_factory=list)
    cut: list[Request] = field(default_factory=list)  # ended here, while the batch goes on with them

    def emit(self, question, request: Request, tokens: list[int], ends: Ends | None, update: Update) -> None:
        """Take what is new of an answer whose tokens so far are these."""
        if update.finish is Finish.CANCELLED:  # by `cut`: it is among the ended already
            return
        for token in update.tokens:
            tokens.append(token.id)
            if ends is not None and ends(token.id):
                if update.finish is None:
                    self.cut.append(request)
                break
        else:
            if update.finish is None:
                return
        self.ended.append((question, np.array(tokens, np.int32)))


def _requests(
    loaded: LoadedGroup, options: Options, ends: Callable[[Any], Ends | None], answers: _Answers
) -> Iterator[Request]:
    """A group's, the longest answers first."""
    group, images = loaded
    asked = zip(group.suffixes, group.questions, map(options, group.questions), strict=True)
    for suffix, question, how in sorted(asked, key=lambda one: one[2].max_new_tokens, reverse=True):
        prompt = SplitPrompt(np.concatenate([group.prefix, suffix]), len(group.prefix), images)
        yield _request(prompt, how, question, ends(question), answers)


def _request(prompt: SplitPrompt, how: RowOptions, question, ends: Ends | None, answers: _Answers) -> Request:
    tokens: list[int] = []
    request = Request(prompt, how, lambda update: answers.emit(question, request, tokens, ends, update))
    return request


class Scored(NamedTuple):
    """A question's own ids after its prompt."""

    logprob: float  # the sum over them
    greedy: bool  # greedy decoding would choose each of them


def score(
    engine: Engine, params, phase: Phase, loaded: Iterable[LoadedGroup], starts: Callable[[Any], int]
) -> Iterator[list[tuple[Any, Scored]]]:
    """How likely the groups' suffixes are, whose first id all of a group have and does not count: lists of those that
    have just been scored.

    starts: where in a question's ids, those of the prefix included, its own begin.
    """
    heard: list[tuple[Group, Scores]] = []
    for _ in run(ContinuousBatch(engine, params, phase.shape), (_scored(group, starts, heard) for group in loaded)):
        for group, scores in heard:
            yield [
                (question, Scored(float(logprob), bool(greedy)))
                for question, logprob, greedy in zip(group.questions, scores.logprobs, scores.greedy, strict=True)
            ]
        heard.clear()


def _scored(loaded: LoadedGroup, starts: Callable[[Any], int], heard: list) -> ScoreRequest:
    group, images = loaded
    ids = np.concatenate([group.prefix, group.suffixes[0][:1]])
    candidates = [suffix[1:] for suffix in group.suffixes]
    prompt = SplitPrompt(ids, len(group.prefix), images)
    skipped = [starts(question) - len(ids) for question in group.questions]
    return ScoreRequest(prompt, candidates, lambda scores: heard.append((group, scores)), skipped)
