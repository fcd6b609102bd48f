"""LLaVA: tower, projector and decoder, joined by one gather. Everything here is device code with static shapes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from llava_jax.config import LlavaConfig
from llava_jax.inputs.types import Batch
from llava_jax.models.attention import (
    attention_weights,
    causal_attention,
    causal_mask,
    weighted_values,
)
from llava_jax.models.cache_attention import Appended, Own, attend_and_append, question_attention
from llava_jax.models.llama import LlamaModel
from llava_jax.models.parts import split_rows
from llava_jax.models.projector import build_vision_projector
from llava_jax.models.quantize import is_quantized, to_int8
from llava_jax.models.vision import build_vision_tower
from llava_jax.parallel.sharding import each_its_own


class CacheBlock(NamedTuple):
    """Rows that decode side by side: they have one number of slots."""

    prefix: Any  # `cache.Prefix` of G prefixes
    suffix: Any  # `cache.Suffix`, [G, R, S]
    slot: jax.Array  # int32, where all its rows write
    writes: jax.Array | None = None  # bool [G, R], those that do; None: all


class LlavaLlamaForCausalLM(nn.Module):
    """The whole model as a Flax module; its parameters are the nested dict that a converted checkpoint holds."""

    config: LlavaConfig
    remat: bool = False  # of the decoder's layers, for training
    int8_prefix: bool = False  # what prefill gives: keys and values as Int8
    int8_activations: bool = False  # see LlamaModel

    def setup(self):
        self.vision_tower = build_vision_tower(self.config)
        self.mm_projector = build_vision_projector(self.config)
        self.language_model = LlamaModel(self.config.text, self.remat, self.int8_activations)
        if self.config.has_image_newline:
            width = self.config.text.hidden_size
            self.image_newline = self.param("image_newline", nn.initializers.normal(width**-0.5), (width,))

    def encode_images(self, tiles: jax.Array) -> jax.Array:
        """uint8 tiles [T, S, S, 3] → projected features [T, tokens_per_tile, E]."""
        if self.config.s2:  # the tower makes tiles of each scale of these, and divides them itself
            return each_its_own(self.mm_projector, self.vision_tower(tiles))
        return each_its_own(lambda tiles: self.mm_projector(self.vision_tower(tiles)), tiles)

    def vision_features(self, tiles: jax.Array) -> jax.Array:
        """uint8 tiles [T, S, S, 3] → the tower's selected features [T, tokens_per_tile, mm_hidden_size]."""
        return self.vision_tower(tiles)

    def tower_attention(self, tiles: jax.Array, layer: int) -> jax.Array:
        """uint8 tiles [T, S, S, 3] → what a layer of the tower looks at, float32 [T, H, 1 + N, 1 + N]."""
        return self.vision_tower.attention_weights(tiles, layer)

    def embed_tokens(self, token_ids: jax.Array) -> jax.Array:
        """int32 [...] → [..., E]."""
        return self.language_model.embed_tokens(token_ids)

    def embed_multimodal(self, batch: Batch[jax.Array]) -> jax.Array:
        """The merged sequence [B, L, E] of a planned batch: one gather from one table.

        The table is [embedded text | projected tiles | image_newline | zeros]; `batch.gather_indices` says which row
        stands where (the device half of the original's prepare_inputs_labels_for_multimodal). A batch of shards
        (text_ids [S, X]) has a table for each, over its own tiles, so that no device needs another's.
        """
        text = self.embed_tokens(jnp.atleast_2d(batch.text_ids))  # [S, X, E]
        shards, _, width = text.shape
        zeros = jnp.zeros((shards, 1, width), text.dtype)
        table = jnp.concatenate([text, *self._image_rows(batch.tiles, shards, text.dtype), zeros], axis=1)
        indices = batch.gather_indices.reshape(shards, -1, batch.gather_indices.shape[-1])
        return jax.vmap(lambda table, index: table[index])(table, indices).reshape(*batch.gather_indices.shape, width)

    def place_images(self, embeds: jax.Array, tiles: jax.Array, indices: jax.Array) -> jax.Array:
        """Embedded sequences [B, L, E] with images in them: where an index, int32 [B, L], is not -1, that row of the
        sequence's table, [projected tiles | image_newline]. Each has T of the tiles, uint8 [B·T, S, S, 3]."""
        table = jnp.concatenate(self._image_rows(tiles, len(embeds), embeds.dtype), axis=1)
        rows = jax.vmap(lambda table, index: table[index])(table, jnp.maximum(indices, 0))
        return jnp.where(indices[..., None] >= 0, rows, embeds)

    def _image_rows(self, tiles: jax.Array, shards: int, dtype) -> list[jax.Array]:
        """What stands for images, [shards, …, E] each: their projected tiles, if there are any, and image_newline."""
        width = self.config.text.hidden_size
        newline = self.image_newline if self.config.has_image_newline else jnp.zeros(width)
        rows = [self.encode_images(tiles).reshape(shards, -1, width)] if len(tiles) else []
        return [x.astype(dtype) for x in (*rows, jnp.broadcast_to(newline, (shards, 1, width)))]

    def __call__(self, batch: Batch[jax.Array], output_attentions: bool = False):
        """A whole batch: (logits float32 [B, L, V], layers + 1 hidden states [B, L, E], each layer's attention
        [B, H, L, L], or None where not asked for)."""
        valid = batch.attention_mask

        def attend(q, k, v):
            if not output_attentions:
                return causal_attention(q, k, v, valid), None
            weights = attention_weights(q, k, causal_mask(valid, 0, q.shape[1]))
            return weighted_values(weights, v), weights.reshape(len(q), -1, *weights.shape[-2:])

        hidden, attentions, hidden_states = self._run_whole(batch, attend)
        return self.language_model.logits(hidden), hidden_states, attentions

    def _run_whole(self, batch: Batch[jax.Array], attend):
        """The decoder over a batch's whole sequences, the same `attend` in every layer."""
        embeds, attends = self.embed_multimodal(batch), [attend] * self.config.text.num_hidden_layers
        return self.language_model(embeds, batch.position_ids, batch.lengths, embeds.shape[1], attends)

    def attention_rows(self, batch: Batch[jax.Array], positions: jax.Array, mean_heads: bool) -> jax.Array:
        """What the positions, int32 [A], look at in every layer, which attends by the kernel that it always uses:
        float32 [layers, B, H, A, L], or [layers, B, A, L] with `mean_heads`."""
        seen = batch.attention_mask[:, None] & (jnp.arange(batch.gather_indices.shape[1]) <= positions[:, None])

        def attend(q, k, v):
            weights = attention_weights(q[:, positions], k, seen).astype(jnp.float32)
            weights = weights.reshape(len(q), -1, *weights.shape[-2:])
            return causal_attention(q, k, v, batch.attention_mask), weights.mean(1) if mean_heads else weights

        return jnp.stack(self._run_whole(batch, attend)[1])

    def hidden(self, batch: Batch[jax.Array]) -> jax.Array:
        """Right-padded rows to their normed last hidden states, [B, L, E]: what training needs."""

        def attend(q, k, v):
            return causal_attention(q, k, v), None

        return self._run_whole(batch, attend)[0]

    def prefill(self, batch: Batch[jax.Array]):
        """Right-padded prompts to the normed hidden state at each row's last position [B, E], and every layer's (k, v),
        [B, K, L, D], arrays or Int8."""

        def attend(q, k, v):  # padding is on the right, where causality hides it
            return causal_attention(q, k, v), self._cached(k.swapaxes(1, 2), v.swapaxes(1, 2))

        hidden, keys_values, _ = self._run_whole(batch, attend)
        last = jnp.maximum(batch.lengths - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0], keys_values

    def prefill_chunk(
        self, embeds: jax.Array, positions: jax.Array, seq_lens: jax.Array, max_seq_len: int, prefix=None
    ) -> list[tuple]:
        """Prompts are prefilled a chunk at a time: every layer's (k, v) of one chunk, [B, K, C, D], arrays or Int8.

        Args:
            embeds: [B, C, E]; positions: int32 [B, C].
            seq_lens: int32 [B], of the whole prompts, and max_seq_len, their bound (for `dynamic` rope scaling).
            prefix: `cache.Prefix` of what comes before the chunk; None for a prompt's first one.
        """

        def attend_with(before):
            def attend(q, k, v):
                if before is None:
                    return causal_attention(q, k, v), self._cached(k.swapaxes(1, 2), v.swapaxes(1, 2))
                k, v, (prefix_k, prefix_v) = _kv_heads_first(k), _kv_heads_first(v), before
                attended = question_attention(q, k, v, prefix_k, prefix_v, prefix.lengths)
                return attended, self._cached(k[:, :, 0], v[:, :, 0])

            return attend

        layers = [None] * self.config.text.num_hidden_layers if prefix is None else prefix.keys_values
        if prefix is not None:  # one row each
            embeds, positions, seq_lens = embeds[:, None], positions[:, None], seq_lens[:, None]
        attends = [attend_with(before) for before in layers]
        return self.language_model(embeds, positions, seq_lens, max_seq_len, attends)[1]

    def _cached(self, k: jax.Array, v: jax.Array) -> tuple:
        """Keys and values as a prefix has them."""
        return (to_int8(k, -1), to_int8(v, -1)) if self.int8_prefix else (k, v)

    def prefill_questions(self, token_ids: jax.Array, positions: jax.Array, prefix):
        """Questions, int32 [G, R, Q], after their `cache.Prefix`: (normed hidden states [G, R, Q, E], each layer's own
        (k, v) [G, K, R, Q, D])."""

        def attend_with(prefix_k, prefix_v):
            def attend(q, k, v):
                k, v = _kv_heads_first(k), _kv_heads_first(v)
                return question_attention(q, k, v, prefix_k, prefix_v, prefix.lengths), (k, v)

            return attend

        attends = [attend_with(*keys_values) for keys_values in prefix.keys_values]
        return self._extend(token_ids, positions, prefix.capacity + token_ids.shape[-1], attends)

    def decode_step(self, token_ids: jax.Array, positions: jax.Array, pools: list[list[CacheBlock]]):
        """One new token a row, int32 [G, R, 1], each written into its suffix at `slot`, where `suffix.valid` has it
        already. All blocks' rows lie side by side along R, so that the weights are read once for all of them; so are
        prefixes by the blocks of one pool, which differ only in their lengths.

        Returns:
            (normed hidden states [G, R, 1, E], for each block every layer's suffix (k, v) [G, K, its rows, S, D])
        """
        ends = np.cumsum([sum(block.suffix.valid.shape[1] for block in blocks) for blocks in pools])[:-1]

        def attend_with(layer: int):
            def attend(*new):
                of_pools = zip(pools, *(jnp.split(x, ends, axis=1) for x in new), strict=True)
                attended = [_attend_in(blocks, layer, *qkv) for blocks, *qkv in of_pools]
                suffixes = [suffix for _, of_pool in attended for suffix in of_pool]
                return jnp.concatenate([out for out, _ in attended], axis=1), suffixes

            return attend

        attends = [attend_with(layer) for layer in range(self.config.text.num_hidden_layers)]
        longest = max(block.prefix.capacity + block.suffix.valid.shape[-1] for blocks in pools for block in blocks)
        hidden, layers = self._extend(token_ids, positions, longest, attends, is_step=True)
        return hidden, [list(of_block) for of_block in zip(*layers, strict=True)]

    def _extend(self, token_ids, positions, max_seq_len: int, attends, is_step: bool = False):
        embeds = self.language_model.embed_tokens(token_ids)
        return self.language_model(embeds, positions, positions[..., -1] + 1, max_seq_len, attends, is_step)[:2]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Normed hidden states [..., E] → float32 [..., V]."""
        return self.language_model.logits(hidden)


def _attend_in(blocks: list[CacheBlock], layer: int, q, k, v):
    """(attended [G, R, 1, H, D], each block's suffix (k, v) of that layer with the new positions)"""
    suffixes, appended = [block.suffix for block in blocks], []
    for block, *of_block in zip(blocks, *(split_rows(x, suffixes, 1) for x in (k, v)), strict=True):
        suffix = block.suffix.keys_values[layer]
        new = tuple(_kv_heads_first(x).astype(old.dtype) for x, old in zip(of_block, suffix, strict=True))
        own = Own(suffix, block.suffix.valid, block.prefix.lengths)
        appended.append(Appended(new, block.slot, block.writes, own))
    prefix_k, prefix_v = blocks[0].prefix.keys_values[layer]
    return attend_and_append(q, appended, prefix_k, prefix_v)


def _kv_heads_first(x):
    """[G, R, L, K, D] → [G, K, R, L, D], as the cache has it."""
    return x.transpose(0, 3, 1, 2, 4)


def init_params(config: LlavaConfig, key: jax.Array) -> dict:
    """Random float32 parameters: the plain nested dict that every function here takes."""
    tiles, position = jnp.zeros((1, config.tile_size, config.tile_size, 3), jnp.uint8), jnp.zeros((1, 1), jnp.int32)
    batch = Batch(tiles, position[0], position, position, jnp.ones((1, 1), bool), lengths=jnp.ones(1, jnp.int32))
    return LlavaLlamaForCausalLM(config).init(key, batch)["params"]


def param_shapes(config: LlavaConfig) -> dict:
    """The tree of `jax.ShapeDtypeStruct` (float32) that `init_params` would fill; nothing is computed."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config))  # the caller's own to change


@functools.lru_cache(maxsize=8)
def _param_shapes(config: LlavaConfig) -> dict:
    """Traced once, as a load asks for them several times; and so is the decoder's layer, as they are all alike."""
    one_layer = config.replace(text=replace(config.text, num_hidden_layers=1))
    shapes = jax.eval_shape(lambda: init_params(one_layer, jax.random.key(0)))
    decoder = shapes["language_model"]
    return shapes | {
        "language_model": decoder | {f"layers_{i}": decoder["layers_0"] for i in range(config.text.num_hidden_layers)}
    }


def flat_param_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Path ("a/b/kernel") → shape of every parameter."""
    return {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}


def param_bytes(config: LlavaConfig, itemsize: int, quantize: str | None = None) -> int:
    """What all parameters take, a number `itemsize` bytes, or with the kernels that `quantize` makes int8."""
    shapes = flat_param_shapes(config)
    small = set() if quantize is None else set(filter(is_quantized, shapes))
    return sum(math.prod(shape) * (1 if path in small else itemsize) for path, shape in shapes.items())
