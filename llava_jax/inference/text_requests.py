"""Questions and candidates as text, over `batching`: what `Llava.generate_batch` and `Llava.score` do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llava_jax.inference import batching
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inputs.groups import Group, Prompt, common_length, group_prompts
from llava_jax.inputs.prompt import as_prompts, as_texts, prompt_ids
from llava_jax.inputs.types import ProcessedImage

if TYPE_CHECKING:
    from llava_jax.inference.llava import Llava


class Grouped(NamedTuple):
    """Questions on the same images, those that can be asked and those that cannot."""

    groups: list[Group]
    refused: Sequence[tuple[Any, Exception]]  # (question, why)


def group_questions(
    llava: Llava, asked: Iterable[tuple[Any, Any]], images, sizes, conv_mode: str | None = None
) -> Grouped:
    """Questions on the same images as groups that share a prefix.

    Args:
        asked: (question, prompt) pairs: the caller's own object, and its prompt as `Llava.generate` takes it.
        images: what the caller calls the images; sizes: (width, height) of each.
    """
    prompts, refused = [], []
    for question, prompt in asked:
        try:
            prompts.append(Prompt(question, np.asarray(llava.prompt_ids(prompt, sizes, conv_mode))))
        except ValueError as error:
            refused.append((question, error))
    return Grouped(group_prompts(prompts, images, sizes, llava.config) if prompts else [], refused)


def generate_batch(
    llava: Llava, params, requests, memory_budget: int | None, conv_mode: str | None, options: GenerationOptions
) -> list:
    """`Llava.generate_batch`."""
    answers: list = []
    groups: list[Group] = []
    images: dict[int, list[ProcessedImage]] = {}  # of each request
    for n, (image, questions) in enumerate(requests):
        asked = dict(enumerate(as_prompts(questions), len(answers)))
        answers += [None] * len(asked)
        try:
            images[n] = llava.load_images(image)
            grouped = group_questions(llava, asked.items(), n, [picture.size for picture in images[n]], conv_mode)
        except (ValueError, OSError) as error:
            grouped = Grouped([], [(i, error) for i in asked])
        groups += grouped.groups
        for i, reason in grouped.refused:
            answers[i] = ValueError(f"question {i} (image {n}, {asked[i]!r:.60}): {reason}")
    for batch in batching.plan(llava.engine, params, groups, options.output_capacity, memory_budget):
        for i, tokens in batching.generate(llava.engine, params, batch, images, options):
            answers[i] = llava.decode(tokens)
    return answers


def score_candidates(
    llava: Llava, params, image, question, candidates, memory_budget: int | None, conv_mode: str | None
) -> np.ndarray:
    """`Llava.score`: the prompt is the prefix, the candidates are its rows."""
    texts = as_texts(candidates, "candidates")
    images = llava.load_images(image)
    sizes = [picture.size for picture in images]
    prompt, rows = np.asarray(llava.prompt_ids(question, sizes, conv_mode)), []
    for i, text in enumerate(texts):
        try:
            rows.append(np.asarray(prompt_ids(llava.config, llava.tokenizer, question, sizes, conv_mode, text)))
        except ValueError as error:
            raise ValueError(f"candidates[{i}] ({text!r:.60}): {error}") from None
    scores = np.zeros(len(rows), np.float32)
    if not rows:
        return scores
    prompts = [Prompt(None, prompt), *(Prompt(i, row) for i, row in enumerate(rows))]
    (group,) = group_prompts(prompts, 0, sizes, llava.config)  # the prompt is among them: no more than it is shared
    group = replace(group, suffixes=group.suffixes[1:], questions=group.questions[1:])
    (batch,) = batching.plan(llava.engine, params, [group], 0, memory_budget)
    for i, logprobs in batching.score(llava.engine, params, batch, {0: images}):
        first = len(group.prefix) + 1  # the id that the first of the log-probabilities is of
        answer_start = common_length([prompt, rows[i]])
        scores[i] = logprobs[answer_start - first : len(rows[i]) - first].sum()
    return scores
