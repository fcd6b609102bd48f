"""What a continuous batch is asked, and what it says back while it works. Host only; it knows no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from llava_jax.inference.sampling import Greedy, Sampling
from llava_jax.inputs.types import ProcessedImage

MOST_END_IDS = 16  # tokens that can end one answer
MOST_TOP_LOGPROBS = 20  # likeliest tokens that are told of, at each place of an answer


@dataclass(frozen=True)
class RowOptions:
    """How one answer is decoded."""

    max_new_tokens: int
    end_ids: tuple[int, ...] = ()  # tokens that end the answer, which then has them as its last; MOST_END_IDS at most
    sampling: Sampling = field(default_factory=Greedy)
    min_new_tokens: int = 0  # the answer's first so many tokens are none of `end_ids`
    top_logprobs: int | None = None  # so many of the likeliest tokens are told of; None: no log-probabilities at all


class SplitPrompt(NamedTuple):
    """A prompt in two parts: a prefix that others may share, and what is this prompt's own, at least one id."""

    ids: np.ndarray  # int64 [L], the whole prompt's, -200 where an image goes
    shared: int  # how many of `ids` are the prefix; all images are in it, and it is shorter than `ids`
    images: Sequence[ProcessedImage] = ()  # in the order of their placeholders


class Token(NamedTuple):
    """One new token."""

    id: int
    logprob: float | None = None  # before temperature and the like
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the likeliest, the first of them first


class Finish(StrEnum):
    """Why there are no more tokens."""

    STOP = "stop"  # the last one is among `end_ids`
    LENGTH = "length"  # `max_new_tokens`
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Update:
    """What is new of an answer. The last one has `finish`, and perhaps tokens; after it comes nothing."""

    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: Exception | None = None  # why, where `finish` is ERROR or CANCELLED
    cached: int = 0  # positions of the prompt that were found in the cache instead of prefilled


@dataclass(eq=False)
class Request:
    """One answer. `emit` is called in the thread that runs the batch, in order, and must return at once."""

    prompt: SplitPrompt
    options: RowOptions
    emit: Callable[[Update], None]


@dataclass(frozen=True)
class Scores:
    """The last, and only, thing said of a `ScoreRequest`."""

    logprobs: np.ndarray  # float32 [candidates]; empty with an error
    greedy: np.ndarray  # bool [candidates]: greedy decoding would choose each of its tokens that count
    error: Exception | None = None
    cached: int = 0


@dataclass(eq=False)
class ScoreRequest:
    """The log-likelihood of each candidate after a prompt, whose `shared` makes no difference here."""

    prompt: SplitPrompt
    candidates: Sequence[np.ndarray]  # int64 [length] each, at least one id: they follow `prompt.ids`
    emit: Callable[[Scores], None]
    starts: Sequence[int] = ()  # how many ids of each candidate do not count; none: all count


class QueueFull(Exception):
    """Too many requests wait already."""


class Stopped(Exception):
    """The batch takes no more requests."""
