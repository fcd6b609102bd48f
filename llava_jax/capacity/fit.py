"""How many prefixes a continuous batch has room for, by what the compiler makes of its programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llava_jax.capacity.ahead import chip_bytes
from llava_jax.capacity.programs import Program, Programs
from llava_jax.inference.batch_shape import memory_bytes
from llava_jax.inputs.groups import MAX_GROUPS

TRIES = 4  # batches compiled on the way to the largest


@dataclass(frozen=True)
class Batch:
    """A batch of some number of prefixes. Bytes are of HBM on one chip."""

    cache: int  # pools and rows
    needed: int  # the most that a chip holds at any time, parameters and the code of all programs included
    planned: int  # what `batch_shape.memory_bytes` says of pools, rows and programs
    decode: Program


@dataclass(frozen=True)
class Capacity:
    """What a slice has room for. Bytes are of HBM on one chip."""

    params: int
    prefix: int  # of one prefix (of one on each of the mesh's shards of rows)
    groups: int  # the most prefixes that fit; 0: not even one, and there are no programs
    programs: dict[str, Program]  # encode, prefill, question, which work on one prefix of each shard
    batches: dict[int, Batch]  # by their number of prefixes


def largest_batch(programs: Programs, room: float) -> Capacity:
    """The most prefixes that fit, of those that parameters and cache alone leave room for, and what was compiled on the
    way, for a batch of the programs' shape but of any number of prefixes."""
    shards, params = programs.shape.shards, chip_bytes(programs.params)
    one = replace(programs, shape=replace(programs.shape, per_shard=1))
    prefix, bound = chip_bytes(one.pools), int((room - params) // one.cache_bytes)
    usual = replace(programs, shape=replace(programs.shape, per_shard=max(1, min(bound, MAX_GROUPS))))
    prefill = usual.prefill() if bound >= 1 else None
    question = usual.questions(usual.shape.blocks[0]) if prefill else None
    if prefill is None or question is None:
        return Capacity(params, prefix, 0, {}, {})
    once = {"encode": usual.encode(), "prefill": prefill, "question": question}

    def compiled(size: int) -> Batch | None:
        sized = replace(programs, shape=replace(programs.shape, per_shard=size))
        decode = sized.decode()
        if decode is None:
            return None
        planned = memory_bytes(sized.shape, sized.config, sized.layout)
        return Batch(sized.cache_bytes, params + needed(sized.cache_bytes, [*once.values(), decode]), planned, decode)

    tried = search(compiled, room, params, bound)
    groups = max((size for size, batch in tried.items() if batch.needed <= room), default=0)
    batches = {size * shards: batch for size, batch in tried.items()}
    return Capacity(params, prefix, groups * shards, once if groups else {}, batches)


def needed(cache: int, programs: Sequence[Program]) -> int:
    """The most that one chip holds at any time, parameters aside: one program at a time, beside pools and rows."""
    return cache + max(program.total for program in programs) + sum(program.code for program in programs)


def search(compiled: Callable[[int], Batch | None], room: float, params: int, bound: int) -> dict[int, Batch]:
    """Batches of up to `bound` prefixes, the largest that fits among them: first the usual one, then again and again
    where the line through the two that are nearest to the room meets it. `compiled` makes a number of prefixes into
    their Batch, or None where the compiler itself finds no room."""
    size = min(MAX_GROUPS, bound)
    tried: dict[int, Batch] = {}
    while size not in tried and len(tried) < TRIES:
        batch = compiled(size)
        if batch is None:
            bound, size = size - 1, (max(tried, default=0) + size) // 2
            if size:
                continue
            break
        tried[size] = batch
        near, far = (sorted(tried, key=lambda size: abs(tried[size].needed - room)) * 2)[:2]
        origin, at_origin = (0, params) if near == far else (far, tried[far].needed)
        each = max(1, (tried[near].needed - at_origin) / (near - origin))
        size = min(bound, max(1, int(near + (room - tried[near].needed) // each)))
        if size in tried and len(tried) == 1:  # one point is no line
            size = min(bound, size + 1)
    return dict(sorted(tried.items()))
