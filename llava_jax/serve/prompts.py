"""Messages → the checkpoint's prompt, in the engine's two parts: a prefix that others may share, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.inference.requests import SplitPrompt
from llava_jax.inference.serving import shared_length
from llava_jax.inputs.batch import merged_length
from llava_jax.inputs.groups import common_length
from llava_jax.inputs.prompt import ROLES, Dialogue, Turn, dialogue_head_ids, dialogue_ids
from llava_jax.inputs.types import ProcessedImage
from llava_jax.serve.protocol import MOST_PICTURES, ApiError, Message, Part, check_whole, wrong

SYSTEM_ROLES = ("system", "developer")
MOST_CHARACTERS = 64  # of one token: a text of more characters for each position cannot fit


@dataclass(frozen=True)
class Picture:
    """A picture that a message shows, and where it stands in the request."""

    url: str
    param: str


@dataclass(frozen=True)
class Chat:
    """What the messages of a request say and show."""

    dialogue: Dialogue
    pictures: tuple[Picture, ...] = ()  # in the order of the turns


@dataclass(frozen=True)
class Limits:
    """What a prompt may take of the engine."""

    max_model_len: int  # positions of prompt and answer together
    max_question: int  # ids after the prefix


@dataclass(frozen=True)
class Placed:
    """A prompt, and the positions that it takes, those of its images among them."""

    prompt: SplitPrompt
    positions: int


# ---- messages → turns


def read_messages(messages: Sequence[Message]) -> Chat:
    """The turns of a chat; pictures go to the front of their turn, as the checkpoints were trained.

    Raises:
        ApiError: a role out of turn, a part that is neither text nor picture, or half a character.
    """
    first = 1 if messages[0].role in SYSTEM_ROLES else 0
    system = _read(messages[0], "messages[0]")[0] if first else None
    turns, pictures = [], []
    for i, message in enumerate(messages[first:]):
        param, due = f"messages[{i + first}]", ROLES[i % 2]
        if message.role != due:
            rule = "user and assistant take turns, the user first, and one system message may stand before them"
            raise wrong(f"{param}.role", f"{due!r} is due and not {message.role!r:.40}: {rule}", "invalid_value")
        text, shown = _read(message, param)
        turns.append(Turn(text, len(shown)))
        pictures += shown
    if len(turns) % 2 == 0:
        raise wrong("messages", "the last one must be the user's", "invalid_value")
    if len(pictures) > MOST_PICTURES:
        raise wrong("messages", f"{len(pictures)} pictures are more than {MOST_PICTURES}", "too_many_images")
    return Chat(Dialogue(tuple(turns), system), tuple(pictures))


def _read(message: Message, param: str) -> tuple[str, list[Picture]]:
    """(text, pictures)"""
    if message.tool_calls:
        raise wrong(f"{param}.tool_calls", "tools are not supported here", "unsupported_parameter")
    content, where = message.content, f"{param}.content"
    if content is None:
        raise ApiError(f"{where}: it is missing", param=where, code="missing_required_parameter")
    if isinstance(content, str):
        return check_whole(content, where), []
    texts, pictures = [], []
    for i, part in enumerate(content):
        at = f"{where}[{i}]"
        if part.type == "text":
            texts.append(check_whole(_needed(part.text, f"{at}.text"), f"{at}.text"))
        elif part.type == "image_url" and message.role == "user":
            at = f"{at}.image_url"
            pictures.append(Picture(_needed(part.image_url, at).url, f"{at}.url"))
        else:
            raise wrong(f"{at}.type", _not_taken(part, message.role), "invalid_value")
    return " ".join(texts), pictures


def _needed(value, param: str):
    if value is None:
        raise ApiError(f"{param}: it is missing", param=param, code="missing_required_parameter")
    return value


def _not_taken(part: Part, role: str) -> str:
    taken = "a user's parts are text and image_url" if role == "user" else "only a user's parts may be other than text"
    return f"{part.type!r:.40} is not taken here; {taken}"


# ---- turns → ids


def chat_prompt(
    config: LlavaConfig,
    tokenizer,
    chat: Chat,
    images: Sequence[ProcessedImage],
    limits: Limits,
    conv_mode: str | None = None,
) -> Placed:
    """The prompt of a chat; its prefix is all that stands before the words of the last turn.

    So the questions about one picture share it, and the next turn of a chat finds what was said before.

    Raises:
        ApiError: it is too long, or the template cannot be filled with it.
    """
    _check_characters([turn.text for turn in chat.dialogue.turns] + [chat.dialogue.system or ""], limits, "messages")
    try:
        ids = dialogue_ids(config, tokenizer, chat.dialogue, conv_mode)
        head = dialogue_head_ids(config, tokenizer, chat.dialogue, conv_mode)
    except ValueError as error:
        raise ApiError(f"messages: {error}", param="messages") from None
    shared = shared_length(ids, head, limits.max_question)
    return _placed(config, ids, shared, images, limits, "messages")


def text_prompt(config: LlavaConfig, tokenizer, text: str | list[int], limits: Limits, param: str = "prompt") -> Placed:
    """The prompt that a text, or its ids, is; all but the last id is its prefix.

    Raises:
        ApiError: it is empty or too long, has half a character, or no such token.
    """
    if isinstance(text, str):
        _check_characters([check_whole(text, param)], limits, param)
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    if not ids or text == "":
        raise wrong(param, "it is empty", "invalid_value")
    if max(ids) >= (rows := config.text.vocab_size):
        raise wrong(param, f"{max(ids)} is no token of this model, which has {rows}", "invalid_value")
    return _placed(config, ids, len(ids) - 1, (), limits, param)


def answer_ids(
    config: LlavaConfig, tokenizer, dialogue: Dialogue, answers: Sequence[str], conv_mode: str | None = None
) -> list[list[int]]:
    """The ids of a chat's prompt as they go on to the end of each of these answers."""
    try:
        return [dialogue_ids(config, tokenizer, dialogue, conv_mode, answer) for answer in answers]
    except ValueError as error:
        raise wrong("structured_outputs.choice", str(error), "invalid_value") from None


def _placed(
    config: LlavaConfig,
    ids: list[int],
    shared: int,
    images: Sequence[ProcessedImage],
    limits: Limits,
    param: str,
) -> Placed:
    positions = merged_length(ids, [image.size for image in images], config)
    if positions >= limits.max_model_len:
        of_images = positions - len(ids) + len(images)
        raise _too_long(f"the prompt takes {positions} positions ({of_images} of them images)", limits, param)
    return Placed(SplitPrompt(np.array(ids, np.int64), shared, images), positions)


def _check_characters(texts: Sequence[str], limits: Limits, param: str) -> None:
    """Before a long text is cut into tokens."""
    characters = sum(map(len, texts))
    if characters > MOST_CHARACTERS * limits.max_model_len:
        raise _too_long(f"the prompt has {characters} characters", limits, param)


def _too_long(what: str, limits: Limits, param: str) -> ApiError:
    most = f"the context has {limits.max_model_len} positions, at least one of them for the answer"
    return ApiError(f"{what}, and {most}; shorten it or give fewer images", param=param, code="context_length_exceeded")


# ---- answers to choose from


@dataclass(frozen=True)
class Choices:
    """A prompt, and the ids that each answer to choose from goes on with."""

    prompt: SplitPrompt
    candidates: tuple[np.ndarray, ...]
    starts: tuple[int, ...]  # how many ids of each are still the prompt's, and do not count


def choices_after(placed: Placed, rows: Sequence[Sequence[int]], limits: Limits) -> Choices:
    """`rows`: the ids of the whole prompt with each answer behind it.

    Raises:
        ApiError: an answer has no ids of its own, or is too long.
    """
    param, prompt = "structured_outputs.choice", placed.prompt
    wholes = [np.array(row, np.int64) for row in rows]
    # An answer's beginning may become one token with the prompt's end: then the prompt ends before it, for all.
    starts = [common_length([prompt.ids, whole]) for whole in wholes]
    start = min(starts)
    for i, whole in enumerate(wholes):
        if len(whole) == starts[i] or not start:
            raise wrong(f"{param}[{i}]", "it adds nothing to the prompt", "invalid_value")
        if len(whole) - start >= limits.max_question:
            tokens = f"it has {len(whole) - start} tokens, and {limits.max_question - 1} at most are possible"
            raise wrong(f"{param}[{i}]", tokens, "invalid_value")
    longest = placed.positions + max(map(len, wholes)) - len(prompt.ids)
    if longest > limits.max_model_len:
        raise _too_long(f"the prompt and the longest answer take {longest} positions", limits, param)
    shorter = SplitPrompt(prompt.ids[:start], min(prompt.shared, start - 1), prompt.images)
    return Choices(shorter, tuple(whole[start:] for whole in wholes), tuple(own - start for own in starts))
