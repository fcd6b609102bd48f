"""Prompts to tokens on the device: `start` prefills, `run` decodes, `generate` is both in one program.

Everything works on G prefixes with R rows each. One prompt is G = R = 1; a batch of prompts is R = 1; many questions
on one image share a prefix, and a row's question is what comes after it.
"""

from __future__ import annotations

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp

from llava_jax.inference.cache import Prefix, Suffix, empty_suffix
from llava_jax.inference.sampling import Greedy, Sample
from llava_jax.inputs.types import Batch, Questions
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.models.ops import label_log_probs


@flax.struct.dataclass
class DecodeState:
    """What the decode loop carries. The suffix has Q slots for the question and then S for new tokens."""

    suffix: Suffix
    lengths: jax.Array  # int32 [G, R], of the questions
    tokens: jax.Array  # int32 [G, R, S], pad after a row's end
    done: jax.Array  # bool [G, R]
    step: jax.Array  # int32, tokens so far


def _take(state: DecodeState, logits: jax.Array, sampling: Greedy | Sample, config) -> DecodeState:
    """Choose each row's next token from logits [G, R, V]; a finished row gets padding."""
    token = jnp.where(state.done, config.pad_token_id, sampling.choose(logits, state.tokens, state.step))
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], state.step, axis=2)
    ended = jnp.isin(token, jnp.asarray(config.eos_token_ids, jnp.int32))
    return replace(state, tokens=tokens, done=state.done | ended, step=state.step + 1)


def _apply(model, params, *args, method: str):
    """What a method of the model gives with these parameters."""
    return model.apply({"params": params}, *args, method=method)


def prefill(model: LlavaLlamaForCausalLM, params, batch: Batch) -> tuple[Prefix, jax.Array]:
    """Encode, merge and prefill right-padded prompts: the Prefix (G = B) and the last hidden states [G, E]."""
    last, keys_values = _apply(model, params, batch, method="prefill")
    return Prefix(keys_values, batch.attention_mask, batch.lengths), last


def join(shards: int, parts):
    """Several (Prefix, last hidden states) as one, in each shard of their groups one after another."""

    def one(*arrays):
        divided = [x.reshape(shards, -1, *x.shape[1:]) for x in arrays]
        return jnp.concatenate(divided, axis=1).reshape(-1, *arrays[0].shape[1:])

    return jax.tree.map(one, *parts)


def _dtype(params):
    """Of the activations."""
    return params["language_model"]["embed_tokens"]["embedding"].dtype


def ask(model: LlavaLlamaForCausalLM, slots: int, params, prefix: Prefix, questions: Questions):
    """Prefill each row's question after its prefix.

    Args:
        slots: room for new tokens.

    Returns:
        (the suffix with Q + slots slots, hidden states [G, R, Q, E])
    """
    groups, rows, length = questions.ids.shape
    suffix = empty_suffix(model.config.text, groups, rows, length + slots, _dtype(params))
    valid = jnp.arange(length + slots) < questions.lengths[..., None]
    suffix = replace(suffix, valid=valid)
    positions = prefix.lengths[:, None, None] + jnp.broadcast_to(jnp.arange(length), questions.ids.shape)
    arguments = questions.ids, positions, prefix, suffix, jnp.int32(0)
    hidden, keys_values = _apply(model, params, *arguments, method="extend")
    return replace(suffix, keys_values=keys_values), hidden


def first(model, slots: int, params, prefix: Prefix, last: jax.Array, questions: Questions, sampling: Greedy | Sample):
    """The state after each row's first token; a question of no tokens (Q = 0) goes on from the prefix's own end."""
    if questions.ids.shape[-1]:
        suffix, hidden = ask(model, slots, params, prefix, questions)
        last = jnp.take_along_axis(hidden, jnp.maximum(questions.lengths - 1, 0)[..., None, None], axis=2)[:, :, 0]
    else:
        groups, rows, _ = questions.ids.shape
        suffix = empty_suffix(model.config.text, groups, rows, slots, _dtype(params))
        last = jnp.broadcast_to(last[:, None], (groups, rows, last.shape[-1]))
    state = DecodeState(
        suffix=suffix,
        lengths=questions.lengths,
        tokens=jnp.full((*questions.lengths.shape, slots), model.config.generation.pad_token_id, jnp.int32),
        done=~questions.active,
        step=jnp.int32(0),
    )
    logits = _apply(model, params, last, method="logits")
    return _take(state, logits, sampling, model.config.generation)


def start(model, slots: int, params, batch: Batch, questions: Questions, sampling: Greedy | Sample):
    """(Prefix, DecodeState after each row's first token)."""
    prefix, last = prefill(model, params, batch)
    return prefix, first(model, slots, params, prefix, last, questions, sampling)


def run(model: LlavaLlamaForCausalLM, params, prefix: Prefix, state: DecodeState, sampling: Greedy | Sample, limit):
    """Decode until every row is done or has `limit` tokens (int32, traced)."""
    question_slots = state.suffix.valid.shape[-1] - state.tokens.shape[-1]

    def unfinished(state: DecodeState):
        return (state.step < limit) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        newest = state.step - 1  # it is not in the cache yet
        slot = question_slots + newest
        last = jax.lax.dynamic_slice_in_dim(state.tokens, newest, 1, axis=2)
        here = jnp.ones_like(last, dtype=bool)
        valid = jax.lax.dynamic_update_slice_in_dim(state.suffix.valid, here, slot, axis=2)
        suffix = replace(state.suffix, valid=valid)
        positions = (prefix.lengths[:, None] + state.lengths + newest)[..., None]
        hidden, keys_values = _apply(model, params, last, positions, prefix, suffix, slot, method="extend")
        state = replace(state, suffix=replace(suffix, keys_values=keys_values))
        logits = _apply(model, params, hidden[:, :, -1], method="logits")
        return _take(state, logits, sampling, model.config.generation)

    return jax.lax.while_loop(unfinished, body, state)


def generate(
    model: LlavaLlamaForCausalLM, slots: int, params, batch: Batch, questions, sampling: Greedy | Sample, limit
):
    """Tiles to tokens in one program.

    Returns:
        (tokens int32 [G, R, slots], how many steps were taken: the tokens beyond are padding)
    """
    prefix, state = start(model, slots, params, batch, questions, sampling)
    state = run(model, params, prefix, state, sampling, limit)
    return state.tokens, state.step


def answer(model, slots: int, params, prefix: Prefix, last, questions: Questions, sampling: Greedy | Sample, limit):
    """Questions to tokens after prefixes that are already there: int32 [G, R, slots]."""
    state = first(model, slots, params, prefix, last, questions, sampling)
    return run(model, params, prefix, state, sampling, limit).tokens


def score(model, params, prefix: Prefix, questions: Questions) -> jax.Array:
    """Log-probability of each question's next token at each of its positions but the last, float32 [G, R, Q - 1]."""
    _, hidden = ask(model, 0, params, prefix, questions)
    logits = _apply(model, params, hidden[:, :, :-1], method="logits")
    return label_log_probs(logits, questions.ids[:, :, 1:])
