"""Rows of a continuous batch on the device: answers that begin, go on and end at their own times.

Pure functions. A block has R rows for each of G prefixes, and S slots for each row. All of its rows write their next
key and value into one slot, `cursor`, which goes round: a row sees the slots that are its own by `valid`, and their
order means nothing, since rotary positions are in the keys. A row of q question tokens and n new ones needs q + n - 1
slots. As in `pool`, a program works on one slot of every shard at once (B = shards), and what is out of range changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import TextConfig
from llava_jax.inference import generate, ring
from llava_jax.inference.cache import Prefix, Suffix, empty_suffix
from llava_jax.inference.generate import apply, at_last_position
from llava_jax.inference.pool import Pool, by_shard, read_slots
from llava_jax.inference.requests import MOST_END_IDS, MOST_TOP_LOGPROBS, RowOptions
from llava_jax.inference.sampling import Sample, said_words, validate
from llava_jax.inputs.types import Questions
from llava_jax.models.cache_attention import drop_ones, restore_ones
from llava_jax.models.llava_llama import CacheBlock

NOT_LIVING = -1  # in place of a token, where a row had no turn


@flax.struct.dataclass
class RowSettings:
    """How rows are decoded: NumPy scalars of one row, or arrays."""

    limit: Any  # int32 [...], new tokens
    min_new_tokens: Any  # int32 [...]
    end_ids: Any  # int32 [..., MOST_END_IDS], -1 behind them
    sampled: Any  # bool [...]; else greedy
    sample: Any  # a Sample, of arrays [...]
    wants_logprobs: Any  # bool [...]


def row_settings(options: RowOptions, limit: int) -> RowSettings:
    """One row's; `limit` is how many new tokens it may have in its block."""
    end_ids = np.full(MOST_END_IDS, -1, np.int32)
    end_ids[: len(options.end_ids)] = options.end_ids
    sampling = validate(options.sampling)
    return RowSettings(
        limit=np.int32(limit),
        min_new_tokens=np.int32(options.min_new_tokens),
        end_ids=end_ids,
        sampled=np.bool_(isinstance(sampling, Sample)),
        sample=sampling if isinstance(sampling, Sample) else validate(Sample()),
        wants_logprobs=np.bool_(options.top_logprobs is not None),
    )


@flax.struct.dataclass
class Rows:
    """A block of rows."""

    suffix: Suffix  # [G, R, S]
    cursor: jax.Array  # int32, the slot that is written next
    token: jax.Array  # int32 [G, R], the newest, which is not in the suffix yet
    position: jax.Array  # int32 [G, R], where it stands in its sequence
    step: jax.Array  # int32 [G, R], new tokens so far
    done: jax.Array  # bool [G, R]
    said: jax.Array  # bool [G, R, V], which words the answer has
    settings: RowSettings  # [G, R]


def empty_rows(config: TextConfig, groups: int, rows: int, slots: int, dtype) -> Rows:
    """A block in which every row is done."""

    def zeros():  # each its own, since blocks are donated
        return jnp.zeros((groups, rows), jnp.int32)

    settings = jax.tree.map(lambda x: jnp.full((groups, rows, *x.shape), x), row_settings(RowOptions(1), 1))
    return Rows(
        suffix=empty_suffix(config, groups, rows, slots, dtype),
        cursor=jnp.int32(0),
        token=zeros(),
        position=zeros(),
        step=zeros(),
        done=jnp.ones((groups, rows), bool),
        said=jnp.zeros((groups, rows, config.vocab_size), bool),
        settings=settings,
    )


# ---- the next token


@flax.struct.dataclass
class Chosen:
    """New tokens, NOT_LIVING where a row had no turn; log-probabilities are zeros where nobody wants any."""

    tokens: jax.Array  # int32 [...]
    logprobs: jax.Array  # float32 [...], before temperature and the like
    top_ids: jax.Array  # int32 [..., MOST_TOP_LOGPROBS], the likeliest
    top_logprobs: jax.Array  # float32 [..., MOST_TOP_LOGPROBS]


def _empty_chosen(*shape: int) -> Chosen:
    none, tops = jnp.zeros(shape), jnp.zeros((*shape, MOST_TOP_LOGPROBS))
    return Chosen(jnp.full(shape, NOT_LIVING, jnp.int32), none, tops.astype(jnp.int32), tops)


def _choose(logits: jax.Array, said: jax.Array, step: jax.Array, settings: RowSettings, living: jax.Array) -> Chosen:
    """The next token of rows [G, R]: logits float32 [G, R, V]; said bool [G, R, V]; step int32, living bool [G, R].

    Sorting and log-probabilities cost nothing while no living row asks for them.
    """

    too_short = step < settings.min_new_tokens

    def greedy(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def no_end(logits):
        is_end = (settings.end_ids[..., None] == jnp.arange(logits.shape[-1])).any(-2)
        return jnp.where(is_end & too_short[..., None], -jnp.inf, logits)

    def greedy_without_end(logits):
        return greedy(no_end(logits))

    def drawn(logits):
        logits = no_end(logits)
        draws = jax.vmap(jax.vmap(Sample.choose))(settings.sample, logits, said, step)
        return jnp.where(settings.sampled, draws, greedy(logits))

    def log_probs(logits, tokens):
        all_words = jax.nn.log_softmax(logits)
        top_logprobs, top_ids = jax.lax.top_k(all_words, MOST_TOP_LOGPROBS)
        return Chosen(tokens, jnp.take_along_axis(all_words, tokens[..., None], -1)[..., 0], top_ids, top_logprobs)

    def tokens_alone(logits, tokens):
        return replace(_empty_chosen(*tokens.shape), tokens=tokens)

    way = jnp.where(jnp.any(living & settings.sampled), 2, jnp.any(living & too_short))
    with jax.named_scope("if_asked"):  # so that compiled programs tell what not every token costs
        tokens = jax.lax.switch(way, [greedy, greedy_without_end, drawn], logits)
        chosen = jax.lax.cond(jnp.any(living & settings.wants_logprobs), log_probs, tokens_alone, logits, tokens)
    return replace(chosen, tokens=jnp.where(living, tokens, NOT_LIVING))


def _ended(token: jax.Array, step: jax.Array, settings: RowSettings) -> jax.Array:
    """Whether a row ends with its newest token, the `step`th."""
    return (token[..., None] == settings.end_ids).any(-1) | (step >= settings.limit)


# ---- programs


def _put(shards: int, x: jax.Array, new: jax.Array, slots: jax.Array, row_ids: jax.Array) -> jax.Array:
    """x [G, R, ...] with `new` [B, n, ...] as rows int32 [B, n], no two alike, of a slot of each shard."""

    def put(x, new, slot, rows):
        return x.at[slot, rows].set(new, mode="drop", unique_indices=True)

    return jax.vmap(put)(by_shard(shards, x), new, slots, row_ids).reshape(x.shape)


def _valid_in_ring(size: int, cursor: jax.Array, lengths: jax.Array) -> jax.Array:
    """bool [..., S]: the slots of rows with so many positions before the cursor."""
    return (cursor - 1 - jnp.arange(size)) % size < lengths[..., None]


def admit(
    model,
    params,
    pool: Pool,
    prefix_lengths: jax.Array,
    rows: Rows,
    slots: jax.Array,
    row_ids: jax.Array,
    questions: Questions,
    settings: RowSettings,
    steps: jax.Array,
    said_ids: jax.Array,
) -> tuple[Rows, Chosen]:
    """Questions become rows, each with its first token.

    Args:
        prefix_lengths: int32 [B], of the prefixes in `slots` int32 [B].
        rows: used up; row_ids: int32 [B, n], which of a slot's rows a question becomes.
        questions: [B, n, Q], Q at most S; where one is not active, nothing changes.
        settings: [B, n].
        steps, said_ids: int32 [B, n] and [B, n, A], tokens that the answer has already, which are at the question's
            end, and -1 behind them; for a row that goes on.

    Returns:
        (the rows, the new tokens [B, n])
    """
    shards, (groups, count, size) = len(slots), rows.suffix.valid.shape
    living = questions.active & (slots < groups // shards)[:, None] & (row_ids < count)
    row_ids = jnp.where(living, row_ids, count + jnp.arange(row_ids.shape[1]))  # those are dropped
    prefix = Prefix(read_slots(pool, shards, slots), prefix_lengths)
    suffix, hidden = generate.prefill_questions(model, 0, params, prefix, questions)
    logits = apply(model, params, at_last_position(hidden, questions.lengths), method="logits")
    vocabulary = jnp.arange(logits.shape[-1])
    said = said_words(said_ids, len(vocabulary))
    chosen = _choose(logits, said, steps, settings, living)

    def put(x, new):
        return _put(shards, x, new, slots, row_ids)

    def put_keys(old, new):
        return ring.put(old, new, slots, row_ids, rows.cursor - questions.lengths)

    new_rows = replace(
        rows,
        suffix=Suffix(
            jax.tree.map(put_keys, rows.suffix.keys_values, suffix.keys_values),
            put(rows.suffix.valid, _valid_in_ring(size, rows.cursor, questions.lengths)),
        ),
        token=put(rows.token, chosen.tokens),
        position=put(rows.position, prefix_lengths[:, None] + questions.lengths),
        step=put(rows.step, steps + 1),
        done=put(rows.done, _ended(chosen.tokens, steps + 1, settings)),
        said=put(rows.said, said | (chosen.tokens[..., None] == vocabulary)),
        settings=jax.tree.map(put, rows.settings, settings),
    )
    return new_rows, chosen


def decode(
    model,
    max_steps: int,
    params,
    pools: Sequence[Pool],
    prefix_lengths: Sequence[jax.Array],
    rows: Sequence[Sequence[Rows]],
    active: Sequence[jax.Array],
    steps: jax.Array,
    leave_after: jax.Array,
) -> tuple[list[Rows], Chosen, jax.Array]:
    """Up to `steps` new tokens for every living row of all blocks, whose rows are side by side in each product.

    A row lives while it is active and not done. It ends when no row lives, or at least `leave_after` have ended.

    Args:
        pools, prefix_lengths: all of one G; int32 [G] of each.
        rows: the blocks of each pool; used up.
        active: bool [G, R] of each block. A row that does not live keeps what it has.
        steps: int32, at most `max_steps`; leave_after: int32.

    Returns:
        (the blocks, the new tokens [max_steps, G, R of all blocks], how many steps were taken)
    """
    pool_of = [n for n, blocks in enumerate(rows) for _ in blocks]
    all_blocks = [block for blocks in rows for block in blocks]
    widths = [block.done.shape[1] for block in all_blocks]
    ends = np.cumsum(widths)[:-1]

    def living(blocks):
        return [here & ~block.done for block, here in zip(blocks, active, strict=True)]

    def count_living(blocks):
        return sum(jnp.sum(alive) for alive in living(blocks))

    began = count_living(all_blocks)

    def goes_on(state):
        blocks, _, taken = state
        alive = count_living(blocks)
        return (taken < steps) & (alive > 0) & (began - alive < leave_after)

    def body(state):
        blocks, chosen, taken = state
        blocks = list(map(_unpacked, blocks, all_blocks))
        alive = living(blocks)
        parts: list[list[CacheBlock]] = [[] for _ in pools]
        for n, block, living_here in zip(pool_of, blocks, alive, strict=True):
            parts[n].append(_cache_block(pools[n], prefix_lengths[n], block, living_here))
        token, position, step, said, settings = jax.tree.map(
            lambda *x: jnp.concatenate(x, axis=1),
            *[(block.token, block.position, block.step, block.said, block.settings) for block in blocks],
        )
        hidden, keys_values = apply(model, params, token[..., None], position[..., None], parts, method="decode_step")
        logits = apply(model, params, hidden[:, :, -1], method="logits")
        new = _choose(logits, said, step, settings, jnp.concatenate(alive, axis=1))
        of_blocks = zip(blocks, keys_values, jnp.split(new.tokens, ends, axis=1), alive, strict=True)
        chosen = jax.tree.map(lambda all_steps, x: all_steps.at[taken].set(x), chosen, new)
        return [_packed(_advance(*of_block)) for of_block in of_blocks], chosen, taken + 1

    chosen = _empty_chosen(max_steps, len(all_blocks[0].done), sum(widths))
    blocks, chosen, taken = jax.lax.while_loop(goes_on, body, (list(map(_packed, all_blocks)), chosen, jnp.int32(0)))
    return list(map(_unpacked, blocks, all_blocks)), chosen, taken


def _packed(rows: Rows) -> Rows:
    """For the loop to carry: its suffix without axes of one element, for which a CPU copies it at each step."""
    return _with_keys(rows, jax.tree.map(drop_ones, rows.suffix.keys_values))


def _unpacked(rows: Rows, like: Rows) -> Rows:
    """What `_packed` was made of, with the shapes of `like`."""
    pairs = rows.suffix.keys_values, like.suffix.keys_values
    return _with_keys(rows, jax.tree.map(lambda x, y: restore_ones(x, y.shape), *pairs))


def _with_keys(rows: Rows, keys_values) -> Rows:
    return replace(rows, suffix=replace(rows.suffix, keys_values=keys_values))


def _cache_block(pool: Pool, prefix_lengths: jax.Array, rows: Rows, living: jax.Array) -> CacheBlock:
    """What the rows see: at least the slot at the cursor, so that there is something. Only living rows write there."""
    lengths = jnp.where(living.any(1), prefix_lengths, 0)  # so that what nobody reads is passed over
    valid = rows.suffix.valid | _at_cursor(rows)
    return CacheBlock(Prefix(pool, lengths), replace(rows.suffix, valid=valid), rows.cursor, living)


def _at_cursor(rows: Rows) -> jax.Array:
    """bool [S]"""
    return jnp.arange(rows.suffix.valid.shape[-1]) == rows.cursor


def _advance(rows: Rows, keys_values, tokens: jax.Array, living: jax.Array) -> Rows:
    """The rows after a step: their suffixes, and their new tokens [G, R]."""
    step, token = rows.step + living, jnp.where(living, tokens, rows.token)
    return replace(
        rows,
        suffix=Suffix(keys_values, rows.suffix.valid | (living[..., None] & _at_cursor(rows))),
        cursor=(rows.cursor + 1) % rows.suffix.valid.shape[-1],
        token=token,
        position=rows.position + living,
        step=step,
        done=rows.done | (living & _ended(token, step, rows.settings)),
        said=rows.said | (tokens[..., None] == jnp.arange(rows.said.shape[-1])),
    )


def move(
    shorts: Rows,
    longs: Rows,
    shards: int,
    slots: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    limits: jax.Array,
) -> tuple[Rows, Rows]:
    """Rows of a block that go on in another with as many slots or more; both blocks are used up.

    Args:
        slots, sources, targets: int32 [B], a slot of each shard, its row there, and the row that it becomes.
        limits: int32 [B], new tokens that it may have there. A row that ended at its old limit lives on.

    Returns:
        (the one block, in which the row is done; the other)
    """
    groups, count, size = longs.suffix.valid.shape
    in_range = (slots < groups // shards) & (sources < shorts.done.shape[1])
    sources, targets = sources[:, None], jnp.where(in_range, targets, count)[:, None]

    def read(x):
        get = jax.vmap(lambda x, slot, row: x.at[slot, row].get(mode="clip"))
        return get(by_shard(shards, x), slots, sources)  # [B, 1, ...]

    def read_by_head(x):
        get = jax.vmap(lambda x, slot, row: x.at[slot, :, row].get(mode="clip"))
        return get(by_shard(shards, x), slots, sources)  # [B, 1, K, S, D]

    def put(x, new):
        return _put(shards, x, new, slots, targets)

    valid = read(shorts.suffix.valid)
    oldest_first = (shorts.cursor + jnp.arange(valid.shape[-1])) % valid.shape[-1]
    order = oldest_first[jnp.argsort(valid[:, 0][:, oldest_first], axis=-1, stable=True)]  # [B, S], its own at the end

    def move_keys(old, new):
        ordered = jax.vmap(lambda x, order: x[0][:, order])(read_by_head(old), order)  # [B, K, S, D]
        starts = jnp.broadcast_to(longs.cursor - ordered.shape[2], targets.shape)
        return ring.put(new, ordered[:, :, None], slots, targets, starts)

    settings = replace(jax.tree.map(read, shorts.settings), limit=limits[:, None])
    token, step = read(shorts.token), read(shorts.step)
    longs = replace(
        longs,
        suffix=Suffix(
            jax.tree.map(move_keys, shorts.suffix.keys_values, longs.suffix.keys_values),
            put(longs.suffix.valid, _valid_in_ring(size, longs.cursor, valid.sum(-1))),
        ),
        token=put(longs.token, token),
        position=put(longs.position, read(shorts.position)),
        step=put(longs.step, step),
        done=put(longs.done, _ended(token, step, settings)),
        said=put(longs.said, read(shorts.said)),
        settings=jax.tree.map(put, longs.settings, settings),
    )
    left = jnp.where(targets < count, sources, shorts.done.shape[1])
    return replace(shorts, done=_put(shards, shorts.done, jnp.ones_like(left, bool), slots, left)), longs


def score(
    model, params, pool: Pool, shards: int, prefix_lengths: jax.Array, slots: jax.Array, questions: Questions
) -> generate.ScoredTokens:
    """`generate.score` of questions [B, n, Q] after the prefixes in a slot of each shard, [B, n, Q - 1] each."""
    return generate.score(model, params, Prefix(read_slots(pool, shards, slots), prefix_lengths), questions)
