"""Questions and candidates as text, over `batching`: what `Llava.generate_batch` and `Llava.score` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference import batching
from llava_jax.inference.batching import Ends, LoadedGroup, Phase
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inference.requests import RowOptions
from llava_jax.inputs.batch import merged_length
from llava_jax.inputs.detokenizer import IncrementalDetokenizer
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

    def of_question(i: int) -> GenerationOptions:
        return replace(options, max_new_tokens=limit(i))

    for phase in batching.plan(llava.engine, params, groups, options.output_capacity, memory_budget, limit):
        loaded = (LoadedGroup(group, images[group.images]) for group in phase.groups)
        for ended in generate_texts(llava, params, phase, loaded, of_question):
            for i, text in ended:
                answers[i] = text
    return answers


def generate_texts(
    llava: Llava, params, phase: Phase, loaded: Iterable[LoadedGroup], options: Callable[[Any], GenerationOptions]
) -> Iterator[list[tuple[Any, str]]]:
    """A phase's questions, as the caller has them, and their answers: lists of those that have just ended.

    Args:
        loaded: as `batching.generate` takes it.
        options: of a question.
    """

    def of_row(question) -> RowOptions:
        return row_options(llava.config, options(question))

    def ends(question) -> Ends | None:
        stop = options(question).stop
        return _at_stop_string(llava.tokenizer, stop) if stop else None

    for ended in batching.generate(llava.engine, params, phase, loaded, of_row, ends):
        yield [(question, _text(llava, tokens, options(question).stop)) for question, tokens in ended]


def row_options(config: LlavaConfig, options: GenerationOptions) -> RowOptions:
    """A row's, of an answer as `Llava.generate` gives it; stop strings are looked for in its text."""
    return RowOptions(options.max_new_tokens, tuple(config.generation.eos_token_ids), options.sampling)


def _at_stop_string(tokenizer, stop: Sequence[str]) -> Ends:
    text = IncrementalDetokenizer(tokenizer, stop)

    def ends(token: int) -> bool:
        text.push(token)
        return text.stopped

    return ends


def _text(llava: Llava, tokens: np.ndarray, stop: Sequence[str]) -> str:
    """An answer without its stop string, if it has come to one."""
    if not stop:
        return llava.decode(tokens)
    text = IncrementalDetokenizer(llava.tokenizer, stop)
    return "".join([*map(text.push, tokens.tolist()), text.flush()])


def score_candidates(
    llava: Llava, params, image, question, candidates, memory_budget: int | None, conv_mode: str | None
) -> np.ndarray:
    """`Llava.score`: what the prompt and all candidates' rows begin with is prefilled once."""
    texts = as_texts(candidates, "candidates")
    images = llava.load_images(image)
    sizes = [picture.size for picture in images]
    prompt, rows = np.asarray(llava.prompt_ids(question, sizes, conv_mode)), list[Continued]()
    for i, text in enumerate(texts):
        try:
            ids = np.asarray(prompt_ids(llava.config, llava.tokenizer, question, sizes, conv_mode, text))
        except ValueError as error:
            raise ValueError(f"candidates[{i}] ({text!r:.60}): {error}") from None
        # Less than the prompt, where a candidate's first letters make a token with the prompt's last.
        rows.append(Continued(i, ids, common_length([prompt, ids])))
    scores = np.zeros(len(rows), np.float32)
    groups = group_continuations(rows, images, sizes, llava.config) if rows else []
    for phase in batching.plan(llava.engine, params, groups, 0, memory_budget):
        loaded = (LoadedGroup(group, images) for group in phase.groups)
        for scored in batching.score(llava.engine, params, phase, loaded, lambda i: rows[i].start):
            for i, found in scored:
                scores[i] = found.logprob
    return scores


class Continued(NamedTuple):
    """A prompt and what is to follow it."""

    question: Any  # the caller's own object
    ids: np.ndarray  # int64 [L], all of it, -200 where an image goes
    start: int  # where in them what follows begins


def group_continuations(rows: Sequence[Continued], images, sizes, config: LlavaConfig) -> list[Group]:
    """Groups as `batching.score` takes them: one of all rows, if what their prompts share holds all their images, or
    one of those with the same prompt.

    images: what the caller calls the images; sizes: (width, height) of each.
    """
    shared = min(common_length([row.ids for row in rows]), *(row.start for row in rows))
    apart: dict[bytes, list[Continued]] = {}
    for row in rows:
        apart.setdefault(row.ids[: row.start].tobytes(), []).append(row)
    if len(apart) > 1 and (shared < 2 or any(np.any(row.ids[shared - 1 :] == IMAGE_TOKEN_INDEX) for row in rows)):
        return [group for some in apart.values() for group in group_continuations(some, images, sizes, config)]
    prefix = rows[0].ids[: shared - 1]
    suffixes, questions = tuple(row.ids[shared - 1 :] for row in rows), tuple(row.question for row in rows)
    return [Group(prefix, suffixes, questions, images, merged_length(prefix, sizes, config))]
