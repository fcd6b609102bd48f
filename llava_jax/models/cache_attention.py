"""Attention over a cache of two parts: a prefix that R rows share, and each row's own positions, under one softmax.

Exact, no approximation: the weights on both parts are normalised together (Hydragen, arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from llava_jax.models import prefix_attention, tpu_attention
from llava_jax.models.attention import MASKED, splash_takes
from llava_jax.models.parts import join, nothing, split_rows
from llava_jax.models.quantize import values_and_scale
from llava_jax.parallel.sharding import BATCH_AXES, dividing_axes
from llava_jax.parallel.target import target_gpu, target_platform


def question_attention(q, k, v, prefix_k, prefix_v, prefix_lengths) -> jax.Array:
    """Questions of Q positions: each position sees its prefix, and its own question up to itself.

    Args:
        q: [G, R, Q, H, D], as is what comes out; k, v: [G, K, R, Q, D], H a multiple of K (grouped queries).
        prefix_k, prefix_v: [G, K, P, D], arrays or Int8.
        prefix_lengths: int32 [G], how many positions of the prefix are no padding.
    """
    arguments, platforms = (q, [Own((k, v), None, prefix_lengths)], prefix_k, prefix_v), _kernel_for_gpu(q)
    if tpu_attention.splash_takes_questions(q, prefix_k):
        platforms["tpu"] = partial(_on_mesh, tpu_attention.question_by_splash)
    return jax.lax.platform_dependent(*arguments, default=_questions_by_xla, **platforms)


class Own(NamedTuple):
    """What rows have of their own: a suffix with S slots, in which new positions have their keys and values."""

    suffix: Any  # (k, v), [G, K, R, S, D]
    valid: Any  # bool [G, R, S], what a row sees of it; None: each position sees those up to itself
    prefix_lengths: Any  # int32 [G], how many positions they see of each prefix


class Appended(NamedTuple):
    """A new position of each row, which goes into a slot of what the rows have."""

    new: Any  # (k, v), [G, K, R, 1, D]
    slot: jax.Array  # int32, the same for all rows
    writes: jax.Array | None  # bool [G, R], the rows that get theirs; None: all
    own: Own  # without the new position, but for its `valid`


def decode_attention(q, suffix_k, suffix_v, suffix_valid, prefix_k, prefix_v, prefix_lengths) -> jax.Array:
    """One new position a row: it sees its prefix, and what is valid in its suffix, itself included.

    Args:
        q: [G, R, 1, H, D], as is what comes out.
        suffix_k, suffix_v: [G, K, R, S, D]; suffix_valid: bool [G, R, S].
        prefix_k, prefix_v, prefix_lengths: as in `question_attention`.
    """
    return _decode(False, q, [Own((suffix_k, suffix_v), suffix_valid, prefix_lengths)], prefix_k, prefix_v)


def attend_and_append(q, blocks: list[Appended], prefix_k, prefix_v) -> tuple[jax.Array, list]:
    """`decode_attention` of new positions whose rows share their prefixes, but have suffixes of several lengths.

    Args:
        q: [G, R, 1, H, D], of the blocks' rows side by side; prefix_k, prefix_v: as in `question_attention`.

    Returns:
        (out [G, R, 1, H, D], each block's suffix with the new positions)
    """
    few_live = any(block.writes is not None for block in blocks)  # some rows rest, and may be all of a prefix's
    first, last = partial(_append_first, few_live), partial(_append_last, few_live)
    return jax.lax.platform_dependent(q, blocks, prefix_k, prefix_v, default=first, tpu=last)


def keeps_scores(head_dim: int, dtype) -> bool:
    """Whether questions have the scores of all their heads in memory at once, in programs for the mesh of
    `jax.set_mesh`, or without one for this process's devices. Kernels keep none, and a CPU those of one head."""
    platform = target_platform()
    if platform == "tpu":
        return not splash_takes(128, head_dim, dtype)
    return platform != "cpu" and not _kernel_for_gpu(jax.ShapeDtypeStruct((1, 1, 1, 1, head_dim), dtype))


def _append_first(few_live: bool, q, blocks: list[Appended], *prefix):
    owns = [block.own._replace(suffix=_append(block)) for block in blocks]
    return _decode(few_live, q, owns, *prefix), [own.suffix for own in owns]


def _append_last(few_live: bool, q, blocks: list[Appended], prefix_k, prefix_v):
    few = partial(_on_mesh_by_prefix, tpu_attention.over_few)
    over_prefix = few if few_live and q.shape[1] <= tpu_attention.FEW_ROWS else tpu_attention.over_all
    out = tpu_attention.decode_apart(q, blocks, prefix_k, prefix_v, over_prefix)
    news = [block.new for block in blocks]
    out, news = jax.lax.optimization_barrier((out, news))  # read, then write: else XLA may copy a suffix to write there
    return out, [_append(block._replace(new=new)) for block, new in zip(blocks, news, strict=True)]


def _append(block: Appended):
    """The suffix with the new positions. All layouts are said, for XLA would rather have slots in front."""

    def put(old, x):
        if block.writes is not None:
            kept = row_major(jax.lax.dynamic_slice_in_dim(old, block.slot, 1, axis=3))
            x = row_major(jnp.where(block.writes[:, None, :, None, None], x, kept))
        new = jax.lax.dynamic_update_slice_in_dim(drop_ones(old), drop_ones(x), block.slot, axis=-2)
        return row_major(restore_ones(new, old.shape))

    return tuple(put(old, x) for old, x in zip(block.own.suffix, block.new, strict=True))


def drop_ones(x: jax.Array) -> jax.Array:
    """x [G, K, R, S, D] without those of its first three axes that have one element, as XLA's products have it: where
    a loop keeps them, a CPU copies a suffix at each step to write into it."""
    return x.reshape([size for size in x.shape[:3] if size > 1] + list(x.shape[3:]))


def restore_ones(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `drop_ones` was given, by its shape."""
    return x if x.shape == shape else row_major(x.reshape(shape), on_cpu=True)


def row_major(x: jax.Array, on_cpu: bool = False) -> jax.Array:
    """x [G, K, …], each axis inside the one before it in memory: else XLA may turn a whole cache round to write some of
    it, a suffix before the decode loop and after it, and for a GPU's kernel at each step.

    on_cpu: there too, where what makes x must not be one with what reads it.
    """

    def constrain(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def constrain_each(x):  # on a mesh XLA would gather the whole array for it
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return constrain(x)
        by_head = P(dividing_axes(mesh, BATCH_AXES, len(x)), dividing_axes(mesh, ("tensor",), x.shape[1]))
        return jax.shard_map(constrain, in_specs=by_head, out_specs=by_head, check_vma=False)(x)

    platforms = {"tpu": True, "cuda": target_gpu() is not None, "cpu": on_cpu}
    each = {platform: constrain_each for platform, wanted in platforms.items() if wanted}
    return jax.lax.platform_dependent(x, default=lambda x: x, **each)


def _kernel_for_gpu(q) -> dict[str, Callable]:
    """{"cuda": what takes `_questions_by_xla`'s arguments}, if the program is for a GPU that has it."""
    gpu = target_gpu()
    if gpu is None:
        return {}
    from llava_jax.models import triton_attention  # half a second, only where it is needed

    if not triton_attention.takes(q, gpu):
        return {}

    def attend(q, owns, prefix_k, prefix_v):
        groups, rows, length, heads, _ = q.shape
        kv_heads = owns[0].suffix[0].shape[1]
        tiling = triton_attention.choose_tiling(rows * length * heads // kv_heads, groups * kv_heads, gpu)
        return triton_attention.triton_attention(q, owns, prefix_k, prefix_v, tiling)

    return {"cuda": partial(_on_mesh, attend)}


def _decode(few_live: bool, q, owns: list[Own], prefix_k, prefix_v) -> jax.Array:
    """A prefix is read once for the rows of all blocks."""
    platforms, in_parts = _kernel_for_gpu(q), partial(_in_parts, prefix_attention.over_all)
    if few_live:
        platforms["cpu"] = partial(_in_parts, partial(_on_mesh_by_prefix, prefix_attention.over_few))
    return jax.lax.platform_dependent(q, owns, prefix_k, prefix_v, default=in_parts, **platforms)


def _in_parts(over_prefix, q, owns: list[Own], prefix_k, prefix_v):
    groups, kv_heads, _, _, width = owns[0].suffix[0].shape
    heads = q.reshape(groups, q.shape[1], kv_heads, -1, width).swapaxes(1, 2)  # [G, K, R, h, D]
    lengths = reduce(jnp.maximum, [own.prefix_lengths for own in owns])
    shared = over_prefix(heads.reshape(groups, kv_heads, -1, width), prefix_k, prefix_v, lengths)
    shared = jax.tree.map(lambda x: x.reshape(*heads.shape[:4], *x.shape[3:]), shared)
    parts = []
    for rows, own in zip(split_rows(heads, owns, 2), owns, strict=True):
        k, v = own.suffix
        parts.append(prefix_attention.add(nothing(rows), rows, k, v, own.valid[:, None, :, None]))
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *parts)
    return join(shared, joined).astype(q.dtype).swapaxes(1, 2).reshape(q.shape)


def _on_mesh_by_prefix(attend, q, k, v, lengths):
    """`attend`, q [G, K, X, D], on each device's prefixes and heads, as `_on_mesh`: a device's own may be few."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, lengths)
    groups, heads = dividing_axes(mesh, BATCH_AXES, len(q)), dividing_axes(mesh, ("tensor",), q.shape[1])
    by_head = P(groups, heads)
    run = jax.shard_map(attend, in_specs=(by_head, by_head, by_head, P(groups)), out_specs=by_head, check_vma=False)
    return run(q, k, v, lengths)


def _on_mesh(attend, q, owns: list[Own], prefix_k, prefix_v):
    """A kernel on each device's prefixes (`data`, `fsdp`) and heads (`tensor`), where the mesh's axes divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, owns, prefix_k, prefix_v)
    kv_heads = owns[0].suffix[0].shape[1]
    groups, heads = dividing_axes(mesh, BATCH_AXES, len(q)), dividing_axes(mesh, ("tensor",), kv_heads)
    queries, by_head, by_group = P(groups, None, None, heads), P(groups, heads), P(groups)
    specs = queries, [Own(by_head, by_group, by_group)] * len(owns), by_head, by_head
    run = jax.shard_map(attend, in_specs=specs, out_specs=queries, check_vma=False)
    return run(q, owns, prefix_k, prefix_v)


def _questions_by_xla(q, owns: list[Own], prefix_k, prefix_v):
    """q [G, R, Q, H, D]; the one block's k, v [G, K, R, Q, D]."""
    (own,), (groups, rows, length) = owns, q.shape[:3]
    k, v = own.suffix
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (groups, rows, length, length))
    heads = q.reshape(*q.shape[:3], k.shape[1], -1, q.shape[-1]).transpose(0, 3, 1, 2, 4, 5)  # [G, K, R, L, h, D]
    in_prefix = jnp.arange(jax.tree.leaves(prefix_k)[0].shape[2]) < own.prefix_lengths[:, None]
    arguments = heads, prefix_k, prefix_v, k, v, in_prefix, seen
    over_heads = jax.vmap(_two_parts, in_axes=(0, 0, 0, 0, 0, None, None))
    one_head_at_a_time = {"cpu": _two_parts_mapped} if q.shape[2] > 1 else {}  # its scores stay in the cache
    out = jax.lax.platform_dependent(*arguments, default=jax.vmap(over_heads), **one_head_at_a_time)
    return out.transpose(0, 2, 3, 1, 4, 5).reshape(q.shape)


def _two_parts_mapped(*arguments):
    def of_group(group):
        heads, valid = group[:5], group[5:]
        return jax.lax.map(lambda head: _two_parts(*head, *valid), heads)

    return jax.lax.map(of_group, arguments)


def _two_parts(q, prefix_k, prefix_v, k, v, in_prefix, seen):
    """One kv head of one group: q [R, L, h, D], prefix [P, D], k and v [R, S, D], in_prefix [P], seen [R, L, S].

    An int8 position's scale meets its score, or its weight, instead of its D numbers.
    """
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5
    prefix_k, k_scale = values_and_scale(prefix_k, q.dtype)
    prefix_v, v_scale = values_and_scale(prefix_v, q.dtype)
    if q.shape[1] == 1:  # the keys first: second, a CPU would turn all of them round
        over_prefix = einsum("pd,rlhd->prlh", prefix_k, q).transpose(1, 2, 3, 0)
    else:
        over_prefix = einsum("rlhd,pd->rlhp", q, prefix_k)
    over_prefix = over_prefix * (scale * k_scale)
    over_own = einsum("rlhd,rsd->rlhs", q, k) * scale
    over_prefix = jnp.where(in_prefix, over_prefix, MASKED)
    over_own = jnp.where(seen[:, :, None], over_own, MASKED)
    largest = jnp.maximum(over_prefix.max(-1, keepdims=True), over_own.max(-1, keepdims=True))
    on_prefix, on_own = jnp.exp(over_prefix - largest), jnp.exp(over_own - largest)
    out = einsum("rlhp,pd->rlhd", (on_prefix * v_scale).astype(prefix_v.dtype), prefix_v)
    out += einsum("rlhs,rsd->rlhd", on_own.astype(v.dtype), v)
    return (out / (on_prefix.sum(-1, keepdims=True) + on_own.sum(-1, keepdims=True))).astype(q.dtype)
