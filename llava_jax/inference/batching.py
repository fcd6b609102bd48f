"""Many questions: each image is encoded and prefilled once, its questions share that prefix, and scores do the same."""

from __future__ import annotations

import sys
from dataclasses import replace

import jax
import numpy as np

from llava_jax.constants import IGNORE_INDEX
from llava_jax.inputs.batch import pack, room_for, stack_shards
from llava_jax.inputs.groups import (
    Group,
    PrefixBatch,
    bucket_rows,
    common_length,
    group_prompts,
    pack_questions,
    plan_waves,
)
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.prompt import as_prompts, as_texts, prompt_ids
from llava_jax.inputs.types import Batch
from llava_jax.parallel.sharding import batch_sharding, num_batch_shards

CPU_BUDGET = 4 << 30  # bytes; a GPU or TPU says how much it has
SHARE = 0.8  # of what an accelerator has free


def memory_budget(params) -> int:
    """Bytes for one wave: most of what the device of `params` has free."""
    device = min(jax.tree.leaves(params)[0].devices(), key=lambda d: d.id)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return CPU_BUDGET
    return int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))


def make_groups(llava, requests, conv_mode=None):
    """Requests (sizes of the images, or the ValueError of one; questions) as groups of ids.

    Returns:
        (groups, whose `images` is the request's number; for each question None, or the ValueError that it raises)
    """
    groups: list[Group] = []
    errors: list[ValueError | None] = []
    for n, (sizes, questions) in enumerate(requests):
        if isinstance(sizes, ValueError):
            errors += [sizes] * len(questions)
            continue
        rows, places = [], []
        for question in questions:
            try:
                rows.append(np.asarray(llava.prompt_ids(question, sizes, conv_mode)))
                places.append(len(errors))
                errors.append(None)
            except ValueError as error:
                errors.append(error)
        if rows:
            groups += group_prompts(rows, places, n)
    return groups, errors


def plan(llava, params, groups: list[Group], sizes, slots: int, budget: int | None) -> list[PrefixBatch]:
    """The waves that answer the groups, and a line about them on stderr.

    Args:
        sizes: `sizes[group.images]` are the (width, height) of a group's images.
        budget: bytes of one device; None is most of what is free.
    """
    lengths = [group.prefix_length(sizes[group.images], llava.config) for group in groups]
    budget = memory_budget(params) if budget is None else whole_number("memory_budget", budget, 1, 1 << 62)
    itemsize = params["language_model"]["embed_tokens"]["embedding"].dtype.itemsize
    tensor = 1 if llava.mesh is None else llava.mesh.shape.get("tensor", 1)
    divided = num_batch_shards(llava.mesh), tensor
    waves = plan_waves(groups, lengths, llava.config, slots, itemsize, budget, *divided, llava.model.int8_prefix)
    if waves:
        _announce(waves, groups, budget)
    return waves


def run_wave(llava, params, wave: PrefixBatch, pictures, answer):
    """Prefill the wave's prefixes once, and hand them and their questions, a few rows at a time, to `answer`.

    Args:
        pictures: `pictures[group.images]` are a group's (tiles, sizes).
        answer: (Prefix, last hidden states [G, E], Questions [G, R, Q]) → results, indexed [G, R].

    Yields:
        (place, result) of each question.
    """
    count = wave.per_shard * num_batch_shards(llava.mesh)
    prefix, last = prefill_wave(llava, params, wave, pictures)
    for start in range(0, max(len(group.questions) for group in wave.groups), wave.rows):
        here = slice(start, start + wave.rows)
        questions = [group.questions[here] for group in wave.groups]
        rows = bucket_rows(max(map(len, questions)))
        results = answer(prefix, last, _placed(pack_questions(questions, count, rows), llava.mesh))
        for g, group in enumerate(wave.groups):
            yield from zip(group.places[here], results[g], strict=False)


def prefill_wave(llava, params, wave: PrefixBatch, pictures):
    """(Prefix, last hidden states [G, E]) of a wave, `at_once` prefixes of each shard after another."""
    shards, parts = num_batch_shards(llava.mesh), []
    for first in range(0, wave.per_shard, wave.at_once):
        batches = []
        for start in range(first, wave.per_shard * shards, wave.per_shard):
            batches.append(
                _pack_groups(llava.config, wave.groups[start : start + wave.at_once], wave.at_once, pictures)
            )
        batch = batches[0] if shards == 1 else stack_shards(batches, room_for(batches), llava.config)[0]
        parts.append(llava._prefill(params, _placed(batch, llava.mesh)))
    return parts[0] if len(parts) == 1 else llava._join(shards, parts)


def _pack_groups(config, groups, count: int, pictures) -> Batch:
    """The prefixes of `count` groups; those that are missing are one token of padding."""
    rows = [group.prefix for group in groups] + [np.zeros(1, np.int64)] * (count - len(groups))
    tiles = [tile for group in groups for tile in pictures[group.images][0]]
    sizes = [size for group in groups for size in pictures[group.images][1]]
    return pack(rows, [np.full(len(row), IGNORE_INDEX) for row in rows], tiles, sizes, config)


def _placed(batch, mesh):
    """A batch of groups with each shard's on the devices of that shard."""
    return batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))


def _announce(waves: list[PrefixBatch], groups: list[Group], budget: int) -> None:
    rows, most = sum(len(group.questions) for group in groups), max(waves, key=lambda wave: wave.bytes)
    print(
        f"{rows} questions on {len(groups)} prefixes in {len(waves)} waves; the largest takes {len(most.groups)} "
        f"prefixes, {most.rows} rows each, {most.bytes / 2**30:.2f} of {budget / 2**30:.2f} GiB",
        file=sys.stderr,
    )


def answerer(llava, params, decoding):
    """`run_wave`'s `answer` for generated text; `decoding` is from `Llava.plan_decode`."""
    slots, limit, sampling = decoding

    def answer(prefix, last, questions):
        return np.asarray(llava._answer(slots, params, prefix, last, questions, sampling, limit))

    return answer


def as_text(llava, tokens: np.ndarray) -> str:
    """An answer's tokens as the original decodes them."""
    return llava.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()


def answer_requests(llava, params, requests, memory_budget, conv_mode, decoding) -> list:
    """`Llava.generate_batch`."""
    requests = [(_load(llava, image), as_prompts(questions)) for image, questions in requests]
    pictures = [picture for picture, _ in requests]
    sizes = [picture if isinstance(picture, ValueError) else picture[1] for picture in pictures]
    asked_of = [(size, questions) for size, (_, questions) in zip(sizes, requests, strict=True)]
    groups, answers = make_groups(llava, asked_of, conv_mode)
    asked = [(n, question) for n, (_, questions) in enumerate(requests) for question in questions]
    for i, (n, question) in enumerate(asked):
        if answers[i] is not None:
            answers[i] = ValueError(f"question {i} (image {n}, {question!r:.60}): {answers[i]}")
    answer = answerer(llava, params, decoding)
    for wave in plan(llava, params, groups, sizes, decoding[0], memory_budget):
        for place, tokens in run_wave(llava, params, wave, pictures, answer):
            answers[place] = as_text(llava, tokens)
    return answers


def _load(llava, image):
    """(tiles, sizes) of a request's pictures, or what is wrong with one of them."""
    try:
        return llava.load_images(image)
    except (ValueError, OSError) as error:
        return ValueError(str(error))


def score_candidates(llava, params, image, question, candidates, memory_budget, conv_mode) -> np.ndarray:
    """`Llava.score`: the prompt is the prefix, the candidates are its rows."""
    candidates = as_texts(candidates, "candidates")
    tiles, sizes = llava.load_images(image)
    asked = np.asarray(llava.prompt_ids(question, sizes, conv_mode))
    rows = [_answered_ids(llava, question, sizes, conv_mode, i, text) for i, text in enumerate(candidates)]
    scores = np.zeros(len(rows), np.float32)
    if not rows:
        return scores
    answer_starts = [common_length([asked, row]) for row in rows]
    (group,) = group_prompts([asked, *rows], range(-1, len(rows)), 0)  # the prompt itself bounds the prefix
    group = replace(group, questions=group.questions[1:], places=group.places[1:])

    def answer(prefix, last, questions):
        return np.asarray(llava._score(params, prefix, questions))

    (wave,) = plan(llava, params, [group], [sizes], 0, memory_budget)
    for place, logprobs in run_wave(llava, params, wave, [(tiles, sizes)], answer):
        first = len(group.prefix) + 1  # the id that the first of the log-probabilities is of
        scores[place] = logprobs[answer_starts[place] - first : len(rows[place]) - first].sum()
    return scores


def _answered_ids(llava, question, sizes, conv_mode, number: int, candidate: str) -> np.ndarray:
    """Ids of the prompt with a candidate written in as the answer."""
    try:
        return np.asarray(prompt_ids(llava.config, llava.tokenizer, question, sizes, conv_mode, candidate))
    except ValueError as error:
        raise ValueError(f"candidates[{number}] ({candidate!r:.60}): {error}") from None
