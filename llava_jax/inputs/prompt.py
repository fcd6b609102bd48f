"""What a caller asks, in any form, as token ids: a text, turns, messages with roles, or a Conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_jax.inputs.batch import check_ids, merged_length
from llava_jax.inputs.conversation import Conversation, conv_templates, pick_conv_mode, user_message
from llava_jax.inputs.text import check_text
from llava_jax.inputs.tokenizer import join_around_images

ROLES = ("user", "assistant")

# No text that has passed `check_text` holds half a surrogate pair, so these stand for something else in a prompt.
_IMAGE_IN_WORDS = "\ud800"  # `<image>` that is text
_ANSWER_ENDS = "\ud801"
_WORDS_BEGIN = "\ud802"  # of the user's last turn


@dataclass(frozen=True)
class Turns:
    """What was said, from the user's first turn to the user's last, and the system prompt if one was given."""

    texts: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class Turn:
    """What one side said, and how many pictures it showed, which go in front. `<image>` in its text is text."""

    text: str
    pictures: int = 0


@dataclass(frozen=True)
class Dialogue:
    """Turns from the user's first to the user's last, and the system prompt if one was given."""

    turns: tuple[Turn, ...]
    system: str | None = None


# ---- any form → turns


def as_prompts(questions) -> list:
    """One question or several, as a list: a text, a Conversation and messages with roles are one."""
    if isinstance(questions, str | Conversation | Mapping):
        return [questions]
    prompts = _as_list(questions, "questions", "a text, or a list of questions")
    return [prompts] if prompts and all(isinstance(prompt, Mapping) for prompt in prompts) else prompts


def as_texts(texts, what: str) -> tuple[str, ...]:
    """One text or several, as a tuple.

    Raises:
        ValueError: something else, or a text has half a character; `what` is the argument's name.
    """
    texts = [texts] if isinstance(texts, str) else _as_list(texts, what, "a text, or a list of texts")
    return tuple(check_text(text, f"{what}[{i}]") for i, text in enumerate(texts))


def as_turns(prompt, mm_use_im_start_end: bool = False) -> Turns:
    """A question, turns of user and assistant, or messages like {"role": "user", "content": …}.

    A message's content is a text, or a list of parts: {"type": "text", "text": …}, and {"type": "image"} for a picture,
    which goes in front of the texts. A first message may have the role "system".

    Raises:
        ValueError: something else, a role out of turn, or a text with half a character.
    """
    if isinstance(prompt, str | Mapping):
        prompt = [prompt]
    turns, system = _as_list(prompt, "prompt", "a text, turns, or messages with roles"), None
    if turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
        system = _content(turns.pop(0), "prompt: the system message", False, mm_use_im_start_end)
    if len(turns) % 2 == 0:
        raise ValueError(f"prompt: got {len(turns)} turns; they alternate user, assistant, …, and the user's is last")
    texts = [_text_of(turn, i, len(turns), mm_use_im_start_end) for i, turn in enumerate(turns)]
    return Turns(tuple(texts), system)


def _as_list(values, what: str, expected: str) -> list:
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{what}: expected {expected}, got {type(values).__name__}")
    return list(values)


def _text_of(turn, i: int, count: int, mm_use_im_start_end: bool) -> str:
    where, role = f"prompt: turn {i}" if count > 1 else "prompt", ROLES[i % 2]
    if not isinstance(turn, Mapping):
        return check_text(turn, where)
    if turn.get("role") != role:
        rule = "user and assistant alternate, the user's is first and last, and only a system message may stand before"
        raise ValueError(f"{where}: its role is {turn.get('role')!r:.40}, and {role!r} is due; {rule}")
    return _content(turn, where, role == "user", mm_use_im_start_end)


def _content(message: Mapping, where: str, may_show: bool, mm_use_im_start_end: bool) -> str:
    """The text of a message, with `<image>` in front for each picture among its parts."""
    content = message.get("content")
    if isinstance(content, str):
        return check_text(content, where)
    texts, pictures = [], 0
    for part in _as_list(content, f"{where}: content", "a text, or a list of parts"):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text":
            texts.append(check_text(part.get("text"), where))
        elif kind == "image" and may_show and len(part) == 1:
            pictures += 1
        else:
            parts = "{'type': 'text', 'text': …}, and {'type': 'image'} for each of the pictures"
            taken = f"a user's parts are {parts} that are given beside the prompt"
            raise ValueError(f"{where}: a part of type {kind!r:.40} is not taken here; {taken}")
    text = " ".join(texts)
    return user_message(text, pictures, mm_use_im_start_end) if pictures else text


# ---- turns → a conversation


def build_conversation(config: LlavaConfig, prompt, num_images: int = 0, conv_mode: str | None = None) -> Conversation:
    """A prompt in the checkpoint's template (`conv_mode` overrides), the model's turn open at its end.

    Args:
        prompt: as `as_turns` takes it; or a Conversation, which is returned as it is.
        num_images: where no turn places them, they go in front of the first one.

    Raises:
        ValueError: it is no prompt, the images do not fit it, or nobody knows `conv_mode`.
    """
    if isinstance(prompt, Conversation):
        return prompt
    said = as_turns(prompt, config.mm_use_im_start_end)
    later = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in said.texts[2::2])  # placed by hand
    if later > num_images:
        raise ValueError(f"prompt: {later} {DEFAULT_IMAGE_TOKEN} in later turns, but there are {num_images} images")
    first = user_message(said.texts[0], num_images - later, config.mm_use_im_start_end)
    template = conv_templates[pick_conv_mode(config, conv_mode)]
    return template.with_turns((first, *said.texts[1:]), said.system)


# ---- a conversation → ids


def prompt_ids(
    config: LlavaConfig, tokenizer, prompt, sizes, conv_mode: str | None = None, answer: str | None = None
) -> list[int]:
    """Token ids of one prompt, -200 where its images, of these (width, height), go.

    An `<image>` in what the model has said is text. (To the reference it is one more image, which there is none for.)

    Args:
        prompt, conv_mode: as `build_conversation` takes them.
        answer: what the model is to have answered: the ids then go on to its end, without the separator.

    Raises:
        ValueError: the images do not fit the prompt, it is too long for the model, or it is no text.
    """
    conversation = build_conversation(config, prompt, len(sizes), conv_mode)
    ids = _ids_of(_written(conversation, answer), tokenizer)
    placed = ids.count(IMAGE_TOKEN_INDEX)
    if placed != len(sizes):
        raise ValueError(f"prompt: {placed} {DEFAULT_IMAGE_TOKEN}, but there are {len(sizes)} images")
    length, most = merged_length(ids, sizes, config), config.context_length
    if length > most:
        bound = "max_position_embeddings" if config.tokenizer_model_max_length is None else "tokenizer_model_max_length"
        positions = f"{length} positions ({length - len(ids) + len(sizes)} of them images)"
        too_long = f"{positions} are more than this model's {bound}={most}"
        raise ValueError(f"prompt: {too_long}; shorten it or give fewer images")
    check_ids("prompt", np.array(ids, np.int64), config.text.vocab_size, IMAGE_TOKEN_INDEX)
    return ids


def dialogue_ids(
    config: LlavaConfig, tokenizer, dialogue: Dialogue, conv_mode: str | None = None, answer: str | None = None
) -> list[int]:
    """`prompt_ids` of what comes from strangers: `<image>` is text wherever they write it, and pictures are counted
    apart. How long it is nobody has checked.

    Raises:
        ValueError: a text has half a character, or the template cannot be filled with these texts.
    """
    ids = _ids_of(_answered(_spoken(config, dialogue, conv_mode), answer), tokenizer)
    check_ids("prompt", np.array(ids, np.int64), config.text.vocab_size, IMAGE_TOKEN_INDEX)
    return ids


def dialogue_head_ids(config: LlavaConfig, tokenizer, dialogue: Dialogue, conv_mode: str | None = None) -> list[int]:
    """The ids of all that stands before the words of the last turn: its pictures and the conversation so far."""
    *earlier, last = dialogue.turns
    spoken = _spoken(config, replace(dialogue, turns=(*earlier, replace(last, text=""))), conv_mode)
    role, shown = spoken.messages[-2]
    marked = replace(spoken, messages=(*spoken.messages[:-2], (role, f"{shown}{_WORDS_BEGIN}"), spoken.messages[-1]))
    # A space before the words becomes one token with them.
    return _ids_of(marked.get_prompt().partition(_WORDS_BEGIN)[0].rstrip(), tokenizer)


def _spoken(config: LlavaConfig, dialogue: Dialogue, conv_mode: str | None) -> Conversation:
    """In the checkpoint's template, with each `<image>` that is text marked."""

    def written(turn: Turn) -> str:
        shown = user_message("", turn.pictures, config.mm_use_im_start_end)
        return shown + _in_words(check_text(turn.text, "prompt"))

    system = dialogue.system
    marked = None if system is None else _in_words(check_text(system, "prompt: its system prompt"))
    return conv_templates[pick_conv_mode(config, conv_mode)].with_turns(map(written, dialogue.turns), marked)


def _ids_of(text: str, tokenizer) -> list[int]:
    chunks = [chunk.replace(_IMAGE_IN_WORDS, DEFAULT_IMAGE_TOKEN) for chunk in text.split(DEFAULT_IMAGE_TOKEN)]
    return join_around_images(chunks, tokenizer)


def _written(conversation: Conversation, answer: str | None) -> str:
    """The conversation's text, as far as the answer's end, with the model's `<image>` marked."""
    model = conversation.roles[1] if conversation.roles[0] != conversation.roles[1] else None
    messages = []
    for role, message in conversation.messages:
        text = message[0] if isinstance(message, tuple) else message
        if text is not None:
            check_text(text, "prompt")
        messages.append((role, _in_words(text) if role == model and text else message))
    check_text(conversation.system, "prompt: its system prompt")
    return _answered(replace(conversation, messages=tuple(messages)), answer)


def _answered(conversation: Conversation, answer: str | None) -> str:
    """A marked conversation's text, as far as the answer's end."""
    if not answer:
        return conversation.get_prompt()
    said = _in_words(check_text(answer, "answer")) + _ANSWER_ENDS
    role, _ = conversation.messages[-1]
    return conversation.replace_last(role, said).get_prompt().partition(_ANSWER_ENDS)[0]


def _in_words(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, _IMAGE_IN_WORDS)
