"""A model that an evaluation harness asks, everything known beforehand: answers, and how likely given ones are.

It knows no harness; `llava_jax.evaluation.lmms_eval` has the one for lmms-eval.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import llava_jax
from llava_jax.checkpoint import check_int8_kernels, fingerprint, load_config
from llava_jax.constants import DTYPES
from llava_jax.evaluation.answer_cache import AnswerCache, cache_key
from llava_jax.evaluation.harness_prompts import conv_template
from llava_jax.evaluation.harness_requests import (
    Asked,
    DocumentPictures,
    HarnessRequest,
    Refused,
    read_requests,
    threads,
)
from llava_jax.evaluation.pictures import by_pictures, load_ahead, without_lost
from llava_jax.inference import batching
from llava_jax.inference.batching import LoadedGroup, Phase, Scored
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inference.llava import Llava
from llava_jax.inference.sampling import Sample
from llava_jax.inference.text_requests import Continued, generate_texts, group_continuations, group_questions
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.groups import Group
from llava_jax.parallel import multihost
from llava_jax.parallel.mesh_axes import check_axes

MOST_NAMED = 20  # requests of which a report says why they could not be asked
RESUMES = "what was answered is kept in the cache, if there is one: start it again, everywhere, to go on"


@dataclass(frozen=True)
class HarnessOptions:
    """What a harness is told of a model, in the names that lmms-eval's own models have."""

    pretrained: str
    conv_template: str | None = None  # None: what lmms-eval's users give `llava` for this checkpoint
    mesh: tuple[tuple[str, int], ...] = ()  # of each process's own devices; empty is all of them
    dtype: str | None = None
    quantize: str | None = None
    int8_prefix: bool = False
    int8_activations: bool = False
    cache: str | None = None  # the folder of what was answered; None: a run that is killed begins anew

    def __post_init__(self):
        check_axes(self.mesh, "data", "tensor")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype={self.dtype!r:.40} must be one of {', '.join(DTYPES)}")
        if self.quantize not in (None, "int8"):
            raise ValueError(f"quantize={self.quantize!r:.40} must be int8, or be left out")


class Likelihood(NamedTuple):
    """Of a continuation."""

    loss: float  # the mean negative log-likelihood of its tokens, the end of its turn among them
    greedy: bool  # greedy decoding would give it


class Keyed(NamedTuple):
    """What is asked, and what its answer is known by."""

    key: str
    asked: Asked


class Harness:
    """Its parameters are loaded when the first question needs them.

    Raises:
        FileNotFoundError, ValueError, OSError: the options, the checkpoint or the cache's folder are not right.
    """

    def __init__(self, options: HarnessOptions):
        self.options, self.config = options, load_config(options.pretrained)
        if options.int8_activations:
            check_int8_kernels(options.pretrained, options.quantize)
        self._template = conv_templates[conv_template(self.config, options.conv_template)]
        self._cache = None if options.cache is None else AnswerCache(options.cache)
        self._mesh = batching.local_mesh(dict(options.mesh), self.config, options.dtype, options.quantize)
        held = (options.dtype, options.quantize, options.int8_prefix, options.int8_activations)
        self._model_key = [fingerprint(options.pretrained), self.config.digest, *held]
        self._loaded: tuple[Llava, Any] | None = None
        self._refused: list[Refused] = []

    def close(self) -> None:
        """Give the device's memory back; the next question loads the parameters again."""
        self._loaded = None

    def answer(self, requests: Sequence[HarnessRequest], divide: bool = True) -> list[str]:
        """The answers, in the order of the requests; an empty one where a request cannot be asked, which is reported.

        The same question asked again is answered once; an answer that is drawn is drawn again, with the next seed.

        divide: among JAX's processes, all of which have these requests, and get all answers.
        """
        asked = self._read(requests)
        answers = self._collect(asked, self._answers, divide)
        return ["" if one is None else answers.get(one.key, "") for one in asked]

    def score(self, requests: Sequence[HarnessRequest], divide: bool = True) -> list[Likelihood]:
        """Of the requests' continuations, as `answer`; an infinite loss where a request cannot be asked."""
        asked = self._read(requests)
        scores = self._collect(asked, self._scores, divide)
        return [Likelihood(*scores.get("" if one is None else one.key, (math.inf, False))) for one in asked]

    def _read(self, requests: Sequence[HarnessRequest]) -> list[Keyed | None]:
        """None where a request cannot be asked."""
        found: list[Keyed | None] = []
        times: Counter[str] = Counter()
        for asked in read_requests(requests, self._template):
            if isinstance(asked, Refused):
                self._refused.append(asked)
                found.append(None)
                continue
            key = self._key(asked)
            before, times[key] = times[key], times[key] + 1
            if before:
                asked = _with_seed(asked, before)
                key = self._key(asked)
            found.append(Keyed(key, asked))
        return found

    def _key(self, asked: Asked) -> str:
        return cache_key([*self._model_key, *asked.identity])

    def _collect(self, asked: Sequence[Keyed | None], answers: Callable, divide: bool) -> dict[str, Any]:
        """The answers by key, of all processes where the work is divided. `answers` gives those that are not in the
        cache, as they come."""
        divide = divide and jax.process_count() > 1
        with multihost.abort_on_peer_failure(RESUMES) if divide else contextlib.nullcontext():
            once = dict(one for one in asked if one is not None)
            mine = share_of_process(once) if divide else once
            found = {} if self._cache is None else self._cache.known(mine)
            left = {key: one for key, one in mine.items() if key not in found}
            if left or divide:  # of several processes, all load the model together
                for new in answers(left):
                    found |= new
                    if self._cache is not None:
                        self._cache.add(new)
            self._report()
            shares = multihost.allgather_bytes(json.dumps(found).encode()) if divide else []
        return found | {key: answer for share in shares for key, answer in json.loads(share).items()}

    def _report(self) -> None:
        """Say what could not be asked."""
        lines = [f"{one.name}: {one.reason}" for one in self._refused[:MOST_NAMED]]
        more = len(self._refused) - MOST_NAMED
        if lines:
            lines += [f"and {more} more"] if more > 0 else []
            lines.append(f"{len(self._refused)} requests could not be asked, and count as answered with nothing")
            print(*lines, sep="\n", file=sys.stderr)
        self._refused.clear()

    # ---- answers

    def _answers(self, asked: Mapping[str, Asked]) -> Iterator[dict[str, str]]:
        """By key, as they come."""
        llava, params = self._load()
        options: dict[str, GenerationOptions] = {}
        by_capacity: dict[int, list[Group]] = {}
        for together in _by_pictures(asked):
            pictures = next(iter(together.values())).pictures
            prompts = [(key, one.conversation) for key, one in together.items()]
            grouped = group_questions(llava, prompts, pictures, pictures.sizes)
            self._refused += [Refused(asked[key].name, str(error)) for key, error in grouped.refused]
            for group in grouped.groups:
                options |= self._within_context(group, asked)
                capacity = max(options[key].output_capacity for key in group.questions)
                by_capacity.setdefault(capacity, []).append(group)
        with self._progress(len(options), "answer") as progress:
            for capacity, groups in sorted(by_capacity.items()):  # short answers need no long rows
                phases = batching.plan(
                    llava.engine, params, groups, capacity, limit=lambda key: options[key].max_new_tokens
                )
                for phase, loaded in self._loaded_phases(phases, asked):
                    for ended in generate_texts(llava, params, phase, loaded, options.__getitem__):
                        progress.update(len(ended))
                        yield dict(ended)

    def _within_context(self, group: Group, asked: Mapping[str, Asked]) -> dict[str, GenerationOptions]:
        """By key: an answer ends where the model's context does, beyond which `llava` would go on."""
        found = {}
        for key, suffix in zip(group.questions, group.suffixes, strict=True):
            how = asked[key].options
            assert how is not None
            room = max(1, self.config.context_length - group.prefix_length - len(suffix))
            found[key] = replace(how, max_new_tokens=min(how.max_new_tokens, room))
        return found

    # ---- likelihoods

    def _scores(self, asked: Mapping[str, Asked]) -> Iterator[dict[str, Likelihood]]:
        """By key, as they come."""
        llava, params = self._load()
        rows: dict[str, Continued] = {}
        groups: list[Group] = []
        for together in _by_pictures(asked):
            pictures = next(iter(together.values())).pictures
            continued = list(self._continued(llava, together))
            rows |= {row.question: row for row in continued}
            groups += group_continuations(continued, pictures, pictures.sizes, self.config) if continued else []
        with self._progress(len(rows), "continuation") as progress:
            for phase, loaded in self._loaded_phases(batching.plan(llava.engine, params, groups, 0), asked):
                for ended in batching.score(llava.engine, params, phase, loaded, lambda key: rows[key].start):
                    progress.update(len(ended))
                    yield {key: _likelihood(rows[key], found) for key, found in ended}

    def _continued(self, llava: Llava, together: Mapping[str, Asked]) -> Iterator[Continued]:
        """Each with its continuation in the model's turn, as `llava` has it: to the end of that turn."""
        for key, one in together.items():
            assert one.continuation is not None
            said = one.conversation.replace_last(one.conversation.roles[1], one.continuation)
            try:
                prompt, whole = (llava.prompt_ids(text, one.pictures.sizes) for text in (one.conversation, said))
                if not 2 <= len(prompt) < len(whole):
                    raise ValueError(f"its continuation {one.continuation!r:.60} has no tokens of its own")
            except ValueError as error:
                self._refused.append(Refused(one.name, str(error)))
            else:
                yield Continued(key, np.asarray(whole, np.int64), len(prompt))

    # ---- the model, and pictures for it

    def _load(self) -> tuple[Llava, Any]:
        if self._loaded is None:
            options = self.options
            self._loaded = llava_jax.load(
                options.pretrained,
                options.dtype,
                self._mesh,
                quantize=options.quantize,
                int8_prefix=options.int8_prefix,
                int8_activations=options.int8_activations,
            )
        return self._loaded

    def _loaded_phases(
        self, phases: Sequence[Phase], asked: Mapping[str, Asked]
    ) -> Iterator[tuple[Phase, Iterator[LoadedGroup]]]:
        """Each phase, and its groups with their pictures; what cannot be read costs its own requests only."""

        def lost(keys: Sequence[str], error: ValueError) -> None:
            self._refused.extend(Refused(asked[key].name, str(error)) for key in keys)

        def begin(pictures: DocumentPictures) -> Future | None:
            return pool.submit(pictures.load, self.config) if pictures.sizes else None

        with threads() as pool:
            ahead = load_ahead((group for phase in phases for group in phase.groups), begin)
            for phase in phases:
                yield phase, without_lost(islice(ahead, len(phase.groups)), lost)

    @staticmethod
    def _progress(count: int, unit: str) -> tqdm:
        return tqdm(total=count, unit=unit, disable=not multihost.is_primary(), dynamic_ncols=True)


def share_of_process(asked: Mapping[str, Asked]) -> dict[str, Asked]:
    """This process's part. Pictures are dealt out in an order on which all agree, though one may have read fewer."""
    pictures = {key: "".join(one.pictures.digests) or key for key, one in asked.items()}
    lists = multihost.allgather_bytes(json.dumps([*set(pictures.values())]).encode())
    dealt = sorted({each for seen in lists for each in json.loads(seen)})
    mine = set(dealt[jax.process_index() :: jax.process_count()])
    return {key: one for key, one in asked.items() if pictures[key] in mine}


def _by_pictures(asked: Mapping[str, Asked]) -> list[dict[str, Asked]]:
    """Those on the same pictures together; of those without any, a few together."""
    return list(map(dict, by_pictures(asked.items(), lambda pair: pair[1].pictures.digests or None)))


def _with_seed(asked: Asked, before: int) -> Asked:
    """The same, asked so many times before: what is drawn is drawn with another seed."""
    how = asked.options
    if how is None or not isinstance(how.sampling, Sample):
        return asked
    seed = np.uint32((int(how.sampling.seed) + before) % 2**32)
    return replace(asked, options=replace(how, sampling=replace(how.sampling, seed=seed)))


def _likelihood(row: Continued, found: Scored) -> Likelihood:
    return Likelihood(-found.logprob / (len(row.ids) - row.start), found.greedy)
