"""A request's body → what the engine is asked: read, checked, its pictures opened, its prompts cut into tokens.

All of it blocks, so it runs in threads, away from the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_jax.errors import reason_of
from llava_jax.inference.requests import RowOptions, SplitPrompt
from llava_jax.inputs.image import process_image
from llava_jax.inputs.types import ProcessedImage
from llava_jax.serve.decoding import row_options
from llava_jax.serve.prompts import (
    Choices,
    Limits,
    Picture,
    Placed,
    answer_ids,
    chat_prompt,
    choices_after,
    read_messages,
    text_prompt,
)
from llava_jax.serve.protocol import AnyRequest, ApiError, parse_chat, parse_completion, wrong

if TYPE_CHECKING:
    from llava_jax.inference.engine_loop import EngineLoop


@dataclass(frozen=True)
class Served:
    """A model as it is served."""

    name: str
    loop: EngineLoop
    tokenizer: Any
    load_picture: Callable[[str], Image.Image]  # of a URL; its ValueError is one line that may be shown to anybody
    conv_mode: str | None = None  # None: the checkpoint's
    api_key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def limits(self) -> Limits:
        return Limits(self.loop.max_model_len, self.loop.max_question)


@dataclass(frozen=True)
class Job:
    """What the engine is asked for one request: rows to generate, or else texts to choose from."""

    positions: int  # of its prompts
    n: int  # answers to each prompt
    stop: tuple[str, ...]
    stream: bool
    tells_usage: bool
    tells_logprobs: bool
    rows: tuple[tuple[SplitPrompt, RowOptions], ...] = ()
    choices: tuple[Choices, ...] = ()
    texts: tuple[str, ...] = ()  # of the choices

    @property
    def answers(self) -> int:
        return len(self.rows) or len(self.choices)


def chat_job(served: Served, body: bytes) -> Job:
    """
    Raises:
        ApiError: what is wrong with the request.
    """
    request = parse_chat(body)
    check_model(served, request.model)
    chat, model = read_messages(request.messages), (served.loop.config, served.tokenizer)
    images = [_picture(served, picture) for picture in chat.pictures]
    placed = chat_prompt(*model, chat, images, served.limits, served.conv_mode)
    if request.choice is None:
        return _generating(served, request, [placed])
    rows = answer_ids(*model, chat.dialogue, request.choice, served.conv_mode)
    return _job(request, [placed], choices=(choices_after(placed, rows, served.limits),))


def completion_job(served: Served, body: bytes) -> Job:
    """As `chat_job`."""
    request = parse_completion(body)
    check_model(served, request.model)
    config, tokenizer, prompts = served.loop.config, served.tokenizer, request.prompts
    names = [f"prompt[{i}]" if request.several else "prompt" for i in range(len(prompts))]
    pairs = zip(prompts, names, strict=True)
    placed = [text_prompt(config, tokenizer, text, served.limits, name) for text, name in pairs]
    if request.choice is None:
        return _generating(served, request, placed)
    choices = []
    for text, prompt, name in zip(prompts, placed, names, strict=True):
        if not isinstance(text, str):
            raise wrong(name, "structured_outputs.choice needs a text, not its ids", "invalid_value")
        rows = [tokenizer.encode(text + answer) for answer in request.choice]
        choices.append(choices_after(prompt, rows, served.limits))
    return _job(request, placed, choices=tuple(choices))


def check_model(served: Served, name: str | None) -> None:
    """An error if another model is asked for."""
    if name not in (None, served.name):
        message = f"model: {name!r:.80} is not served here; GET /v1/models says what is"
        raise ApiError(message, 404, "model", "model_not_found")


def _picture(served: Served, picture: Picture) -> ProcessedImage:
    try:
        return process_image(served.load_picture(picture.url), served.loop.config)
    except ValueError as error:
        raise wrong(picture.param, reason_of(error), "invalid_image") from None


def _generating(served: Served, request: AnyRequest, placed: Sequence[Placed]) -> Job:
    rows = []
    for one in placed:
        room = served.loop.max_model_len - one.positions
        rows += [(one.prompt, options) for options in row_options(request, served.loop.config.generation, room)]
    return _job(request, placed, rows=tuple(rows))


def _job(
    request: AnyRequest,
    placed: Sequence[Placed],
    rows: tuple[tuple[SplitPrompt, RowOptions], ...] = (),
    choices: tuple[Choices, ...] = (),
) -> Job:
    return Job(
        positions=sum(one.positions for one in placed),
        n=request.n,
        stop=request.stop_texts,
        stream=request.stream,
        tells_usage=request.tells_usage,
        tells_logprobs=request.most_likely is not None,
        rows=rows,
        choices=choices,
        texts=tuple(request.choice or ()),
    )
