"""The conversations of the page's tabs: each shows a picture, or none, and keeps its cache while it is asked often."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_jax.inputs.image import process_image
from llava_jax.inputs.types import ProcessedImage

if TYPE_CHECKING:
    from llava_jax.inference.chat import Chat
    from llava_jax.inference.llava import Llava

MAX_CACHED_CONVERSATIONS = 4  # conversations whose caches are kept, and answers that are made at the same time


@dataclass(eq=False)
class Conversation:
    """What a tab of a browser shows. `chat` holds its cache; None: to be made anew, from the picture and the turns."""

    file: str | None = None
    picture: ProcessedImage | None = None
    turns: list[str] = field(default_factory=list)  # question, answer, question, answer, …
    chat: Chat | None = None
    stopped: bool = False
    answering: threading.Lock = field(default_factory=threading.Lock)


class Conversations:
    """The conversations of all tabs. Only the MAX_CACHED_CONVERSATIONS asked last keep their caches."""

    def __init__(self, llava: Llava, params: dict, conv_mode: str | None = None):
        self.llava, self.params, self.conv_mode = llava, params, conv_mode
        self.by_tab: dict[str, Conversation] = {}  # those asked last are last
        self.answering: set[Conversation] = set()

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
        """The tab was closed: its cache is freed."""
        self.stop(tab)
        self.by_tab.pop(tab, None)

    def stop(self, tab: str) -> None:
        """End the answer at its next token; what was said of it is kept."""
        self.of(tab).stopped = True

    def close(self) -> None:
        """Stop all answers and wait for them: a process that ends while JAX works in a thread ends in a crash."""
        for conversation in list(self.answering):
            conversation.stopped = True
            conversation.answering.acquire(timeout=60)

    def answer(self, tab: str, question: str | None, **options) -> Iterator[list[str]]:
        """The turns, the last of them the answer as it comes. A question of None is the last one again, in place of its
        answer; options are as `Llava.generate` has them.

        Raises:
            ValueError: the question cannot be asked, or the answer failed; the conversation is then as it was.
        """
        conversation = self.by_tab.setdefault(tab, Conversation())
        if not conversation.answering.acquire(blocking=False):
            raise ValueError("the last question is still being answered")
        self.answering.add(conversation)
        before = list(conversation.turns)
        try:
            if question is None:
                question = before[-2] if before else ""
                del conversation.turns[-2:]
            if not question.strip():
                raise ValueError("the question is empty")
            yield from self._answer(tab, conversation, question.strip(), options)
        except Exception as error:
            conversation.turns[:] = before
            if isinstance(error, ValueError):
                raise
            conversation.chat = None  # there is no telling what its cache holds
            traceback.print_exc()
            kind = type(error).__name__
            raise ValueError(f"the answer failed: {kind}, of which the server's log says more") from None
        finally:
            self.answering.discard(conversation)
            conversation.answering.release()

    def _answer(self, tab: str, conversation: Conversation, question: str, options: dict) -> Iterator[list[str]]:
        conversation.stopped, turns, answer = False, [*conversation.turns, question], ""
        yield [*turns, answer]
        with contextlib.closing(self._chat(tab, conversation).stream(question, **options)) as pieces:
            for piece in pieces:
                answer += piece
                yield [*turns, answer]
                if conversation.stopped:
                    break

    def _chat(self, tab: str, conversation: Conversation) -> Chat:
        """The conversation's, which is now the one that was asked last."""
        if conversation.chat is None:
            conversation.chat = self.llava.chat(self.params, conversation.picture, self.conv_mode)
            conversation.chat.turns = conversation.turns  # one list: what the chat adds is said here
        chat = conversation.chat
        if self.by_tab.get(tab) is conversation:
            self.by_tab[tab] = self.by_tab.pop(tab)
        for other in list(self.by_tab.values())[:-MAX_CACHED_CONVERSATIONS]:
            other.chat = None
        return chat
