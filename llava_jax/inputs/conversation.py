"""Prompt templates of LLaVA, one table, and the rules that pick one and place the images.

Source: `llava/conversation.py` and `llava/eval/run_llava.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER


class SeparatorStyle(Enum):
    """How the turns of a conversation are written. `LLAMA_3` is LLaVA-NeXT's, the others are LLaVA's."""

    SINGLE, TWO, MPT, PLAIN, LLAMA_2, LLAMA_3 = range(6)


Message = str | tuple | None


@dataclass(frozen=True)
class Conversation:
    """A system prompt, the two roles, the turns so far, and how they are written.

    `messages` holds (role, message) pairs. A message is a text, None for the turn that the model is to write,
    or, as in the reference, a tuple whose first element is the text: in the first turn it moves `<image>` to the front.
    """

    system: str
    roles: tuple[str, str]
    messages: tuple[tuple[str, Message], ...] = ()
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"

    def append_message(self, role: str, message: Message) -> Conversation:
        """A new conversation with one turn more; `message=None` is the turn that the model is to write."""
        return replace(self, messages=(*self.messages, (role, message)))

    def with_turns(self, texts: Iterable[str], system: str | None = None) -> Conversation:
        """A new conversation with these turns, the user's first, and the model's open at the end.

        system: in place of the template's own prompt; None keeps that.
        """
        filled = self
        if system is not None:
            start = "<|im_start|>system\n" if self.sep_style is SeparatorStyle.MPT else ""
            filled = replace(self, system=start + system)
        for i, text in enumerate([*texts, None]):
            filled = filled.append_message(self.roles[i % 2], text)
        return filled

    def replace_last(self, role: str, message: Message) -> Conversation:
        """A new conversation with the last turn replaced, say the one that the model is to write."""
        return replace(self, messages=(*self.messages[:-1], (role, message)))

    def get_prompt(self) -> str:
        """The text of the conversation, as the reference's `Conversation.get_prompt`.

        Raises:
            ValueError: the first turn is empty or not the user's (LLAMA_2), or a turn needs a `sep2` that is not set.
        """
        turns, sep = self._turns(), self.sep
        match self.sep_style:
            case SeparatorStyle.SINGLE:
                written = [f"{role}: {text}{sep}" if text else f"{role}:" for role, text in turns]
                return self.system + sep + "".join(written)
            case SeparatorStyle.TWO:
                end = self._separator
                written = [f"{role}: {text}{end(i)}" if text else f"{role}:" for i, (role, text) in enumerate(turns)]
                return (self.system and self.system + sep) + "".join(written)
            case SeparatorStyle.MPT:
                return self.system + sep + "".join(f"{role}{text}{sep}" if text else role for role, text in turns)
            case SeparatorStyle.PLAIN:
                return self.system + "".join(text + self._separator(i) for i, (_, text) in enumerate(turns) if text)
            case SeparatorStyle.LLAMA_2:
                return _write_llama_2(self, turns)
            case _:
                return _write_llama_3(self, turns)

    @property
    def stop_str(self) -> str | None:
        """The text that ends an answer, as the reference's CLI takes it. It is empty for mistral_instruct."""
        return self.sep2 if self.sep_style is SeparatorStyle.TWO else self.sep

    def _turns(self) -> list[tuple[str, str | None]]:
        """(role, text) pairs, with the image of a tuple message put where the reference puts it."""
        turns = [(role, m[0] if isinstance(m, tuple) else m) for role, m in self.messages]
        first = self.messages[0][1] if self.messages else None
        if not isinstance(first, tuple):
            return turns
        role, text = turns[0][0], first[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *turns[1:]]
        image = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
        return [(self.roles[0], image), (self.roles[1], "Received."), (role, text), *turns[1:]]

    def _separator(self, turn: int) -> str:
        """What ends turn number `turn`: `sep` after the user's, `sep2` after the model's."""
        separator = self.sep2 if turn % 2 else self.sep
        if separator is None:
            problem = f"turn {turn} ({self.sep_style.name} style) has no separator to end it"
            raise ValueError(f"conversation: {problem}; set sep2, or leave the model's turn None")
        return separator


def _write_llama_2(conv: Conversation, turns) -> str:
    if turns and (not turns[0][1] or turns[0][0] != conv.roles[0]):
        due = f"must be a non-empty message of {conv.roles[0]!r} in the LLAMA_2 style"
        raise ValueError(f"conversation: the first turn {due}, got {turns[0]!r}")
    prompt = ""
    for i, (_, text) in enumerate(turns):
        if not text:
            continue
        if i == 0 and conv.system:
            text = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n{text}"
        prompt += f" {text} {conv._separator(i)}" if i % 2 else f"{conv.sep}[INST] {text} [/INST]"
    # The tokenizer adds BOS itself. The reference's lstrip takes `sep` as a set of characters, not as a prefix.
    return prompt.lstrip(conv.sep)


def _write_llama_3(conv: Conversation, turns) -> str:
    prompt = "<|begin_of_text|>"
    for role, text in [("system", conv.system), *turns]:
        prompt += f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        if text:
            prompt += text.strip() + conv.sep
    return prompt


# ---- the templates: their wording is what the checkpoints were trained on, so it is the reference's to the letter

_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = _HUMAN.replace("human", "user")
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_EXAMPLE_DIALOGUE = (
    ("Human", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
        "are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)

_NAMES = ("USER", "ASSISTANT")
_NAMES_V0 = ("Human", "Assistant")
_CHATML_NAMES = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_CHATML: dict[str, Any] = dict(roles=_CHATML_NAMES, sep_style=SeparatorStyle.MPT, sep="<|im_end|>", version="mpt")
_V1: dict[str, Any] = dict(roles=_NAMES, sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>")
_LLAMA_2_STYLE: dict[str, Any] = dict(roles=_NAMES, sep_style=SeparatorStyle.LLAMA_2, sep2="</s>", version="llama_v2")

_LLAMA_3_STYLE: dict[str, Any] = dict(sep_style=SeparatorStyle.LLAMA_3, sep="<|eot_id|>", version="llama_v3")

_vicuna_v0 = Conversation(_HUMAN, _NAMES_V0, _EXAMPLE_DIALOGUE, offset=2)
_vicuna_v1 = Conversation(_USER, version="v1", **_V1)
_chatml_direct = Conversation("<|im_start|>system\nAnswer the questions.", **_CHATML)
_plain = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")

conv_templates: dict[str, Conversation] = {
    "default": _vicuna_v0,
    "v0": _vicuna_v0,
    "v1": _vicuna_v1,
    "vicuna_v1": _vicuna_v1,
    "llama_2": Conversation(_LLAMA_2, sep="<s>", **_LLAMA_2_STYLE),
    "mistral_instruct": Conversation("", sep="", **_LLAMA_2_STYLE),
    "chatml_direct": _chatml_direct,
    "mistral_direct": _chatml_direct,
    "plain": _plain,
    "v0_plain": _plain,
    "llava_v0": Conversation(_HUMAN, _NAMES_V0),
    "v0_mmtag": Conversation(_MMTAG, _NAMES_V0, version="v0_mmtag"),
    "llava_v1": Conversation(_HUMAN, version="v1", **_V1),
    "v1_mmtag": Conversation(_MMTAG, version="v1_mmtag", **_V1),
    "llava_llama_2": Conversation(_LANGUAGE_AND_VISION, sep="<s>", **_LLAMA_2_STYLE),
    "mpt": Conversation(_MPT, **_CHATML),
    # Not of the original LLaVA: llava_v1 without a system prompt, as llava-hf's cards of 1.5 and BakLLaVA write it.
    "llava_v1_hf": Conversation("", version="v1", **_V1),
    # Not of the original LLaVA: what LLaVA-NeXT gives llama3-llava-next-8b.
    "llava_llama_3": Conversation(_LANGUAGE_AND_VISION, ("user", "assistant"), **_LLAMA_3_STYLE),
}


# ---- which template, and where the images go

# The templates of model cards, and the checkpoints published under them: the last part of an id, in lower case.
_PUBLISHED = (
    ("llava_v1", ("llava-v1.5-7b", "llava-v1.5-13b", "llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-13b")),
    ("llava_v1", ("llava-v1.6-vicuna-7b-hf", "llava-v1.6-vicuna-13b-hf")),
    ("llava_v1_hf", ("llava-1.5-7b-hf", "llava-1.5-13b-hf", "bakllava-v1-hf")),
    ("mistral_instruct", ("llava-v1.6-mistral-7b", "llava-v1.6-mistral-7b-hf")),
    ("chatml_direct", ("llava-v1.6-34b", "llava-v1.6-34b-hf")),
    ("llava_llama_3", ("llama3-llava-next-8b", "llama3-llava-next-8b-hf")),
)

# Parts of a checkpoint's name, in the order in which they are looked for, and the template that each picks.
_MODE_BY_NAME = (
    ("llama3", "llava_llama_3"),
    ("llama-3", "llava_llama_3"),
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def published_conv_mode(model_name: str) -> str | None:
    """The template that a published checkpoint's model card uses; None for any other name."""
    return next((mode for mode, names in _PUBLISHED if model_name.lower() in names), None)


def named_conv_mode(model_name: str) -> str | None:
    """The template that a checkpoint's name picks, as in `run_llava.py`; None where nothing matches.

    Published names are looked for first, and then Llama 3, which the reference does not know.
    """
    name = model_name.lower()
    return published_conv_mode(name) or next((mode for part, mode in _MODE_BY_NAME if part in name), None)


def infer_conv_mode(model_name: str) -> str:
    """`named_conv_mode`, or `llava_v0` where nothing matches, as in `run_llava.py`."""
    return named_conv_mode(model_name) or "llava_v0"


def check_conv_mode(conv_mode: object, where: str = "") -> None:
    """ValueError if this is no template's name; `where` is the file that has it."""
    if not isinstance(conv_mode, str) or conv_mode not in conv_templates:
        at = f"{where}: " if where else ""
        raise ValueError(f"{at}conv_mode={conv_mode!r:.80} is not known; use one of {', '.join(conv_templates)}")


def pick_conv_mode(config: LlavaConfig, conv_mode: str | None = None) -> str:
    """The template's name: `conv_mode` where it is given, with a warning if the checkpoint's is another.

    The checkpoint's was chosen when it was converted; of one converted by an older llava_jax, its name says it.

    Raises:
        ValueError: nobody knows `conv_mode`.
    """
    own = config.conv_mode or infer_conv_mode(config.name)
    if conv_mode is None:
        return own
    check_conv_mode(conv_mode)
    if conv_mode != own:
        message = f"the checkpoint {config.name!r} has conv_mode={own!r}, using {conv_mode!r} as asked"
        warnings.warn(message, stacklevel=2)
    return conv_mode


def user_message(query: str, num_images: int, mm_use_im_start_end: bool = False) -> str:
    """The user's turn with one `<image>` for each image, as `run_llava.py` writes it.

    `<image-placeholder>` becomes the image token. A query with `<image>` placed by hand is kept; otherwise one
    `<image>` and a line break for each image are put in front. `mm_use_im_start_end` wraps what is put in.

    Raises:
        ValueError: the number of `<image>` is not `num_images`.
    """
    token = DEFAULT_IMAGE_TOKEN
    if mm_use_im_start_end:
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    if IMAGE_PLACEHOLDER in query:
        query = query.replace(IMAGE_PLACEHOLDER, token)
    elif DEFAULT_IMAGE_TOKEN not in query:
        query = f"{token}\n" * num_images + query
    placed = query.count(DEFAULT_IMAGE_TOKEN)
    if placed != num_images:
        raise ValueError(
            f"the query has {placed} {DEFAULT_IMAGE_TOKEN} but there are {num_images} images; "
            f"write one {DEFAULT_IMAGE_TOKEN} for each image, or none to have them put in front"
        )
    return query
