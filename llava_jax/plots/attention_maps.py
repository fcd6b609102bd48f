"""Where a model looks: attention weights of the decoder and of the tower, a few rows at a time.

The decoder of a 7B at 2,900 positions has 32 x 32 x 2,900² weights, 32 GiB in float32. Here each layer hands back only
the rows that were asked for, and attends by the kernel that it always uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.llava import Llava
from llava_jax.inference.sampling import Sampling
from llava_jax.inputs.anyres import image_length
from llava_jax.inputs.batch import pack
from llava_jax.inputs.detokenizer import IncrementalDetokenizer


class AnswerAttention(NamedTuple):
    """What each piece of an answer (a token, or after `by_word` a word) looked at when it was chosen.

    Its row is that of the position before it, from whose hidden state it was predicted.
    """

    pieces: tuple[str, ...]  # A, the text that each added to the answer
    weights: np.ndarray  # float32 [layers, H, A, L], or [layers, A, L]; over L they sum to 1
    pictures: tuple[slice, ...]  # where in L the positions of each picture are


# ---- the decoder


def answer_attention(
    llava: Llava,
    params: dict,
    image,
    prompt,
    *,
    mean_heads: bool = False,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    conv_mode: str | None = None,
) -> AnswerAttention:
    """Answer a prompt, as `Llava.generate`, and say what each token of the answer looked at.

    L is the length of prompt and answer, the answer's last token excluded. `mean_heads` gives the mean over the heads:
    all heads of a 7B at 2,900 positions are 12 MB a token.

    Raises:
        ValueError: as `Llava.generate`; or the answer is empty.
    """
    images = llava.load_images(image)
    sizes = [picture.size for picture in images]
    ids = llava.prompt_ids(prompt, sizes, conv_mode)
    numbers: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    (tokens,) = llava.generate_tokens(params, [ids], images, seed=seed, sampling=sampling, **numbers)
    answer = tokens[: np.argmax(np.append(np.isin(tokens, llava.config.generation.eos_token_ids), True))]
    if not len(answer):
        raise ValueError("prompt: the model's answer is empty, so there is nothing that it looked at; ask another")
    row = np.concatenate([ids, answer[:-1]])
    batch = pack([row], images, llava.config)
    end = int(batch.lengths[0])
    weights = llava.engine.attention_rows(params, batch, np.arange(end - len(answer), end), mean_heads)
    stream = IncrementalDetokenizer(llava.tokenizer)
    pieces = [stream.push(token) for token in answer.tolist()]
    pieces[-1] += stream.flush()
    return AnswerAttention(tuple(pieces), weights[:, 0, ..., :end], picture_positions(ids, sizes, llava.config))


def picture_positions(ids: Sequence[int], sizes, config: LlavaConfig) -> tuple[slice, ...]:
    """Where in the merged sequence of a prompt's ids each picture's positions are; sizes: (width, height) of each."""
    placeholders = np.flatnonzero(np.asarray(ids) == IMAGE_TOKEN_INDEX)
    lengths = [image_length(width, height, config) for width, height in sizes]
    starts = placeholders + np.cumsum([0, *lengths])[:-1] - np.arange(len(lengths))
    return tuple(slice(int(start), int(start) + n) for start, n in zip(starts, lengths, strict=True))


def by_word(looks: AnswerAttention) -> AnswerAttention:
    """The mean over the tokens of each word; a word begins with white space."""
    starts = [i for i, piece in enumerate(looks.pieces) if i == 0 or piece[:1].isspace()]
    ends = [*starts[1:], len(looks.pieces)]
    words = tuple("".join(looks.pieces[start:end]) for start, end in zip(starts, ends, strict=True))
    counts = np.subtract(ends, starts).astype(np.float32)[:, None]
    return looks._replace(pieces=words, weights=np.add.reduceat(looks.weights, starts, axis=-2) / counts)


# ---- the tower


def tower_attention(llava: Llava, params: dict, tiles: np.ndarray, layer: int) -> np.ndarray:
    """uint8 tiles [T, S, S, 3] → the attention of one layer of the CLIP tower, from 0; those after it are not run.

    float32 [T, H, 1 + N, 1 + N], the class token first; over the last axis they sum to 1. Layers from the selected one
    (`mm_vision_select_layer`) on play no part in LLaVA.

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
    return llava.engine.tower_attention(params, tiles, layer)


def patch_maps(weights: np.ndarray, patch: int | None = None) -> np.ndarray:
    """What one patch of each tile (row by row, from 0) looks at, or the mean over all of them; the mean over the heads.

    Takes the weights of `tower_attention`, gives float32 [T, side, side]; what goes to the class token is left out.
    """
    rows = weights.mean(1)[:, 1:, 1:]  # [T, N, N]
    looked = rows.mean(1) if patch is None else rows[:, patch]
    side = round(looked.shape[-1] ** 0.5)
    return looked.reshape(-1, side, side)
