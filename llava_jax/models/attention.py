"""Attention over whole sequences, one kernel for each platform (`cache_attention.py`: over a cache)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llava_jax.parallel.sharding import BATCH_AXES, dividing_axes
from llava_jax.parallel.target import AMPERE, target_gpu

QUERY_CHUNK = 512  # rows of scores alive at once on the chunked path: [B, H, QUERY_CHUNK, L], never [B, H, L, L]
SPLASH_BLOCKS = 512, 256, 128  # positions at a time, of queries and of keys
MASKED = -1e30  # finite, so that a row with nothing to attend to gives numbers and not NaN


# ---- whole sequences


@jax.jit  # traced once for all the layers of a model
def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Causal self-attention: splash on TPU, cudnn's flash attention on GPU, chunks of queries elsewhere.

    The platform is the one that the program is lowered for. On a mesh, call it under `jax.set_mesh(mesh)`: rows are
    then divided over its `data` and `fsdp` axes and heads over `tensor`, where those divide them (a TPU kernel knows
    of no mesh by itself). Differentiable; no path holds the whole [L, L] scores, the backward pass included.

    Args:
        q: [B, L, H, D]; k, v: [B, L, K, D], H a multiple of K (grouped queries).
        valid: bool [B, L], False at padding, which stands before or after a row's tokens. None where it stands
            only after them: causality hides it then, and nothing is spent on a mask.

    Returns:
        [B, L, H, D]; finite but meaningless at padding.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _on_one_device(q, k, v, valid)
    rows = dividing_axes(mesh, BATCH_AXES, len(q))
    heads = PartitionSpec(rows, None, dividing_axes(mesh, ("tensor",), k.shape[2]))
    specs = heads, heads, heads, PartitionSpec(rows)
    return jax.shard_map(_on_one_device, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, valid)


def _on_one_device(q, k, v, valid):
    platforms = {"cpu": head_by_head_attention}
    if splash_takes(q.shape[1], q.shape[-1], q.dtype):
        platforms["tpu"] = splash_attention
    if _cudnn_takes(q.shape[-1], q.dtype):
        platforms["cuda"] = cudnn_attention
    return jax.lax.platform_dependent(q, k, v, valid, default=chunked_attention, **platforms)


def causal_mask(valid: jax.Array, start: int, stop: int) -> jax.Array:
    """bool [B, stop - start, stop]: which of the first `stop` keys the queries start..stop may see; valid [B, L]."""
    return valid[:, None, :stop] & (jnp.arange(stop) <= jnp.arange(start, stop)[:, None])


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`causal_attention`, a chunk of queries at a time, each over the keys up to its own end."""
    return _heads_last(_over_chunks(*_heads_first(q, k, v), valid))


def head_by_head_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`chunked_attention` of one head after another, whose scores a CPU's cache holds, or nearly."""

    def of_row(row):  # q [K, H/K, L, D], k and v [K, L, D], valid [L]
        *heads, valid = row
        valid = None if valid is None else valid[None]
        return jax.lax.map(lambda group: of_group(group, valid), heads)

    def of_group(group, valid):  # q [H/K, L, D], k and v [L, D]
        q, k, v = group
        one = jax.checkpoint(lambda q: _over_chunks(q[None, None, None], k[None, None], v[None, None], valid)[0, 0, 0])
        return jax.lax.map(one, q)

    return _heads_last(jax.lax.map(of_row, (*_heads_first(q, k, v), valid)))


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, L, H, D] and k, v [B, L, K, D] → [B, K, H/K, L, D] and [B, K, L, D]."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    return grouped.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _heads_last(out):
    """[B, K, H/K, L, D] → [B, L, H, D]."""
    batch, kv_heads, group, length, width = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _over_chunks(q, k, v, valid):
    """Heads first, in and out. The backward pass computes each chunk's scores again."""
    out = []
    for start in range(0, q.shape[-2], QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, q.shape[-2])
        chunk = jax.checkpoint(partial(_attend_chunk, start=start))
        keys = None if valid is None else valid[:, :stop]
        out.append(chunk(q[..., start:stop, :], k[:, :, :stop], v[:, :, :stop], keys))
    return jnp.concatenate(out, axis=-2)


def _attend_chunk(q, k, v, valid, start: int):
    """The queries from `start` on, [B, K, H/K, C, D], over k, v [B, K, start + C, D]; softmax in float32."""
    length = k.shape[2]
    scores = jnp.einsum("bkhld,bksd->bkhls", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = jnp.arange(length) <= jnp.arange(start, length)[:, None]
    seen = seen if valid is None else causal_mask(valid, start, length)[:, None, None]
    scores = jnp.where(seen, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum("bkhls,bksd->bkhld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)  # [L, D] divisions instead of [L, L]


def splash_takes(length: int, width: int, dtype) -> bool:
    """Keys of that many positions, `width` numbers each. Its blocks are 128 positions at least; heads of less than half
    a 128-wide lane would waste it."""
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")  # type: ignore[attr-defined]
    half = dtype != jnp.float32  # its products of half precision cannot be asked to be more exact than they are
    return length % 128 == 0 and width % 64 == 0 and not (half and exact)


def splash_block(length: int) -> int:
    """The largest of splash's blocks that divides this many positions."""
    return next(size for size in SPLASH_BLOCKS if length % size == 0)


def splash_attention(q, k, v, valid, interpret: bool = False) -> jax.Array:
    """`causal_attention` by the Pallas TPU kernel (jax.experimental.pallas.ops.tpu.splash_attention).

    L must be a multiple of 128, D of 64. Padding is a segment of its own, which sees itself and nothing else.
    `interpret` runs it in Pallas' interpreter, on any platform.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, only where it is needed

    length, heads = q.shape[1:3]
    block = splash_block(length)
    forward: dict[str, Any] = dict(block_q=block, block_kv=block, block_kv_compute=block)
    backward: dict[str, Any] = dict(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**forward, **backward, block_kv_dq=block),
        interpret=interpret,
    )
    segments = None if valid is None else splash.SegmentIds(valid.astype(jnp.int32), valid.astype(jnp.int32))
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not
    out = jax.vmap(kernel)(scaled.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
    return out.swapaxes(1, 2)


def _cudnn_takes(width: int, dtype) -> bool:
    """Heads of `width` numbers. It has no float32, and wants an Ampere or later."""
    gpu = target_gpu()
    if gpu is None or gpu.compute_capability < AMPERE or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return width % 8 == 0 and width <= (256 if gpu.compute_capability >= (9, 0) else 128)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`causal_attention` by cudnn (`jax.nn.dot_product_attention`), bfloat16 or float16.

    A mask would have to be [B, 1, L, L], so rows that begin with padding are turned until it stands at their end,
    where causality hides it.
    """
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    if valid is None:
        return attend(q, k, v)
    first, places = jnp.argmax(valid, axis=1)[:, None], jnp.arange(q.shape[1])

    def turn(x, by):
        return jnp.take_along_axis(x, ((places + by) % len(places))[..., None, None], axis=1)

    return turn(attend(turn(q, first), turn(k, first), turn(v, first)), -first)


# ---- positions that all see each other


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Each position over all of them: cudnn's flash attention on GPU, the whole matrix of weights elsewhere.

    On a mesh the arrays stay divided over rows and heads as they are (cudnn's call can be divided so by itself).

    Args:
        q, k, v: [B, L, H, D], as is what comes out.
    """
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
    kernels = {"cuda": cudnn} if _cudnn_takes(q.shape[-1], q.dtype) else {}
    return jax.lax.platform_dependent(q, k, v, default=_over_whole_matrix, **kernels)


def _over_whole_matrix(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", full_attention_weights(q, k).astype(v.dtype), v)


def full_attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D): q, k [B, L, H, D] → float32 [B, H, L, L]. q is scaled first, as CLIP does."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1)


# ---- a whole matrix


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D) in float32, as one whole matrix [B, K, H/K, L, S] in q's dtype.

    Args:
        q: [B, L, H, D]; k: [B, S, K, D], H a multiple of K (grouped queries).
        mask: bool [B, L, S], True where a query may look.
    """
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("blkhd,bskd->bkhls", grouped, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(q.dtype)


def weighted_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [B, K, H/K, L, S] times v [B, S, K, D]: [B, L, H, D]."""
    out = jnp.einsum("bkhls,bskd->blkhd", weights, v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])
