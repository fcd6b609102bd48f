"""Questions and candidates as text, over `batching`: what `Llava.generate_batch` and `Llava.score` do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.inference import batching
from llava_jax.inference.batching import LoadedGroup
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inference.requests import RowOptions
from llava_jax.inputs.batch import merged_length
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
    llava: Llava,
    params,
    requests,
    memory_budget: int | None,
    conv_mode: str | None,
    options: GenerationOptions,
    limits: Sequence[int] | None = None,
) -> list:
    """`Llava.generate_batch`. `limits`: new tokens of each question, at most those of the options; None: those."""
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
    if limits is not None and len(limits) != len(answers):
        raise ValueError(f"max_new_tokens: {len(limits)} for {len(answers)} questions")

    def limit(i: int) -> int:
        return options.max_new_tokens if limits is None else limits[i]

    def of_row(i: int) -> RowOptions:
        return row_options(llava.config, options, limit(i))

    for phase in batching.plan(llava.engine, params, groups, options.output_capacity, memory_budget, limit):
        loaded = (LoadedGroup(group, images[group.images]) for group in phase.groups)
        for ended in batching.generate(llava.engine, params, phase, loaded, of_row):
            for i, tokens in ended:
                answers[i] = llava.decode(tokens)
    return answers


def row_options(config: LlavaConfig, options: GenerationOptions, max_new_tokens: int | None = None) -> RowOptions:
    """A row's, of an answer as `Llava.generate` gives it."""
    limit = options.max_new_tokens if max_new_tokens is None else max_new_tokens
    return RowOptions(limit, tuple(config.generation.eos_token_ids), options.sampling)


def score_candidates(
    llava: Llava, params, image, question, candidates, memory_budget: int | None, conv_mode: str | None
) -> np.ndarray:
    """`Llava.score`: what the prompt and all candidates' rows begin with is prefilled once."""
    texts = as_texts(candidates, "candidates")
    images = llava.load_images(image)
    sizes = [picture.size for picture in images]
    prompt, rows = np.asarray(llava.prompt_ids(question, sizes, conv_mode)), []
    for i, text in enumerate(texts):
        try:
            rows.append(np.asarray(prompt_ids(llava.config, llava.tokenizer, question, sizes, conv_mode, text)))
        except ValueError as error:
            raise ValueError(f"candidates[{i}] ({text!r:.60}): {error}") from None
    if not rows:
        return np.zeros(0, np.float32)
    starts = [common_length([prompt, row]) for row in rows]
    shared = min(starts)  # less than the prompt, where a candidate's first letters make a token with the prompt's last
    prefix, suffixes = prompt[: shared - 1], tuple(row[shared - 1 :] for row in rows)
    group = Group(prefix, suffixes, tuple(range(len(rows))), 0, merged_length(prefix, sizes, llava.config))
    (phase,) = batching.plan(llava.engine, params, [group], 0, memory_budget)
    counted = [start - shared for start in starts]
    return batching.score(llava.engine, params, phase, LoadedGroup(group, images), counted)
