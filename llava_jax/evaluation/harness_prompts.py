"""What a harness asks → what LLaVA-1.5 and 1.6 are asked, to the letter of lmms-eval's own `llava` model.

Source: `lmms_eval/models/simple/llava.py`. It knows nothing of chat messages; these say the same where a task has both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IMAGE_TOKEN
from llava_jax.inference.generation_options import GenerationOptions, generation_options
from llava_jax.inputs.conversation import pick_conv_mode, published_conv_mode
from llava_jax.inputs.image import load_image
from llava_jax.inputs.numbers import whole_number

MAX_NEW_TOKENS = 1024  # of `llava`, where a task does not say
UNSAID = ["\n\n"]  # what lmms-eval makes of `until` where a task does not say: answers of one paragraph
# Its template of the published Vicuna checkpoints, as in LLaVA's scripts/v1_5/eval; their model cards have llava_v1.
VICUNA_TEMPLATE = "vicuna_v1"


class Turns(NamedTuple):
    """A prompt before it is put into the template."""

    texts: tuple[str, ...]  # the user's first and last; `<image>` where a picture goes
    pictures: tuple[Image.Image, ...] = ()  # in their order
    system: str | None = None


def conv_template(config: LlavaConfig, asked: str | None) -> str:
    """The template's name: as asked, or what lmms-eval's users give `llava` for this checkpoint."""
    if asked is None and published_conv_mode(config.name) == "llava_v1":
        return VICUNA_TEMPLATE
    return pick_conv_mode(config, asked)


# ---- turns


def from_context(context: str, visuals: Sequence[Any] | None) -> Turns:
    """A context and its pictures, which go in front unless it places them itself."""
    pictures = [_picture(visual) for visual in visuals or ()]
    return _one_turn(context, pictures)


def from_messages(messages: Sequence[Mapping], context: str | None = None) -> Turns:
    """Chat messages, whose parts are {"type": "text", "text": …} and {"type": "image", "url": a picture}.

    Where one user's message says nothing that the request's context does not say, the context is asked, as `llava`
    does: it has the task's white space, its description and its examples, and `llava` the pictures in front.

    Raises:
        ValueError: a message or a part that LLaVA cannot be given.
    """
    system = None
    if messages and messages[0].get("role") == "system":
        system, messages = _text_of(messages[0]), messages[1:]
    roles = [message.get("role") for message in messages]
    if roles != [("user", "assistant")[n % 2] for n in range(len(roles))] or len(roles) % 2 == 0:
        raise ValueError(f"messages: their roles are {roles!r:.200}; user and assistant alternate, the user's is last")
    pictures = [_picture(part.get("url")) for message in messages for part in _parts(message, "image")]
    if system is None and len(messages) == 1 and _says(context, _text_of(messages[0])):
        return _one_turn(context or "", pictures)
    if any(DEFAULT_IMAGE_TOKEN in _text_of(message) for message in messages[::2]):
        texts = [_text_of(message) for message in messages]  # which place the pictures themselves
    else:
        texts = [_interleaved(message) for message in messages]
    placed = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts[::2])
    return Turns(tuple(texts), tuple(pictures[:placed]), system)


def _one_turn(text: str, pictures: Sequence[Image.Image]) -> Turns:
    if pictures and DEFAULT_IMAGE_TOKEN not in text:
        text = f"{_placeholders(len(pictures))}\n{text}"
    # `llava` drops pictures for which the text has no place.
    return Turns((text,), tuple(pictures[: text.count(DEFAULT_IMAGE_TOKEN)]))


def _placeholders(count: int) -> str:
    return " ".join([DEFAULT_IMAGE_TOKEN] * count)


def _interleaved(message: Mapping) -> str:
    """A message's text with `<image>` where its pictures stand, those side by side on a line of their own."""
    text, shown = "", 0
    for part in _parts(message):
        if part.get("type") == "image":
            if not shown and text and not text[-1].isspace():
                text += "\n"
            shown += 1
            continue
        between = f"{_placeholders(shown)}\n" if shown else " " if text else ""
        text, shown = text + between + _said(part), 0
    return text + _placeholders(shown)


def _text_of(message: Mapping) -> str:
    return " ".join(map(_said, _parts(message, "text")))


def _parts(message: Mapping, kind: str | None = None) -> list[Mapping]:
    """Of a message, all or those of a kind."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"messages: content is {type(content).__name__}; it must be a text or a list of parts")
    shows = ("text", "image") if message.get("role") == "user" else ("text",)
    for part in parts:
        if part.get("type") not in shows:
            raise ValueError(f"messages: LLaVA takes {' and '.join(shows)} here, not {part.get('type')!r:.40}")
    return [part for part in parts if kind in (None, part["type"])]


def _said(part: Mapping) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"messages: a text part has {type(text).__name__} for its text")
    return text


def _says(context: str | None, text: str) -> bool:
    """Whether a context ends in a text, but for white space and the places of pictures."""
    words, said = (re.sub(r"<image( \d+)?>|\s", "", part or "") for part in (context, text))
    return words.endswith(said)


def _picture(visual: Any) -> Image.Image:
    """A picture in any of the forms that tasks have it in, its pixels as they are.

    Raises:
        ValueError, FileNotFoundError: it is none, or it cannot be read.
    """
    if isinstance(visual, Mapping):  # of `datasets`, not decoded
        visual = visual.get("bytes") or visual.get("path") or visual.get("url")
    if not isinstance(visual, Image.Image | np.ndarray | str | bytes):
        raise ValueError(f"LLaVA takes pictures, and this is {type(visual).__name__}")
    return visual if isinstance(visual, Image.Image) else load_image(visual, exif=False, rgb=False)


# ---- how an answer is decoded


def options_of(config: LlavaConfig, gen_kwargs: Mapping[str, Any], seed: int) -> GenerationOptions:
    """As `llava` reads a task's generation_kwargs, with `until` besides, which it ignores, where a task says one.

    Raises:
        ValueError: one of them is out of range, or asks for a beam search.
    """
    given = dict(gen_kwargs)
    if whole_number("num_beams", given.get("num_beams") or 1, 1, 1 << 20) > 1:
        raise ValueError(f"num_beams={given['num_beams']}: there is no beam search here; --gen_kwargs num_beams=1")
    until = given.get("until") or []
    until = [] if until == UNSAID else until
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    temperature, limit = given.get("temperature") or 0, given.get("max_new_tokens")
    limit = MAX_NEW_TOKENS if limit is None else limit
    if temperature == 0:  # `llava` looks at no do_sample
        return generation_options(config.generation, limit, stop=stop)
    top_p = 1.0 if given.get("top_p") is None else given["top_p"]  # None turns the checkpoint's own off in transformers
    return generation_options(config.generation, limit, temperature, top_p, given.get("top_k"), seed, stop=stop)
