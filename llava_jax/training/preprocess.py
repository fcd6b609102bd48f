"""One conversation of LLaVA's training data → token ids and labels, as `llava/train/train.py` makes them.

Quirks included: the checkpoints were trained with them. Imports neither JAX nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llava_jax.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_jax.inputs.conversation import Conversation, SeparatorStyle
from llava_jax.inputs.tokenizer import LlamaTokenizer, tokenizer_image_token

HUMAN, GPT = ROLES = ("human", "gpt")  # the values of "from"


class Tokenized(NamedTuple):
    """A conversation as the decoder sees it.

    `mismatch` is (length by the rounds, length of the ids) where the two disagree: the reference prints "tokenization
    mismatch" and all the labels are -100.
    """

    ids: np.ndarray  # int64 [L], -200 where an image goes
    labels: np.ndarray  # int64 [L], -100 where there is none
    mismatch: tuple[int, int] | None = None


def training_tokenizer(tokenizer: LlamaTokenizer) -> LlamaTokenizer:
    """The tokenizer as the reference's `train` sets it up: the slow one, with the unknown token as padding.

    Raises:
        ValueError: it is another kind of tokenizer, such as Llama 3's.
    """
    if not isinstance(tokenizer, LlamaTokenizer):
        raise ValueError(
            f"tokenizer: LLaVA trains with tokenizer.model (SentencePiece), not {type(tokenizer).__name__}"
        )
    special = tokenizer.special_tokens
    return replace(tokenizer, fast=False, special_tokens={**special, "pad_token": special["unk_token"]})


def preprocess_multimodal(
    conversations: Sequence[dict],
    conversation_template: Conversation,
    *,
    mm_use_im_start_end: bool = False,
    num_images: int = 1,
) -> list[dict]:
    """The turns of a sample that has images, `<image>` and a line break put in front (reference: same name).

    A turn with several `<image>` keeps one, as in the reference, whose samples have one image; if the sample has
    several images (`num_images`), such a turn stays as it is written.
    """
    token = DEFAULT_IMAGE_TOKEN
    if "mmtag" in conversation_template.version:
        token = f"<Image>{token}</Image>"
    if mm_use_im_start_end:
        token = token.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)

    def placed(text: str) -> str:
        count = text.count(DEFAULT_IMAGE_TOKEN)
        if count and (count == 1 or num_images == 1):
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        return text.replace(DEFAULT_IMAGE_TOKEN, token)

    return [{**turn, "value": placed(turn["value"])} for turn in conversations]


def preprocess(
    conversations: Sequence[dict],
    tokenizer: LlamaTokenizer,
    conversation_template: Conversation,
    *,
    has_image: bool,
    max_length: int | None,
) -> Tokenized:
    """Ids and labels of one sample, by the template's kind (reference: `preprocess`).

    Args:
        conversations: the sample's turns, {"from": "human" or "gpt", "value": text}; of one with images, what
            `preprocess_multimodal` gave.
        tokenizer: from `training_tokenizer`.
        has_image: without, `<image>` is text, and the ids are cut off at `max_length`; with, they are not, as the
            reference cuts later.
        max_length: the reference's `model_max_length`; None is no limit.

    Raises:
        ValueError: no turns, an unknown role, roles out of turn, an empty first turn (LLAMA_2), a plain sample that
            is not `<image>` and a caption, or a template that the reference cannot train with.
    """
    template = conversation_template
    if not conversations:
        raise ValueError("conversations: it is empty")
    if template.sep_style is SeparatorStyle.PLAIN:
        return preprocess_plain(conversations, tokenizer, template)
    if template.sep_style is SeparatorStyle.LLAMA_2:
        return preprocess_llama_2(conversations, tokenizer, template, has_image, max_length)
    if template.version.startswith("v1"):
        return preprocess_v1(conversations, tokenizer, template, has_image, max_length)
    if template.version == "mpt":
        return preprocess_mpt(conversations, tokenizer, template, has_image, max_length)
    if template.sep_style is SeparatorStyle.SINGLE:
        return _preprocess_v0(conversations, tokenizer, template, has_image, max_length)
    raise ValueError(f"conversation template: LLaVA does not train with the {template.sep_style.name} style")


# ---- one for each kind of template


def preprocess_plain(conversations, tokenizer, template: Conversation) -> Tokenized:
    """`<image>` and its caption, which alone has labels; what else the first turn says is dropped.

    Raises:
        ValueError: not two turns, or no `<image>` in the first.
    """
    if len(conversations) != 2 or DEFAULT_IMAGE_TOKEN not in conversations[0]["value"]:
        raise ValueError(
            f"conversations: a plain template takes two turns, the first with {DEFAULT_IMAGE_TOKEN}; "
            f"got {len(conversations)}, the first {conversations[0]['value']!r}"
        )
    ids = _token_ids(DEFAULT_IMAGE_TOKEN + conversations[1]["value"] + template.sep, tokenizer, True, None)
    labels = ids.copy()
    labels[: len(_token_ids(DEFAULT_IMAGE_TOKEN, tokenizer, True, None))] = IGNORE_INDEX
    return Tokenized(ids, labels)


def preprocess_llama_2(conversations, tokenizer, template: Conversation, has_image, max_length) -> Tokenized:
    """LLAMA_2 style: llava_llama_2, mistral_instruct."""
    return _label_rounds(rounds_of(conversations, template), tokenizer, has_image, max_length, bos=1, correction=0)


def preprocess_v1(conversations, tokenizer, template: Conversation, has_image, max_length) -> Tokenized:
    """TWO style: vicuna_v1, llava_v1, v1_mmtag."""
    # A round alone starts with a dummy prefix that it has not after `</s>`, unless the tokenizer is a legacy one.
    correction = 0 if tokenizer.legacy else -1
    rounds = rounds_of(conversations, template)
    return _label_rounds(rounds, tokenizer, has_image, max_length, bos=1, correction=correction)


def preprocess_mpt(conversations, tokenizer, template: Conversation, has_image, max_length) -> Tokenized:
    """MPT style: mpt, chatml_direct. Made for a tokenizer without BOS."""
    correction = 1 if tokenizer.legacy else 0
    rounds = rounds_of(conversations, template)
    return _label_rounds(rounds, tokenizer, has_image, max_length, bos=0, correction=correction)


def _preprocess_v0(conversations, tokenizer, template: Conversation, has_image, max_length) -> Tokenized:
    """SINGLE style, "### Human: …", which the reference writes by itself: its lengths count a BOS for each turn."""
    header = f"{template.system}\n\n"
    turns = _add_speaker_and_signal(conversations, template)
    ids = _token_ids(header + "".join(turns) + "### ", tokenizer, has_image, max_length)
    labels = ids.copy()
    parts = [_token_ids(text, tokenizer, has_image, max_length) for text in (header, *turns)]
    lengths = [len(part) if has_image else _without_padding(part, tokenizer) for part in parts]
    position = lengths[0]
    labels[:position] = IGNORE_INDEX
    for turn, length in zip(conversations, lengths[1:], strict=True):
        if turn["from"] == HUMAN:
            labels[position + 2 : position + length] = IGNORE_INDEX
        position += length
    return Tokenized(ids, labels)


# ---- what they share


@dataclass(frozen=True)
class Rounds:
    """A conversation in a template's words, and how the reference finds the answers in it."""

    prompt: str
    texts: list[str]  # of each round: a question and its answer; "" is what follows the last separator
    sep: str  # stands between the two

    @property
    def broken(self) -> bool:
        """Whether a round is no question and answer, so that the labels end there and the lengths do not match."""
        texts = self.texts if self.texts[-1] else self.texts[:-1]
        return any(text.count(self.sep) != 1 for text in texts)


def rounds_of(conversations, template: Conversation) -> Rounds:
    """The rounds of a sample, by the template's separators alone; a text that contains one is cut there too.

    Args:
        template: of the TWO, MPT or LLAMA_2 style.
    """
    prompt = _prompt(conversations, template)
    if template.sep_style is SeparatorStyle.LLAMA_2:
        return Rounds(prompt, prompt.split(template.sep2), "[/INST] ")
    if template.sep_style is SeparatorStyle.TWO:
        return Rounds(prompt, prompt.split(template.sep2), f"{template.sep}{template.roles[1]}: ")
    sep, turns = template.sep, prompt.split(template.sep)
    texts = [sep.join(turns[:3])]  # the system prompt is in the first round
    texts += [sep.join(turns[i : i + 2]) for i in range(3, len(turns), 2)]
    return Rounds(prompt, texts, sep + template.roles[1])


def _add_speaker_and_signal(conversations, template: Conversation) -> list[str]:
    """The turns as "### Human: …", each ended by a line break; a role that nobody knows is "unknown"."""
    roles = dict(zip(ROLES, template.roles, strict=True))
    return [f"### {roles.get(turn['from'].lower(), 'unknown')}: {turn['value']}\n" for turn in conversations]


def asked_turns(conversations: Sequence[dict]) -> Sequence[dict]:
    """The turns without the first, if that is not the user's: all styles but SINGLE and PLAIN leave it out."""
    return conversations[int(conversations[0]["from"] != HUMAN) :]


def _prompt(conversations, template: Conversation) -> str:
    """The conversation in the template's words, without the first turn if that is not the user's."""
    roles = dict(zip(ROLES, template.roles, strict=True))
    unknown = [turn["from"] for turn in conversations if turn["from"] not in roles]
    if unknown:
        raise ValueError(f"conversations: unknown role {unknown[0]!r}; known: {', '.join(ROLES)}")
    turns = asked_turns(conversations)
    if any(turn["from"] != ROLES[i % 2] for i, turn in enumerate(turns)):
        raise ValueError(f"conversations: {HUMAN} and {GPT} do not alternate: {[turn['from'] for turn in turns]}")
    messages = tuple((roles[turn["from"]], turn["value"]) for turn in turns)
    return replace(template, messages=messages).get_prompt()


def _token_ids(prompt: str, tokenizer, has_image: bool, max_length: int | None) -> np.ndarray:
    ids = tokenizer_image_token(prompt, tokenizer) if has_image else tokenizer.encode(prompt)[:max_length]
    return np.array(ids, np.int64)


def _without_padding(ids: np.ndarray, tokenizer) -> int:
    return int(np.sum(ids != tokenizer.pad_token_id))


def _label_rounds(rounds: Rounds, tokenizer, has_image, max_length, *, bos: int, correction: int) -> Tokenized:
    """Labels on what follows `sep` in each round.

    Each round and its part up to `sep` are tokenized alone to learn their lengths; `bos` is how many ids stand before
    the first round, `correction` what a later round has more in the prompt than alone. A round that has no `sep`, or
    two, ends the labels.
    """
    ids = _token_ids(rounds.prompt, tokenizer, has_image, max_length)
    labels = ids.copy()
    labels[:bos] = IGNORE_INDEX
    position = bos
    for i, text in enumerate(rounds.texts):
        instruction, *answer = text.split(rounds.sep)
        if len(answer) != 1:
            break
        more = correction if i else 0
        length = len(_token_ids(text, tokenizer, has_image, None)) + more
        instruction_length = len(_token_ids(instruction + rounds.sep, tokenizer, has_image, None)) - 1 - bos + more
        labels[position : position + instruction_length] = IGNORE_INDEX
        position += length
    labels[position:] = IGNORE_INDEX
    total = _without_padding(ids, tokenizer)
    if position == total or (max_length is not None and position >= max_length):
        return Tokenized(ids, labels)
    return Tokenized(ids, np.full_like(labels, IGNORE_INDEX), (position, total))
