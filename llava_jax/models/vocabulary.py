"""Growing the vocabulary for LLaVA's own tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN


def resize_rows(table: jax.Array, size: int, new: int) -> jax.Array:
    """`table` [V, E] with `size` rows, the last `new` of them the mean of those before."""
    kept = table[: size - new]
    mean = jnp.mean(kept.astype(jnp.float32), axis=0, keepdims=True).astype(table.dtype)
    return jnp.concatenate([kept, jnp.repeat(mean, size - len(kept), axis=0)])


def initialize_vision_tokenizer(params: dict, config: LlavaConfig, tokenizer):
    """Add the tokens that `mm_use_im_patch_token` and `mm_use_im_start_end` ask for; the tables grow with them.

    The new rows of the embedding and of the head are the mean of the others (the original's method of this name; it
    leaves `<im_patch>`, which is never embedded, random). Nothing is changed in place.

    Returns:
        (params, config with the new `vocab_size`, tokenizer with the new tokens)
    """
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] * config.mm_use_im_patch_token
    tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] * config.mm_use_im_start_end
    grown = tokenizer.add_tokens(tokens)
    size, new = len(grown), len(grown) - len(tokenizer)
    if not new:
        return params, config, grown
    language_model = dict(params["language_model"])
    embedding = language_model["embed_tokens"]["embedding"]
    language_model["embed_tokens"] = {"embedding": resize_rows(embedding, size, new)}
    if "lm_head" in language_model:
        language_model["lm_head"] = {"kernel": resize_rows(language_model["lm_head"]["kernel"].T, size, new).T}
    text = dataclasses.replace(config.text, vocab_size=size)
    return {**params, "language_model": language_model}, config.replace(text=text), grown
