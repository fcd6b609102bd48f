"""Prompts to tokens on the device: `start` prefills, `run` decodes, `generate` is both in one program."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from llava_jax.batch import Batch
from llava_jax.inference.cache import Prefix, Suffix, empty_suffix
from llava_jax.inference.sampling import Sampling, next_token
from llava_jax.models.llava import LlavaLlamaForCausalLM


@flax.struct.dataclass
class DecodeState:
    """What the decode loop carries. G prefixes, R rows each, S slots."""

    suffix: Suffix
    tokens: jax.Array  # int32 [G, R, S], pad after a row's end
    done: jax.Array  # bool [G, R]
    step: jax.Array  # int32, tokens so far


def _take(state: DecodeState, logits: jax.Array, sampling: Sampling, config) -> DecodeState:
    """Choose each row's next token from logits [G, R, V]; a finished row gets padding."""
    token = jnp.where(state.done, config.pad_token_id, next_token(logits, sampling, state.step))
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], state.step, axis=2)
    ended = jnp.isin(token, jnp.asarray(config.eos_token_ids, jnp.int32))
    return state.replace(tokens=tokens, done=state.done | ended, step=state.step + 1)


def start(model: LlavaLlamaForCausalLM, slots: int, params, batch: Batch, sampling: Sampling):
    """Encode, merge and prefill a batch of right-padded prompts, and choose each one's first token.

    Args:
        slots: room for new tokens.

    Returns:
        (Prefix with G = B, DecodeState with R = 1)
    """
    logits, keys_values = model.apply({"params": params}, batch, method="prefill")
    prefix = Prefix(keys_values, batch.attention_mask, batch.lengths)
    rows, dtype = len(batch.index), keys_values[0][0].dtype
    state = DecodeState(
        suffix=empty_suffix(model.config.text, rows, 1, slots, dtype),
        tokens=jnp.full((rows, 1, slots), model.config.generation.pad_token_id, jnp.int32),
        done=jnp.zeros((rows, 1), bool),
        step=jnp.int32(0),
    )
    return prefix, _take(state, logits[:, None], sampling, model.config.generation)


def run(
    model: LlavaLlamaForCausalLM, params, prefix: Prefix, state: DecodeState, sampling: Sampling, limit
) -> DecodeState:
    """Decode until every row is done or has `limit` tokens (int32, traced)."""

    def unfinished(state: DecodeState):
        return (state.step < limit) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        slot = state.step - 1  # the newest token is not in the cache yet
        last = jax.lax.dynamic_slice_in_dim(state.tokens, slot, 1, axis=2)
        here = jnp.ones_like(last, dtype=bool)
        suffix = state.suffix.replace(valid=jax.lax.dynamic_update_slice_in_dim(state.suffix.valid, here, slot, axis=2))
        positions = jnp.broadcast_to(prefix.lengths[:, None, None] + slot, last.shape)
        logits, keys_values = model.apply({"params": params}, last, positions, prefix, suffix, slot, method="extend")
        state = state.replace(suffix=suffix.replace(keys_values=keys_values))
        return _take(state, logits[:, :, -1], sampling, model.config.generation)

    return jax.lax.while_loop(unfinished, body, state)


def generate(model: LlavaLlamaForCausalLM, slots: int, params, batch: Batch, sampling: Sampling, limit):
    """Tiles to tokens in one program.

    Returns:
        (tokens int32 [B, slots], how many steps were taken: the tokens beyond are padding)
    """
    prefix, state = start(model, slots, params, batch, sampling)
    state = run(model, params, prefix, state, sampling, limit)
    return state.tokens[:, 0], state.step
