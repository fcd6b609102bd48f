"""The conversations of the page's tabs: each shows a picture, or none, and asks the engine's loop beside the others."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from llava_jax.inference.engine_loop import EngineLoop
from llava_jax.inference.generation_options import generation_options
from llava_jax.inference.llava import Llava
from llava_jax.inference.requests import QueueFull, SplitPrompt, Stopped
from llava_jax.inference.serving import AnswerStream, shared_length
from llava_jax.inference.text_requests import row_options
from llava_jax.inputs.image import process_image
from llava_jax.inputs.prompt import Dialogue, Turn, dialogue_head_ids
from llava_jax.inputs.types import ProcessedImage


@dataclass(eq=False)
class Conversation:
    """What a tab of a browser shows."""

    file: str | None = None
    picture: ProcessedImage | None = None
    turns: list[str] = field(default_factory=list)  # question, answer, question, answer, …
    answering: threading.Lock = field(default_factory=threading.Lock)
    stream: AnswerStream | None = None  # the last answer, while it is made and afterwards


class Conversations:
    """The conversations of all tabs. What was said in them the loop finds in its pool, while it is there."""

    def __init__(self, llava: Llava, loop: EngineLoop, conv_mode: str | None = None):
        self.llava, self.loop, self.conv_mode = llava, loop, conv_mode
        self.by_tab: dict[str, Conversation] = {}

    def of(self, tab: str) -> Conversation:
        """The tab's; an empty one if nothing has happened there yet."""
        return self.by_tab.get(tab) or Conversation()

    def show(self, tab: str, file: str | None) -> None:
        """A new one about a picture, or about none; an answer that is being made for the old one stops.

        Raises:
            FileNotFoundError, ValueError: no picture; the conversation is then as it was.
        """
        self._begin(tab, file, None if file is None else process_image(file, self.llava.config))

    def begin(self, tab: str) -> None:
        """A new one about the same picture."""
        before = self.of(tab)
        self._begin(tab, before.file, before.picture)

    def _begin(self, tab: str, file: str | None, picture: ProcessedImage | None) -> None:
        self.forget(tab)
        self.by_tab[tab] = Conversation(file, picture)

    def forget(self, tab: str) -> None:
        """The tab was closed."""
        self.stop(tab)
        self.by_tab.pop(tab, None)

    def stop(self, tab: str) -> None:
        """End the answer at once; what was said of it is kept."""
        if (stream := self.of(tab).stream) is not None:
            stream.close()

    def answer(self, tab: str, question: str | None, **options) -> Iterator[list[str]]:
        """The turns, the last of them the answer as it comes. A question of None is the last one again, in place of its
        answer; options are as `Llava.generate` has them.

        Raises:
            ValueError: the question cannot be asked, or the answer failed; the conversation is then as it was.
        """
        conversation = self.by_tab.setdefault(tab, Conversation())
        if not conversation.answering.acquire(blocking=False):
            raise ValueError("the last question is still being answered")
        before = list(conversation.turns)
        try:
            if question is None:
                question = before[-2] if before else ""
                del conversation.turns[-2:]
            if not question.strip():
                raise ValueError("the question is empty")
            yield from self._answer(conversation, question.strip(), options)
        except Exception as error:
            conversation.turns[:] = before
            if isinstance(error, ValueError):
                raise
            if isinstance(error, QueueFull | Stopped):
                raise ValueError(f"no answer: {error}") from None
            traceback.print_exc()
            kind = type(error).__name__
            raise ValueError(f"the answer failed: {kind}, of which the server's log says more") from None
        finally:
            conversation.answering.release()

    def _answer(self, conversation: Conversation, question: str, options: dict) -> Iterator[list[str]]:
        turns, answer = [*conversation.turns, question], ""
        conversation.stream = self._ask(conversation, turns, options)
        with contextlib.closing(conversation.stream) as pieces:
            try:
                yield [*turns, answer]
                for piece in pieces:
                    answer += piece
                    yield [*turns, answer]
            finally:  # also where nobody reads it to its end
                conversation.turns += [question, answer]

    def _ask(self, conversation: Conversation, turns: list[str], options: dict) -> AnswerStream:
        """The prefix is all that stands before the words of the last turn: the next turn begins with it too."""
        config, tokenizer = self.llava.config, self.llava.tokenizer
        asked = generation_options(config.generation, **options)
        images = [] if conversation.picture is None else [conversation.picture]
        ids = self.llava.prompt_ids(turns, [image.size for image in images], self.conv_mode)
        said = tuple(Turn(text, 0 if i else len(images)) for i, text in enumerate(turns))
        head = dialogue_head_ids(config, tokenizer, Dialogue(said), self.conv_mode)
        prompt = SplitPrompt(np.array(ids, np.int64), shared_length(ids, head, self.loop.max_question), images)
        return AnswerStream(self.loop, tokenizer, prompt, row_options(config, asked))
