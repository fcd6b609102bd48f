"""Many questions: each image is encoded and prefilled once, its questions share that prefix, and scores do the same."""

from __future__ import annotations

import sys
from dataclasses import replace

import jax
import numpy as np

from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import Group, Wave, bucket_rows, common_length, group_prompts, pack_questions, plan_waves
from llava_jax.inputs.tokenizer import tokenizer_image_token

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
    """Requests (image, questions) as groups of ids.

    Returns:
        (groups, for each request its (tiles, sizes), for each question None or the ValueError that it raises)
    """
    groups, pictures, errors = [], [], []
    for n, (image, questions) in enumerate(requests):
        pictures.append(llava.load_images(image))
        rows, places = [], []
        for question in questions:
            try:
                rows.append(np.asarray(llava.prompt_ids(question, pictures[n][1], conv_mode)))
                places.append(len(errors))
                errors.append(None)
            except ValueError as error:
                errors.append(ValueError(f"question {len(errors)} (image {n}, {question!r:.60}): {error}"))
        if rows:
            groups += group_prompts(rows, places, n)
    return groups, pictures, errors


def run_waves(llava, params, groups: list[Group], pictures, slots: int, budget: int | None, answer):
    """Prefill each wave's prefixes once, and hand them and their questions, a few rows at a time, to `answer`.

    Args:
        answer: (Prefix, last hidden states [G, E], Questions [G, R, Q]) → results, indexed [G, R].

    Yields:
        (place, result) of each question, in the order of the work.
    """
    config = llava.config
    lengths = [group.prefix_length(pictures[group.images][1], config) for group in groups]
    budget = memory_budget(params) if budget is None else budget
    waves = plan_waves(groups, lengths, config, slots, jax.tree.leaves(params)[0].dtype.itemsize, budget)
    if waves:
        _announce(waves, groups, budget)
    for wave in waves:
        prefix, last = prefill_wave(llava, params, wave, pictures)
        for start in range(0, max(len(group.questions) for group in wave.groups), wave.rows):
            here = slice(start, start + wave.rows)
            questions = [group.questions[here] for group in wave.groups]
            rows = bucket_rows(max(map(len, questions)))
            results = answer(prefix, last, pack_questions(questions, len(wave.groups), rows))
            for g, group in enumerate(wave.groups):
                yield from zip(group.places[here], results[g], strict=False)


def prefill_wave(llava, params, wave: Wave, pictures):
    """(Prefix, last hidden states [G, E]) of a wave, `at_once` prefixes after another."""
    parts = []
    for start in range(0, len(wave.groups), wave.at_once):
        groups = wave.groups[start : start + wave.at_once]
        rows = [group.prefix for group in groups]
        tiles = [tile for group in groups for tile in pictures[group.images][0]]
        sizes = [size for group in groups for size in pictures[group.images][1]]
        batch = pack(rows, [np.full(len(row), -100) for row in rows], tiles, sizes, llava.config)
        parts.append(llava._prefill(params, batch))
    return parts[0] if len(parts) == 1 else llava._join(parts)


def _announce(waves: list[Wave], groups: list[Group], budget: int) -> None:
    rows, most = sum(len(group.questions) for group in groups), max(waves, key=lambda wave: wave.bytes)
    print(
        f"{rows} questions on {len(groups)} prefixes in {len(waves)} waves; the largest takes {len(most.groups)} "
        f"prefixes, {most.rows} rows each, {most.bytes / 2**30:.2f} of {budget / 2**30:.2f} GiB",
        file=sys.stderr,
    )


def score_candidates(llava, params, image, question, candidates, memory_budget, conv_mode) -> np.ndarray:
    """`Llava.score`: the prompt is the prefix, the candidates are its rows."""
    tiles, sizes = llava.load_images(image)
    asked = np.asarray(llava.prompt_ids(question, sizes, conv_mode))
    rows = [np.asarray(_answered_ids(llava, question, text, len(sizes), conv_mode)) for text in candidates]
    answer_starts = [common_length([asked, row]) for row in rows]
    (group,) = group_prompts([asked, *rows], range(-1, len(rows)), 0)  # the prompt itself bounds the prefix
    group = replace(group, questions=group.questions[1:], places=group.places[1:])
    scores = np.zeros(len(rows), np.float32)

    def answer(prefix, last, questions):
        return np.asarray(llava._score(params, prefix, questions))

    for place, logprobs in run_waves(llava, params, [group], [(tiles, sizes)], 0, memory_budget, answer):
        first = len(group.prefix) + 1  # the id that the first of the log-probabilities is of
        scores[place] = logprobs[answer_starts[place] - first : len(rows[place]) - first].sum()
    return scores


def _answered_ids(llava, question, answer: str, num_images: int, conv_mode) -> list[int]:
    """Ids of the prompt with the answer written in, up to the answer's end."""
    conversation = llava.conversation(question, num_images, conv_mode)
    answered = conversation.replace_last(conversation.messages[-1][0], answer).get_prompt()
    return tokenizer_image_token(answered[: answered.rindex(answer) + len(answer)], llava.tokenizer)
