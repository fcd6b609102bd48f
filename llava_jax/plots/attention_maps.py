"""Where a model looks: attention weights of the decoder and of the tower, a few rows at a time.

The decoder of a 7B at 2,900 positions has 32 x 32 x 2,900² weights, 32 GiB in float32. Here each layer hands back only
the rows that were asked for, and attends by the kernel that it always uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.llava import Llava
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.batch import pack
from llava_jax.inputs.detokenizer import IncrementalDetokenizer
from llava_jax.inputs.image import as_image_list, load_image
from llava_jax.inputs.types import Batch
from llava_jax.models.attention import attention_weights, causal_attention
from llava_jax.models.linear import Linear
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.models.vision import normalize_tiles

ROWS = 16  # rows are asked for in multiples of it, so that answers of many lengths share a program


class AnswerAttention(NamedTuple):
    """What each piece of an answer (a token, or after `by_word` a word) looked at when it was chosen.

    Its row is that of the position before it, from whose hidden state it was predicted.
    """

    pieces: tuple[str, ...]  # A, the text that each added to the answer
    weights: np.ndarray  # float32 [layers, H, A, L], or [layers, A, L]; over L they sum to 1
    pictures: tuple[slice, ...]  # where in L the positions of each picture are


# ---- the decoder


def answer_attention(
    llava: Llava, params: dict, image, prompt, *, mean_heads: bool = False, conv_mode: str | None = None, **options
) -> AnswerAttention:
    """Answer a prompt, and say what each token of the answer looked at.

    Args:
        image, prompt, conv_mode, options: as `Llava.generate` takes them, without `stop`.
        mean_heads: give the mean over the heads; all heads of a 7B at 2,900 positions are 12 MB a token.

    Returns:
        AnswerAttention; L is the length of prompt and answer, the answer's last token excluded.

    Raises:
        ValueError: as `Llava.generate`; or the answer is empty.
    """
    shown = [load_image(picture) for picture in as_image_list(image)]
    tiles, sizes = llava.load_images(shown)
    ids = llava.prompt_ids(prompt, sizes, conv_mode)
    (tokens,) = llava.generate_tokens(params, [ids], shown, **options)
    answer = tokens[: np.argmax(np.append(np.isin(tokens, llava.config.generation.eos_token_ids), True))]
    if not len(answer):
        raise ValueError("prompt: the model's answer is empty, so there is nothing that it looked at; ask another")
    row = np.concatenate([ids, answer[:-1]])
    batch = pack([row], [np.full(len(row), -100)], tiles, sizes, llava.config)
    end = int(batch.lengths[0])
    weights = attention_rows(llava, params, batch, np.arange(end - len(answer), end), mean_heads)
    stream = IncrementalDetokenizer(llava.tokenizer)
    pieces = [stream.push(token) for token in answer.tolist()]
    pieces[-1] += stream.flush()
    return AnswerAttention(tuple(pieces), weights[:, 0, ..., :end], picture_positions(ids, sizes, llava.config))


def picture_positions(ids: Sequence[int], sizes, config: LlavaConfig) -> tuple[slice, ...]:
    """Where in the merged sequence each picture's positions are.

    Args:
        ids: of one prompt, -200 where a picture goes.
        sizes: (width, height) of each picture.
    """
    out, start, shown = [], 0, iter(sizes)
    for token in ids:
        length = 1
        if token == IMAGE_TOKEN_INDEX:
            width, height = next(shown)
            length = int(num_image_tokens(width, height, config))
            out.append(slice(start, start + length))
        start += length
    return tuple(out)


def by_word(looks: AnswerAttention) -> AnswerAttention:
    """The mean over the tokens of each word; a word begins with white space."""
    starts = [i for i, piece in enumerate(looks.pieces) if i == 0 or piece[:1].isspace()]
    ends = [*starts[1:], len(looks.pieces)]
    words = tuple("".join(looks.pieces[start:end]) for start, end in zip(starts, ends, strict=True))
    counts = np.subtract(ends, starts).astype(np.float32)[:, None]
    return looks._replace(pieces=words, weights=np.add.reduceat(looks.weights, starts, axis=-2) / counts)


def attention_rows(
    llava: Llava, params: dict, batch: Batch, positions: np.ndarray, mean_heads: bool = False
) -> np.ndarray:
    """Some rows of every layer's attention: those of `Llava.forward(…, output_attentions=True)`.

    Args:
        batch: rows as `pack` lays them out.
        positions: int [A], those that look, the same in each row of the batch.

    Returns:
        float32 [layers, B, H, A, L], or [layers, B, A, L] with `mean_heads`.
    """
    padded = np.pad(np.asarray(positions, np.int32), (0, -len(positions) % ROWS), mode="edge")
    with contextlib.nullcontext() if llava.mesh is None else jax.set_mesh(llava.mesh):
        weights = _attention_rows(llava.model, mean_heads, params, batch, padded)
    return np.asarray(weights)[..., : len(positions), :]


@partial(jax.jit, static_argnums=(0, 1))
def _attention_rows(model: LlavaLlamaForCausalLM, mean_heads: bool, params, batch: Batch, positions) -> jax.Array:
    seen = batch.attention_mask[:, None] & (jnp.arange(batch.index.shape[1]) <= positions[:, None])  # [B, A, L]

    def attend(q, k, v):
        weights = attention_weights(q[:, positions], k, seen).astype(jnp.float32)
        weights = weights.reshape(len(q), -1, *weights.shape[-2:])
        return causal_attention(q, k, v, batch.attention_mask), weights.mean(1) if mean_heads else weights

    def run(model):
        embeds, attends = model.embed_multimodal(batch), [attend] * model.config.text.num_hidden_layers
        return model.language_model(embeds, batch.position_ids, batch.lengths, embeds.shape[1], attends)[1]

    rows: Any = model.apply({"params": params}, method=run)
    return jnp.stack(rows)


# ---- the tower


def tower_attention(llava: Llava, params: dict, tiles: np.ndarray, layer: int) -> np.ndarray:
    """The attention of one layer of the CLIP tower; those after it are not run.

    Args:
        tiles: uint8 [T, S, S, 3], as `Llava.load_images` gives a picture's.
        layer: from 0; those from the selected one (`mm_vision_select_layer`) on play no part in LLaVA.

    Returns:
        float32 [T, H, 1 + N, 1 + N], the class token first; over the last axis they sum to 1.

    Raises:
        ValueError: no such layer, tiles of another shape, or a tower of several scales.
    """
    vision, selected = llava.config.vision, llava.config.mm_vision_select_layer
    run = selected if selected >= 0 else selected + vision.num_hidden_layers + 1
    if not 0 <= layer < run:
        raise ValueError(f"layer={layer} is not one of those that this model runs: 0 to {run - 1}")
    if llava.config.s2:
        raise ValueError("tower_attention: a tower with s2=True sees a tile at several scales; it has no one attention")
    tiles, side = np.asarray(tiles), vision.image_size
    if tiles.dtype != np.uint8 or tiles.shape[1:] != (side, side, 3):
        raise ValueError(f"tiles: expected uint8 [T, {side}, {side}, 3], got {tiles.dtype} {tiles.shape}")
    return np.asarray(_tower_attention(llava.model, layer, params, tiles))


@partial(jax.jit, static_argnums=(0, 1))
def _tower_attention(model: LlavaLlamaForCausalLM, layer: int, params, tiles) -> jax.Array:
    vision = model.config.vision

    def state_before(model):
        tower = model.vision_tower
        x = tower.pre_layrnorm(tower.embeddings(normalize_tiles(tiles, vision)))
        for block in tower.layers[:layer]:
            x = block(x)
        return x

    def project(name):
        out: Any = Linear(vision.hidden_size).apply({"params": block["self_attn"][name]}, normed)
        return out.reshape(*out.shape[:2], vision.num_attention_heads, -1)

    block = params["vision_tower"][f"layers_{layer}"]
    x: Any = model.apply({"params": params}, method=state_before)
    norm = nn.LayerNorm(vision.layer_norm_eps, use_fast_variance=False)
    normed = norm.apply({"params": block["layer_norm1"]}, x)
    everything = jnp.ones((1, x.shape[1], x.shape[1]), bool)
    weights = attention_weights(project("q_proj"), project("k_proj"), everything)
    return weights[:, :, 0].astype(jnp.float32)


def patch_maps(weights: np.ndarray, patch: int | None = None) -> np.ndarray:
    """What one patch of each tile looks at, or, with None, the mean over all patches: the mean over the heads, too.

    Args:
        weights: from `tower_attention`.
        patch: row by row in the tile, from 0.

    Returns:
        float32 [T, side, side]; what goes to the class token is left out.
    """
    rows = weights.mean(1)[:, 1:, 1:]  # [T, N, N]
    looked = rows.mean(1) if patch is None else rows[:, patch]
    side = round(looked.shape[-1] ** 0.5)
    return looked.reshape(-1, side, side)
