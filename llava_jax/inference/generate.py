"""Prompts to tokens on the device, as pure functions; `Engine` jits them.

Everything works on G prefixes with R rows each. One prompt is G = R = 1; a batch of prompts is R = 1; many questions
on one image share a prefix, and a row's question is what comes after it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from llava_jax.inference.cache import Prefix, Suffix, empty_suffix
from llava_jax.inference.sampling import Sampling, said_words
from llava_jax.inputs.types import Batch, Questions
from llava_jax.models.llava_llama import CacheBlock, LlavaLlamaForCausalLM
from llava_jax.models.ops import label_log_probs


@flax.struct.dataclass
class DecodeState:
    """What the decode loop carries. The suffix has Q slots for the question and then S for new tokens."""

    suffix: Suffix
    lengths: jax.Array  # int32 [G, R], of the questions
    tokens: jax.Array  # int32 [G, R, S], pad after a row's end
    done: jax.Array  # bool [G, R]
    step: jax.Array  # int32, tokens so far


def _append_token(state: DecodeState, logits: jax.Array, sampling: Sampling, config) -> DecodeState:
    """Choose each row's next token from logits [G, R, V]; a finished row gets padding."""
    answer = jnp.where(jnp.arange(state.tokens.shape[-1]) < state.step, state.tokens, -1)
    said = said_words(answer, logits.shape[-1])
    token = jnp.where(state.done, config.pad_token_id, sampling.choose(logits, said, state.step))
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], state.step, axis=2)
    ended = jnp.isin(token, jnp.asarray(config.eos_token_ids, jnp.int32))
    return replace(state, tokens=tokens, done=state.done | ended, step=state.step + 1)


def apply(model: LlavaLlamaForCausalLM, params, *args, method: str):
    """What a method of the model gives."""
    return model.apply({"params": params}, *args, method=method)


def prefill(model, params, batch: Batch) -> tuple[Prefix, jax.Array]:
    """Encode, merge and prefill right-padded prompts: (Prefix, G = B; last hidden states [G, E])."""
    last_hidden, keys_values = apply(model, params, batch, method="prefill")
    return Prefix(keys_values, batch.lengths), last_hidden


def activation_dtype(params):
    return params["language_model"]["embed_tokens"]["embedding"].dtype


def prefill_questions(
    model, output_capacity: int, params, prefix: Prefix, questions: Questions
) -> tuple[Suffix, jax.Array]:
    """Prefill each row's question after its prefix: (Suffix, Q + output_capacity slots; hidden states [G, R, Q, E])."""
    length, dtype = questions.ids.shape[-1], activation_dtype(params)
    positions = prefix.lengths[:, None, None] + jnp.broadcast_to(jnp.arange(length), questions.ids.shape)
    hidden, keys_values = apply(model, params, questions.ids, positions, prefix, method="prefill_questions")
    room = [(0, 0)] * 3 + [(0, output_capacity), (0, 0)]
    keys_values = [tuple(jnp.pad(x.astype(dtype), room) for x in layer) for layer in keys_values]
    return Suffix(keys_values, jnp.arange(length + output_capacity) < questions.lengths[..., None]), hidden


def at_last_position(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """hidden [G, R, Q, E], lengths int32 [G, R] → [G, R, E]."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[..., None, None], axis=2)[:, :, 0]


def sample_first_token(
    model, output_capacity: int, params, prefix: Prefix, last_hidden, questions: Questions, sampling: Sampling
) -> DecodeState:
    """The state after each row's first token. A question of no tokens (Q = 0) goes on from `last_hidden` [G, E]."""
    if questions.ids.shape[-1]:
        suffix, hidden = prefill_questions(model, output_capacity, params, prefix, questions)
        last_hidden = at_last_position(hidden, questions.lengths)
    else:
        groups, rows, _ = questions.ids.shape
        suffix = empty_suffix(model.config.text, groups, rows, output_capacity, activation_dtype(params))
        last_hidden = jnp.broadcast_to(last_hidden[:, None], (groups, rows, last_hidden.shape[-1]))
    shape, padding = (*questions.lengths.shape, output_capacity), model.config.generation.pad_token_id
    tokens = jnp.full(shape, padding, jnp.int32)
    state = DecodeState(suffix, questions.lengths, tokens, done=~questions.active, step=jnp.int32(0))
    logits = apply(model, params, last_hidden, method="logits")
    return _append_token(state, logits, sampling, model.config.generation)


def prefill_and_sample(
    model, output_capacity: int, params, batch: Batch, questions: Questions, sampling: Sampling
) -> tuple[Prefix, DecodeState]:
    """`prefill` and `sample_first_token` in one."""
    prefix, last_hidden = prefill(model, params, batch)
    return prefix, sample_first_token(model, output_capacity, params, prefix, last_hidden, questions, sampling)


def decode_loop(
    model, params, prefix: Prefix, state: DecodeState, sampling: Sampling, max_new_tokens: jax.Array
) -> DecodeState:
    """Decode until every row is done or has `max_new_tokens` (int32, traced)."""
    question_slots = state.suffix.valid.shape[-1] - state.tokens.shape[-1]

    def unfinished(state: DecodeState):
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        newest = state.step - 1  # it is not in the cache yet
        slot = question_slots + newest
        token = jax.lax.dynamic_slice_in_dim(state.tokens, newest, 1, axis=2)
        valid = jax.lax.dynamic_update_slice_in_dim(state.suffix.valid, jnp.ones_like(token, bool), slot, axis=2)
        suffix = replace(state.suffix, valid=valid)
        positions = (prefix.lengths[:, None] + state.lengths + newest)[..., None]
        pools = [[CacheBlock(prefix, suffix, slot)]]
        hidden, (keys_values,) = apply(model, params, token, positions, pools, method="decode_step")
        state = replace(state, suffix=replace(suffix, keys_values=keys_values))
        logits = apply(model, params, hidden[:, :, -1], method="logits")
        return _append_token(state, logits, sampling, model.config.generation)

    return jax.lax.while_loop(unfinished, body, state)


def generate(model, output_capacity: int, params, batch: Batch, questions, sampling: Sampling, max_new_tokens):
    """Tiles to tokens in one program: int32 [G, R, output_capacity], and how many steps were taken; then padding."""
    prefix, state = prefill_and_sample(model, output_capacity, params, batch, questions, sampling)
    state = decode_loop(model, params, prefix, state, sampling, max_new_tokens)
    return state.tokens, state.step


class ScoredTokens(NamedTuple):
    """Of each question's next token at each of its positions but the last, [G, R, Q - 1]."""

    logprobs: jax.Array  # float32
    likeliest: jax.Array  # bool: greedy decoding would choose it


def score(model, params, prefix: Prefix, questions: Questions) -> ScoredTokens:
    """How likely the questions' own tokens are after their prefixes."""
    _, hidden = prefill_questions(model, 0, params, prefix, questions)
    logits, labels = apply(model, params, hidden[:, :, :-1], method="logits"), questions.ids[:, :, 1:]
    return ScoredTokens(label_log_probs(logits, labels), jnp.argmax(logits, axis=-1) == labels)
