"""Which prompt template a published checkpoint is asked with, decided once, when it is converted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llava_jax.errors import reason_of
from llava_jax.inputs.conversation import (
    check_conv_mode,
    conv_templates,
    infer_conv_mode,
    named_conv_mode,
    published_conv_mode,
)
from llava_jax.records import read_file, read_json_object

# Which of several templates that are written alike is meant; those of the checkpoints that there are come first.
RECOGNISED = (
    "llava_v1",
    "llava_v1_hf",
    "vicuna_v1",
    "mistral_instruct",
    "chatml_direct",
    "mpt",
    "llava_llama_3",
    "llava_llama_2",
    "llama_2",
    "llava_v0",
)
SAMPLE_TURNS = (("What is this?",), ("What is this?", "A cat.", "And that?"))
# Written at the beginning or at the end of turns, by some templates and not by others that mean the same.
UNWRITTEN = ("<s>", "</s>", "<\\s>", "<|begin_of_text|>")


@dataclass(frozen=True)
class Choice:
    """A template's name in `conv_templates`, and why."""

    conv_mode: str
    reason: str
    doubt: str | None = None  # what makes it a guess


def choose_template(directory: Path, name: str, asked: str | None = None) -> Choice:
    """The template that is asked for; or that of a published checkpoint's model card; or the one that writes what the
    directory's `chat_template` writes; or the one that the name picks, as in the original.

    Args:
        directory: the published checkpoint's.
        name: its name, from `checkpoint_name`.

    Raises:
        ValueError: there is no template of the name that is asked for.
    """
    if asked is not None:
        check_conv_mode(asked)
        return Choice(asked, "as asked")
    if card := published_conv_mode(name):
        return Choice(card, f"as the model card of {name} has it")
    by_name, doubt = named_conv_mode(name), None
    try:
        found = read_chat_template(directory)
        if found:
            file, chat_template = found
            return recognised(chat_template, file, by_name)
    except ValueError as error:
        doubt = str(error)
    if by_name is not None:
        return Choice(by_name, f"by the name {name}", doubt and f"{doubt}, so the name decides")
    why = f"nothing in the name {name!r} picks a template" if doubt is None else f"{doubt}, nor does the name {name!r}"
    return Choice(infer_conv_mode(name), "the original's for a name that it does not know", why)


def read_chat_template(directory: Path) -> tuple[str, str] | None:
    """(file's name, jinja template) of the first file that has one, in transformers' order; None without any.

    Raises:
        ValueError: a file is no JSON object.
    """
    if (directory / "chat_template.jinja").is_file():
        return "chat_template.jinja", read_file(directory / "chat_template.jinja").decode(errors="replace")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not (directory / file).is_file():
            continue
        value = read_json_object(directory / file).get("chat_template")
        if isinstance(value, list):  # several with names
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default")
        if isinstance(value, str) and value:
            return file, value
    return None


def recognised(chat_template: str, file: str, by_name: str | None) -> Choice:
    """The template that writes what a jinja template writes, white space and ends of sequences apart.

    Args:
        by_name: what the checkpoint's name picks.

    Raises:
        ValueError: it cannot be rendered, or is none of ours.
    """
    theirs = [_plain(_rendered(chat_template, turns, file)) for turns in SAMPLE_TURNS]
    modes = (*((by_name,) if by_name else ()), *RECOGNISED)
    exact = [mode for mode in modes if [_plain(text) for text in _ours(mode)] == theirs]
    ends = {mode: map(_plain, _ours(mode, without_system=True)) for mode in modes}
    alike = [mode for mode, ours in ends.items() if all(map(str.endswith, theirs, ours))]
    if not exact and not alike:
        raise ValueError(f"its {file} is written like none of the templates here")
    mode, doubt = (exact or alike)[0], None
    if not exact:
        doubt = f"its {file} is written like {mode}, but without the system prompt of that"
    elif by_name not in (None, mode):
        doubt = f"its {file} is written like {mode}, and its name suggests {by_name}"
    return Choice(mode, f"recognised by its {file}", doubt)


def _ours(mode: str, without_system: bool = False) -> Iterator[str]:
    """What one of our templates writes for SAMPLE_TURNS."""
    template = conv_templates[mode]
    if without_system:
        template = replace(template, system="", messages=())
    before = template.get_prompt() if without_system else ""
    for turns in SAMPLE_TURNS:
        conversation = template
        for i, text in enumerate((f"<image>\n{turns[0]}", *turns[1:], None)):
            conversation = conversation.append_message(template.roles[i % 2], text)
        yield conversation.get_prompt().removeprefix(before)


def _rendered(chat_template: str, turns: tuple[str, ...], file: str) -> str:
    """What a jinja template writes for them: llava-hf's take a list of parts, a language model's a text."""
    from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

    contents: list[list] = [[], []]
    for i, text in enumerate(turns):
        picture = [{"type": "image"}] if i == 0 else []
        role = ("user", "assistant")[i % 2]
        contents[0].append({"role": role, "content": [*picture, {"type": "text", "text": text}]})
        contents[1].append({"role": role, "content": "<image>\n" * len(picture) + text})
    reason = "it leaves out what is said"
    for messages in contents:
        try:
            rendered = render_jinja_template(
                [messages], chat_template=chat_template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
            )
        except Exception as error:  # whatever a program from elsewhere does
            reason = f"{reason_of(error):.100}"
            continue
        text = rendered[0][0]
        if all(said in text for said in turns) and "'type'" not in text:  # a list that was written as it is
            return text
    raise ValueError(f"its {file} cannot be rendered ({reason})")


def _plain(text: str) -> str:
    for token in UNWRITTEN:
        text = text.replace(token, "")
    return "".join(text.split())
