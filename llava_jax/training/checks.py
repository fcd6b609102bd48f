"""Training data, looked at before the first step: what would stop the run, and what would train on nothing.

Imports neither JAX nor torch.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IMAGE_TOKEN
from llava_jax.inputs.conversation import Conversation, SeparatorStyle, conv_templates
from llava_jax.inputs.image import image_size, image_source, load_image
from llava_jax.inputs.text import text_problem
from llava_jax.training.data import images_of, name_of, tokenized, why_unlabelled
from llava_jax.training.preprocess import ROLES, asked_turns, rounds_of

MAX_NAMED_SAMPLES = 3  # samples that are named for each kind of problem
PICTURE_THREADS, PICTURES_PER_TASK = 16, 64  # threads that open pictures, and how many one opens in a task
MAX_TOKENIZED = 2000  # samples that are tokenized before the first step; some 3 seconds
# How a whole file ends: JPEG, PNG, GIF. One that ends otherwise is decoded, to see.
FILE_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82", b";")

Found = dict[str, list[str]]  # kind of problem → the samples that have it


def check_examples(examples: Sequence[dict], image_folder: str | Path, template: str) -> dict[str, tuple[int, int]]:
    """(width, height) of each image that is named, if every sample can be trained on with `template`.

    Looked for: images that are missing, no pictures, cut off, or out of the folder (the header of each file is read,
    once; those whose end looks wrong are decoded); images and `<image>` that do not match in number, an `<image>` at
    either end of a turn where there is no image (elsewhere it is text, as in the reference), text that cannot be
    encoded, unknown roles, roles out of turn, samples without a word, a plain sample that is not `<image>` and a
    caption, and what is not a sample at all.

    Args:
        template: a name in `conv_templates`.

    Raises:
        FileNotFoundError: there are images, but no such `image_folder`.
        ValueError: all problems, counted by kind, with the first samples of each; or no training with this template.
    """
    conv = conv_templates[template]
    if conv.sep_style is SeparatorStyle.LLAMA_3:
        raise ValueError(
            f"template {template!r}: LLaVA does not train with the LLAMA_3 style; choose another --version"
        )
    found: Found = defaultdict(list)
    paths: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        if not _is_example(example):
            found["not {id, image, conversations: [{from, value}, …]}"].append(name_of(example, number))
            continue
        for problem in _problems(example, conv):
            found[problem].append(name_of(example, number))
        for path in images_of(example):
            paths[path].append(number)
    sizes: dict[str, tuple[int, int]] = {}
    for path, opened in _open_images(paths, os.fspath(image_folder)).items():
        if isinstance(opened, str):
            found[opened] += [f"{name_of(examples[i], i)} {path!r:.200}" for i in paths[path]]
        else:
            sizes[path] = opened
    if found:
        raise ValueError(
            f"the data has samples that cannot be trained on, out of {len(examples):,} (image_folder "
            f"{os.fspath(image_folder)!r}); correct them or take them out:\n{_listed(found)}"
        )
    return sizes


def _listed(found: Mapping[str, list[str]]) -> str:
    """A line for each kind, with the first samples."""
    return "\n".join(
        f"  {kind}: {len(names):,}: {', '.join(names[:MAX_NAMED_SAMPLES])}{', …' * (len(names) > MAX_NAMED_SAMPLES)}"
        for kind, names in found.items()
    )


# ---- samples


def _is_example(example) -> bool:
    if not isinstance(example, dict) or not isinstance(example.get("conversations"), list):
        return False
    turns, images = example["conversations"], images_of(example)
    return (
        all(isinstance(t, dict) and isinstance(t.get("from"), str) and isinstance(t.get("value"), str) for t in turns)
        and isinstance(images, list)
        and all(isinstance(path, str) for path in images)
    )


def _problems(example: dict, template: Conversation) -> Iterator[str]:
    turns = example["conversations"]
    roles, texts = [turn["from"] for turn in turns], [turn["value"] for turn in turns]
    num_images = len(images_of(example))
    if any(text_problem(text) for text in texts):
        yield "a text with half a character, which cannot be encoded"
    if not any(text.strip() for text in texts):
        yield "empty conversation"
    elif unknown := sorted(set(roles).difference(ROLES)):
        yield f"unknown role {unknown[0]!r:.40} (known: {', '.join(ROLES)})"
    elif template.sep_style is SeparatorStyle.PLAIN:
        if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in texts[0] or not num_images:
            yield f"not an image and two turns, the first with {DEFAULT_IMAGE_TOKEN}, as a plain template takes them"
            return
        texts[0] = DEFAULT_IMAGE_TOKEN
    elif template.sep_style is not SeparatorStyle.SINGLE:
        asked = asked_turns(turns)
        texts = [turn["value"] for turn in asked]
        if any(turn["from"] != ROLES[i % 2] for i, turn in enumerate(asked)):
            yield f"{' and '.join(ROLES)} do not alternate"
        elif template.sep_style is SeparatorStyle.LLAMA_2 and "" in texts[:1]:
            yield "the first question is empty, which the LLAMA_2 style does not take"
    yield from _problems_of_images(texts, num_images)


def _problems_of_images(texts: list[str], num_images: int) -> Iterator[str]:
    if not num_images:
        ends = (text for text in texts if DEFAULT_IMAGE_TOKEN in text)
        if any(t.startswith(DEFAULT_IMAGE_TOKEN) or t.endswith(DEFAULT_IMAGE_TOKEN) for t in map(str.strip, ends)):
            yield f"{DEFAULT_IMAGE_TOKEN} but no image"
        return
    # A turn of a sample with one image keeps one placeholder: see preprocess_multimodal.
    placed = sum(min(text.count(DEFAULT_IMAGE_TOKEN), 1 if num_images == 1 else num_images + 1) for text in texts)
    if not placed:
        yield f"an image but no {DEFAULT_IMAGE_TOKEN}"
    elif placed != num_images:
        yield f"the number of {DEFAULT_IMAGE_TOKEN} is not that of the images"


# ---- their pictures


def _open_images(paths: Mapping[str, object], image_folder: str) -> dict[str, tuple[int, int] | str]:
    """Path → the picture's (width, height), or what is wrong with it, in the order of the paths."""
    if paths and image_folder and not os.path.isdir(image_folder):
        raise FileNotFoundError(f"image_folder {image_folder!r}: no such directory")
    named = list(paths)
    out: dict[str, tuple[int, int] | str] = {}
    parts = [named[start : start + PICTURES_PER_TASK] for start in range(0, len(named), PICTURES_PER_TASK)]
    progress = tqdm(total=len(named), desc="pictures", delay=2, leave=False)
    with ThreadPoolExecutor(PICTURE_THREADS) as pool, progress:
        for part in pool.map(lambda part: {path: _size_or_problem(path, image_folder) for path in part}, parts):
            out |= part
            progress.update(len(part))
    return out


def _size_or_problem(path: str, image_folder: str) -> tuple[int, int] | str:
    try:
        source = image_source(path, image_folder)
    except ValueError:
        return "an image out of the image folder, which only an absolute path may name"
    try:
        size = image_size(source)
        if os.path.isfile(source) and not _ends_whole(source):
            load_image(source, exif=False)
        return size
    except FileNotFoundError:
        return "missing image file"
    except (OSError, ValueError):
        return "an image file that is no picture, or damaged"


def _ends_whole(path: str) -> bool:
    """Whether a picture's file has its end, as far as its last bytes tell."""
    with open(path, "rb") as file:
        head = file.read(8)
        size = file.seek(-8, os.SEEK_END) + 8
        if head.startswith(b"RIFF"):  # WebP, which says how long it is
            return int.from_bytes(head[4:], "little") + 8 <= size
        return file.read().endswith(FILE_ENDS)


# ---- samples without labels


def check_labels(
    examples: Sequence[dict],
    sizes: Mapping[str, tuple[int, int]],
    config: LlavaConfig,
    tokenizer,
    template: str,
    *,
    max_unlabelled_ratio: float,
    seed: int,
) -> None:
    """See that all samples but a few have something to learn; the few are named on stderr, by kind.

    Faults that the turns show are looked for in every sample, those that only tokens show in MAX_TOKENIZED of them, for
    tokenizing takes over a millisecond each. `Loader` counts the rest as they come.

    Args:
        examples, sizes: as `check_examples` took and gave them.
        config: as of `load_example`.
        tokenizer: from `training_tokenizer`.

    Raises:
        ValueError: the share of those without labels is over `max_unlabelled_ratio`.
    """
    conv = conv_templates[template]
    by_turns: Found = defaultdict(list)
    whole = []
    for number, example in enumerate(examples):
        if kind := _unlabelled_by_turns(example["conversations"], conv):
            by_turns[kind].append(name_of(example, number))
        else:
            whole.append(number)
    drawn = np.sort(np.random.default_rng(seed).permutation(whole)[:MAX_TOKENIZED]).tolist()
    found: Found = defaultdict(list)
    for number in drawn:
        example = examples[number]
        text = tokenized(example, config, tokenizer, template)
        if kind := why_unlabelled(text, [sizes[path] for path in images_of(example)], config):
            found[kind].append(name_of(example, number))
    by_tokens = len(whole) / max(1, len(drawn)) * sum(map(len, found.values()))
    share = (sum(map(len, by_turns.values())) + by_tokens) / len(examples)
    among = f", among {len(drawn):,} drawn" if len(drawn) < len(whole) else ""
    listed = _listed(by_turns | {kind + among: names for kind, names in found.items()})
    if share > max_unlabelled_ratio:
        raise ValueError(
            f"{share:.1%} of the samples have nothing to learn, and --max_unlabelled_ratio lets "
            f"{max_unlabelled_ratio:.1%} pass; look at --version, --model_max_length and these, or raise it:\n{listed}"
        )
    if share:
        print(f"{share:.1%} of the samples have nothing to learn:\n{listed}", file=sys.stderr)


def _unlabelled_by_turns(turns: Sequence[dict], template: Conversation) -> str | None:
    """The kind of fault for which no part of a sample is labelled, as far as its turns show it."""
    if template.sep_style in (SeparatorStyle.PLAIN, SeparatorStyle.SINGLE) or not rounds_of(turns, template).broken:
        return None
    asked = asked_turns(turns)
    if len(turns) == 1:
        return "one turn only"
    if len(asked) % 2 or not asked[-1]["value"]:
        return "no answer to the last question"
    return "a separator of the template in a text"
