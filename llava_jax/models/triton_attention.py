"""Attention over both parts of the cache in one pass, as a kernel for GPUs (Pallas, Triton).

Flash attention (arXiv:2205.14135), of all the rows that share a prefix at once: scores are never written to memory, and
neither a prefix's padding nor a suffix's empty slots are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llava_jax.models.attention import MASKED
from llava_jax.models.parts import Part, join_along_first_axis
from llava_jax.models.quantize import Int8
from llava_jax.parallel.target import AMPERE, Gpu

MIN_QUERIES, MAX_QUERIES = 16, 128  # of a tile: the fewest that a tensor core multiplies, the most that registers hold
MAX_QUERIES_HOPPER = 64  # an H200 took 162 us for 16 questions of 64 positions, and 172 in tiles of 128
WARP_QUERIES = 16  # of a tile, for each warp; four warps at least
MANY_KEYS, FEW_KEYS = 64, 32  # read at a time; before Hopper, registers hold fewer beside more than the fewest queries
MIN_WIDTH, MAX_WIDTH = 16, 128  # of a head
HOPPER = (9, 0)
LARGE_SHARED_MEMORY = (8, 0), (9, 0), (10, 0)  # those with more than 128 KiB of it a multiprocessor
TINY = 1e-30  # in place of a sum of no weights


@dataclass(frozen=True)
class Tiling:
    """How the work on one kv head of one prefix is divided among programs."""

    queries: int  # of one tile, a power of 2
    keys: int  # read at a time, a power of 2
    splits: int  # programs that share a tile, each with a part of the keys
    warps: int
    stages: int  # blocks of keys that are under way at once


def choose_tiling(queries: int, heads: int, gpu: Gpu) -> Tiling:
    """For `queries` of each kv head (rows x positions x query heads of its group), and that many kv heads of prefixes.

    Where programs are few, they are split until every multiprocessor has one.
    """
    most = MAX_QUERIES_HOPPER if gpu.compute_capability >= HOPPER else MAX_QUERIES
    tile = min(most, max(MIN_QUERIES, pl.next_power_of_2(queries)))
    splits = max(1, gpu.multiprocessors // (heads * pl.cdiv(queries, tile)))
    stages = 3 if gpu.compute_capability in LARGE_SHARED_MEMORY else 2
    keys = MANY_KEYS if gpu.compute_capability >= HOPPER or tile == MIN_QUERIES else FEW_KEYS
    return Tiling(tile, keys, splits, max(4, tile // WARP_QUERIES), stages)


def takes(q: jax.Array, gpu: Gpu) -> bool:
    """Half precision (float32 has more than the registers hold), and what Triton has: Ampere or later, powers of 2."""
    width = q.shape[-1]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and gpu.compute_capability >= AMPERE and MIN_WIDTH <= width <= MAX_WIDTH and width & (width - 1) == 0


def triton_attention(q, owns, prefix_k, prefix_v, tiling: Tiling, interpret: bool = False) -> jax.Array:
    """New positions over the prefix that rows share, read once for a tile of them, and over each row's own positions.

    Args:
        q: [G, R, L, H, D], of the rows of all `owns` side by side, as is what comes out; D a power of 2, at least 16.
        owns: blocks of rows, see `cache_attention.Own`. One whose `valid` is None is the only one, and each position
            sees those up to itself (S = L).
        prefix_k, prefix_v: [G, K, P, D], arrays or Int8; H a multiple of K (grouped queries).
        interpret: run it in Pallas' interpreter, on any platform.
    """
    groups, rows, length, heads, width = q.shape
    kv_heads = owns[0].suffix[0].shape[1]
    q_tokens = q.reshape(groups, rows * length, heads, width)
    prefix_lengths = reduce(jnp.maximum, [own.prefix_lengths for own in owns])
    inputs = _Inputs(q_tokens, prefix_k, prefix_v, prefix_lengths, [_own_inputs(own) for own in owns])

    out: Any = jax.ShapeDtypeStruct(q_tokens.shape, q.dtype)
    if tiling.splits > 1:
        whole = jax.ShapeDtypeStruct((tiling.splits, *q_tokens.shape), jnp.float32)
        each = jax.ShapeDtypeStruct(whole.shape[:-1], jnp.float32)
        out = (whole, each, each)  # a Part for each split
    sizes = _Sizes(tiling, tuple(own.suffix[0].shape[2] for own in owns), length, heads // kv_heads)
    run = pl.pallas_call(
        partial(_kernel, sizes),
        grid=(sizes.tiles * tiling.splits, kv_heads, groups),
        in_specs=(_input_blocks(inputs),),
        out_specs=_output_blocks(out, sizes.tiles),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="cache_attention",
    )
    out = run(inputs)
    if tiling.splits > 1:
        out = join_along_first_axis(Part(*out)).astype(q.dtype)
    return out.reshape(q.shape)


class _OwnInputs(NamedTuple):
    """A block's arrays, or what belongs to the program's prefix and kv head."""

    k: Any  # [R·S, D]
    v: Any
    valid: Any | None  # int8 [R·S]
    used: Any | None  # [], slots of each row


class _Inputs(NamedTuple):
    """The kernel's arrays, or what a program may look at of them: what belongs to its kv head, or to its prefix."""

    q: Any  # [R·L, H, D]
    prefix_k: Any  # [P, D]
    prefix_v: Any
    prefix_length: Any  # []
    owns: list[_OwnInputs]


def _own_inputs(own) -> _OwnInputs:
    groups, kv_heads, rows, slots, width = own.suffix[0].shape
    k, v = (x.reshape(groups, kv_heads, rows * slots, width) for x in own.suffix)
    if own.valid is None:
        return _OwnInputs(k, v, None, None)
    used = jnp.where(own.valid, jnp.arange(1, slots + 1), 0).max((1, 2))
    return _OwnInputs(k, v, own.valid.reshape(groups, rows * slots).astype(jnp.int8), used)


def _input_blocks(inputs: _Inputs) -> _Inputs:
    def of_prefix(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, head, group: (group, *(0,) * (x.ndim - 1)))

    def of_head(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, head, group: (group, head, *(0,) * (x.ndim - 2)))

    def blocks(x: NamedTuple, by_head: tuple[str, ...]) -> dict[str, Any]:
        return {name: jax.tree.map(of_head if name in by_head else of_prefix, y) for name, y in x._asdict().items()}

    owns = [_OwnInputs(**blocks(own, ("k", "v"))) for own in inputs.owns]
    return _Inputs(**blocks(inputs, ("prefix_k", "prefix_v")))._replace(owns=owns)


def _output_blocks(out, tiles: int):
    """Of each prefix, or of each split of each prefix."""

    def block(x):
        return pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda i, head, group: (i // tiles, group, *(0,) * (x.ndim - 2))
        )

    if isinstance(out, tuple):
        return jax.tree.map(block, out)
    return pl.BlockSpec((None, *out.shape[1:]), lambda i, head, group: (group, *(0,) * (out.ndim - 1)))


@dataclass(frozen=True)
class _Sizes:
    """What is known when the kernel is compiled."""

    tiling: Tiling
    rows: tuple[int, ...]  # of each block
    length: int  # new positions of each row
    group: int  # query heads of a kv head

    @property
    def queries(self) -> int:
        """Of one kv head of one prefix."""
        return sum(self.rows) * self.length * self.group

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.queries, self.tiling.queries)


def _kernel(sizes: _Sizes, inputs: _Inputs, *out: Any) -> None:
    """A tile of queries of one kv head and prefix over its split of the keys: the prefix's, then the rows' own."""
    queries, group, width = sizes.tiling.queries, sizes.group, inputs.q.shape[-1]
    split, tile = pl.program_id(0) // sizes.tiles, pl.program_id(0) % sizes.tiles
    query = tile * queries + jnp.arange(queries)
    token, head = query // group, pl.program_id(1) * group + query % group
    place = token[:, None], head[:, None], jnp.arange(width)[None]
    here = query < sizes.queries
    here_all = jnp.broadcast_to(here[:, None], (queries, width))
    q = triton.load(inputs.q.at[place], mask=here_all, other=0)

    parts, first_row = [_over_prefix(inputs, q, sizes.tiling.keys)], 0
    for own, rows in zip(inputs.owns, sizes.rows, strict=True):
        parts.append(_over_own(sizes, own, range(first_row, first_row + rows), q, token, tile))
        first_row += rows
    blocks = reduce(add, [part.blocks for part in parts])
    share = pl.cdiv(blocks, sizes.tiling.splits)
    first, last = split * share, jnp.minimum((split + 1) * share, blocks)
    sums = Part(
        jnp.zeros((queries, width), jnp.float32),
        jnp.full(queries, MASKED, jnp.float32),
        jnp.zeros(queries, jnp.float32),
    )
    for part in parts:
        sums = jax.lax.fori_loop(jnp.maximum(first, 0), jnp.minimum(last, part.blocks), part.step, sums)
        first, last = first - part.blocks, last - part.blocks

    weight = jnp.maximum(sums.weight, TINY)
    if sizes.tiling.splits == 1:
        whole = sums.sum / weight[:, None]
        triton.store(out[0].at[place], whole.astype(q.dtype), mask=here_all)
    else:
        to_sum, to_largest, to_weight = out
        triton.store(to_sum.at[place], sums.sum, mask=here_all)
        triton.store(to_largest.at[token, head], sums.largest * math.log(2), mask=here)
        triton.store(to_weight.at[token, head], weight, mask=here)


class _Keys(NamedTuple):
    """A part of the cache as the loop sees it."""

    blocks: Any  # how many hold something to look at
    step: Any  # (block, Part) → Part


def _over_prefix(inputs: _Inputs, q, keys: int) -> _Keys:
    length = inputs.prefix_length[...]

    def step(block, sums: Part) -> Part:
        start = block * keys
        whole = jax.tree.leaves(inputs.prefix_k)[0].shape[0] % keys == 0
        k, v = jax.tree.map(lambda x: _load(x, start, keys, whole), (inputs.prefix_k, inputs.prefix_v))
        return _attend(q, k, v, (start + jnp.arange(keys) < length)[None], sums)

    return _Keys(pl.cdiv(length, keys), step)


def _over_own(sizes: _Sizes, own: _OwnInputs, rows: range, q, token, tile) -> _Keys:
    """Those of a block's rows that are in the tile, one after another; a query sees what is its own row's."""
    length, keys = sizes.length, sizes.tiling.keys
    slots = own.k.shape[0] // len(rows)
    whole = slots % keys == 0
    first = jnp.maximum(tile * sizes.tiling.queries // sizes.group, rows.start * length)
    last = jnp.minimum(((tile + 1) * sizes.tiling.queries - 1) // sizes.group, rows.stop * length - 1)
    first_row, last_row = first // length, last // length
    causal = own.used is None
    used = jnp.where(first_row == last_row, last % length + 1, length) if own.used is None else own.used[...]
    blocks = pl.cdiv(used, keys)

    def step(block, sums: Part) -> Part:
        row, start = first_row + block // blocks, block % blocks * keys
        place = (row - rows.start) * slots + start
        k, v = (_load(x, place, keys, whole) for x in (own.k, own.v))
        slot = start + jnp.arange(keys)
        seen = (token // length == row)[:, None]
        if causal:
            seen &= slot[None] <= (token % length)[:, None]
        else:
            valid = _load(own.valid, place, keys, whole)
            seen &= ((slot < used) & (valid != 0))[None]
        return _attend(q, k, v, seen, sums)

    return _Keys(jnp.maximum(last_row - first_row + 1, 0) * blocks, step)


def _load(ref, start, keys: int, whole: bool):
    """A block of a part's positions. Unless all are `whole`, zeros stand behind the part's end."""
    at = ref.at[pl.ds(start, keys)] if ref.ndim == 1 else ref.at[pl.ds(start, keys), :]
    if whole:
        return triton.load(at)
    inside = start + jnp.arange(keys) < ref.shape[0]
    mask = inside if ref.ndim == 1 else jnp.broadcast_to(inside[:, None], (keys, ref.shape[1]))
    return triton.load(at, mask=mask, other=0)


def _attend(q, k, v, seen, sums: Part) -> Part:
    """One more block of keys. Scores are powers of 2. An int8 position's scale meets its score, or its weight."""
    k, k_scale = (k.values.astype(q.dtype), k.scale[None]) if isinstance(k, Int8) else (k, 1)
    v, v_scale = (v.values.astype(q.dtype), v.scale[None]) if isinstance(v, Int8) else (v, 1)
    scores = triton.dot(q, k, trans_b=True) * (q.shape[-1] ** -0.5 * math.log2(math.e) * k_scale)
    scores = jnp.where(seen, scores, MASKED)
    largest = jnp.maximum(sums.largest, scores.max(1))
    weights, fade = jnp.exp2(scores - largest[:, None]), jnp.exp2(sums.largest - largest)
    out = sums.sum * fade[:, None] + triton.dot((weights * v_scale).astype(v.dtype), v)
    return Part(out, largest, sums.weight * fade + weights.sum(1))
