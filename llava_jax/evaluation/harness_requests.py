"""Requests of an evaluation harness: documents that are read, and what is asked about them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from llava_jax.config import LlavaConfig
from llava_jax.errors import reason_of
from llava_jax.evaluation.harness_prompts import Turns
from llava_jax.evaluation.pictures import load_pictures
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inputs.conversation import Conversation
from llava_jax.inputs.types import ProcessedImage

READERS = 16  # threads that load documents and make tiles, where there are so many cores
READ_AHEAD = 32  # documents that are loaded before they are looked at


@dataclass(frozen=True, eq=False)
class HarnessRequest:
    """One thing that is asked: for an answer, decoded as `options` say, or how likely `continuation` is."""

    name: str  # what a report calls it
    document: Callable[[], Any]  # loads it, in any thread
    turns: Callable[[Any], Turns]  # of the document
    options: GenerationOptions | None = None
    continuation: Callable[[Any], str] | None = None  # of the document


@dataclass(frozen=True, eq=False)
class DocumentPictures:
    """A document's, which were looked at once and are loaded again when it is their turn."""

    name: str
    read: Callable[[], Sequence[Image.Image]]
    digests: tuple[str, ...]  # of the pixels of each
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each

    def load(self, config: LlavaConfig) -> list[ProcessedImage]:
        """
        Raises:
            ValueError: they cannot be read any more, or are others.
        """
        with _as_value_error():
            pictures = self.read()
            digests = tuple(map(_digest, pictures))
        if digests != self.digests:
            raise ValueError("its pictures are others than when it was read first; a task must give the same each time")
        return load_pictures(config, False, *pictures)


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked, before any picture is loaded."""

    name: str
    conversation: Conversation  # the model's turn open at its end
    pictures: DocumentPictures
    options: GenerationOptions | None
    continuation: str | None

    @property
    def identity(self) -> list:
        """What tells it from what is not the same, as JSON has it."""
        prompt = self.conversation.get_prompt()
        return [prompt, self.pictures.digests, repr(self.options), self.continuation]


class Refused(NamedTuple):
    """A request that cannot be asked."""

    name: str
    reason: str


def threads() -> ThreadPoolExecutor:
    """Decoders and resizing leave Python to others; processes would import the harness first, which takes long."""
    return ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))


def read_requests(requests: Sequence[HarnessRequest], template: Conversation) -> Iterator[Asked | Refused]:
    """What they ask, in their order. Documents are loaded side by side, and looked at one by one: a task that draws at
    random draws in order."""
    waiting: deque[Future] = deque()
    with threads() as pool, tqdm(requests, desc="reading", unit="request", dynamic_ncols=True) as progress:
        for n, request in enumerate(progress):
            waiting += [pool.submit(later.document) for later in requests[n + len(waiting) : n + READ_AHEAD]]
            try:
                yield _read(request, waiting.popleft(), template)
            except ValueError as error:
                yield Refused(request.name, str(error))


def _read(request: HarnessRequest, loaded: Future, template: Conversation) -> Asked:
    with _as_value_error():
        document = loaded.result()
        turns = request.turns(document)
        continuation = None if request.continuation is None else request.continuation(document)
        conversation = template.with_turns(turns.texts, turns.system)
        conversation.get_prompt()
        digests = tuple(map(_digest, turns.pictures))  # a file that was only opened is decoded here

    def read() -> Sequence[Image.Image]:
        return request.turns(request.document()).pictures

    pictures = DocumentPictures(request.name, read, digests, tuple(picture.size for picture in turns.pictures))
    return Asked(request.name, conversation, pictures, request.options, continuation)


def _digest(picture: Image.Image) -> str:
    digest = hashlib.sha256(f"{picture.mode} {picture.size} {picture.getpalette()}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    """Whatever a task's own code or a decoder raises costs its request alone."""
    try:
        yield
    except Exception as error:
        raise ValueError(reason_of(error)) from error
