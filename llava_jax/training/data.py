"""LLaVA's training data on the host: read, checked before the first step, ordered, and one sample loaded.

Sources: `LazySupervisedDataset` in `llava/train/train.py`, the samplers of `llava/train/llava_trainer.py`. Imports
neither JAX nor torch.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_jax.inputs.conversation import Conversation, SeparatorStyle, conv_templates
from llava_jax.inputs.image import load_image, process_images
from llava_jax.training.preprocess import HUMAN, ROLES, preprocess, preprocess_multimodal

NAMED = 3  # samples that an error names for each kind of problem

# ---- the data file


def load_examples(data_path: str | Path) -> list[dict]:
    """The samples of LLaVA's JSON: {"id", "image": a path or a list of paths or none, "conversations"}.

    Args:
        data_path: a JSON list, or a `.jsonl` file with one sample on each line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a list of samples.
    """
    path = Path(data_path)
    if not path.is_file():
        raise FileNotFoundError(f"data_path {str(path)!r}: no such file")
    with path.open(encoding="utf-8") as file:
        try:
            examples = (
                [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else json.load(file)
            )
        except ValueError as error:
            raise ValueError(f"data_path {str(path)!r} is not {path.suffix[1:].upper() or 'JSON'}: {error}") from error
    if not isinstance(examples, list) or not examples:
        got = "an empty one" if examples == [] else type(examples).__name__
        raise ValueError(f"data_path {str(path)!r}: expected a list of samples, got {got}")
    return examples


def images_of(example: dict) -> list[str]:
    """The paths of a sample's images: none, one, or several."""
    images = example.get("image")
    return [] if images is None else [images] if isinstance(images, str) else images


def name_of(example: dict, number: int) -> str:
    """What an error calls a sample."""
    return f"id={example.get('id')!r} (number {number})" if isinstance(example, dict) else f"number {number}"


# ---- checked before the first step


def check_examples(examples: Sequence[dict], image_folder: str | Path, template: str) -> None:
    """Nothing if every sample can be trained on with `template`, a name in `conv_templates`.

    Looked for: image files that are missing (each directory is listed once), images and `<image>` that do not match
    in number, an `<image>` at either end of a turn where there is no image (elsewhere it is text, as in the
    reference), unknown roles, roles out of turn, samples without a word, a plain sample that is not `<image>` and a
    caption, and what is not a sample at all.

    Raises:
        FileNotFoundError: there are images, but no such `image_folder`.
        ValueError: all problems, counted by kind, with the first samples of each; or no training with this template.
    """
    conv = conv_templates[template]
    if conv.sep_style is SeparatorStyle.LLAMA_3:
        raise ValueError(
            f"template {template!r}: LLaVA does not train with the LLAMA_3 style; choose another --version"
        )
    found: dict[str, list[str]] = defaultdict(list)
    paths: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        if not _is_example(example):
            found["not {id, image, conversations: [{from, value}, …]}"].append(name_of(example, number))
            continue
        for problem in _problems(example, conv):
            found[problem].append(name_of(example, number))
        for path in images_of(example):
            paths[path].append(number)
    for path in _missing_files(paths, os.fspath(image_folder)):
        found["missing image file"] += [f"{name_of(examples[i], i)} {path!r}" for i in paths[path]]
    if found:
        lines = [
            f"  {kind}: {len(names):,}: {', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)}"
            for kind, names in found.items()
        ]
        raise ValueError(
            f"the data has samples that cannot be trained on, out of {len(examples):,} (image_folder "
            f"{os.fspath(image_folder)!r}); correct them or take them out:\n" + "\n".join(lines)
        )


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
    if not any(text.strip() for text in texts):
        yield "empty conversation"
    elif unknown := sorted(set(roles).difference(ROLES)):
        yield f"unknown role {unknown[0]!r} (known: {', '.join(ROLES)})"
    elif template.sep_style is SeparatorStyle.PLAIN:
        if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in texts[0] or not num_images:
            yield f"not an image and two turns, the first with {DEFAULT_IMAGE_TOKEN}, as a plain template takes them"
            return
        texts[0] = DEFAULT_IMAGE_TOKEN
    elif template.sep_style is not SeparatorStyle.SINGLE:
        first = int(roles[0] != HUMAN)  # such a turn is left out
        if any(role != ROLES[i % 2] for i, role in enumerate(roles[first:])):
            yield f"{' and '.join(ROLES)} do not alternate"
        elif template.sep_style is SeparatorStyle.LLAMA_2 and "" in texts[first : first + 1]:
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


def _missing_files(paths, image_folder: str) -> list[str]:
    """Those of the paths that are not there, in their order."""
    if paths and image_folder and not os.path.isdir(image_folder):
        raise FileNotFoundError(f"image_folder {image_folder!r}: no such directory")
    listed: dict[str, set[str]] = {}

    def is_there(path: str) -> bool:
        directory, name = os.path.split(path)
        if directory not in listed:
            try:
                listed[directory] = set(os.listdir(os.path.join(image_folder, directory) or "."))
            except (FileNotFoundError, NotADirectoryError):
                listed[directory] = set()
        return name in listed[directory]

    return [path for path in paths if not is_there(path)]


# ---- the order of the samples


def modality_lengths(examples: Sequence[dict]) -> list[int]:
    """Words of each sample, negative for those without an image (LazySupervisedDataset.modality_lengths)."""
    words = [sum(len(turn["value"].split()) for turn in example["conversations"]) for example in examples]
    return [n if images_of(example) else -n for example, n in zip(examples, words, strict=True)]


def split_to_even_chunks(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """The indices in chunks of equal count and roughly equal length: each goes to the shortest chunk that has room.

    Where they do not divide evenly, they are dealt out in turn (llava_trainer, same name).
    """
    if len(indices) % num_chunks:
        return [indices[i::num_chunks] for i in range(num_chunks)]
    room = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    filled: list[float] = [0] * num_chunks
    for index in indices:
        shortest = filled.index(min(filled))
        chunks[shortest].append(index)
        filled[shortest] = float("inf") if len(chunks[shortest]) == room else filled[shortest] + lengths[index]
    return chunks


def get_length_grouped_indices(lengths: Sequence[int], batch_size: int, world_size: int, rng) -> list[int]:
    """A shuffled order whose batches of `world_size * batch_size` each go from long to short, evenly over the devices.

    Args:
        rng: a NumPy Generator; it draws one permutation (llava_trainer, same name).
    """
    indices, size = rng.permutation(len(lengths)).tolist(), world_size * batch_size
    out = []
    for start in range(0, len(indices), size):
        batch = sorted(indices[start : start + size], key=lengths.__getitem__, reverse=True)
        out += [i for chunk in split_to_even_chunks(batch, lengths, world_size) for i in chunk]
    return out


def get_modality_length_grouped_indices(lengths: Sequence[int], batch_size: int, world_size: int, rng) -> list[int]:
    """The same, with images and text-only samples in batches of their own; what is left of both comes last.

    Args:
        lengths: from `modality_lengths`.
        rng: a NumPy Generator; it draws three permutations: with images, without, the batches (llava_trainer, same
            name), or one where there is a single modality.

    Raises:
        ValueError: a sample has no words.
    """
    if 0 in lengths:
        raise ValueError(f"lengths: sample number {list(lengths).index(0)} has no words; take it out")
    with_image = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_image or not text_only:
        return get_length_grouped_indices(lengths, batch_size, world_size, rng)

    def batches(samples: list[int]) -> list[list[int]]:
        order = get_length_grouped_indices([abs(lengths[i]) for i in samples], batch_size, world_size, rng)
        size = world_size * batch_size
        return [[samples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]

    *full_with_image, last_with_image = batches(with_image)
    *full_text_only, last_text_only = batches(text_only)
    full = full_with_image + full_text_only
    shuffled = [full[i] for i in rng.permutation(len(full))]
    return [i for batch in [*shuffled, sorted(last_with_image + last_text_only)] for i in batch]


def sample_order(
    num_examples: int,
    *,
    seed: int,
    epoch: int,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
    world_size: int = 1,
) -> list[int]:
    """The order of one epoch, from (seed, epoch) alone, so that a resumed run goes on as it would have.

    Args:
        lengths: from `modality_lengths`, to group by them (`--group_by_modality_length`); None is a plain shuffle.
        batch_size: of one device; world_size: devices times gradient accumulation. For grouping only.
    """
    rng = np.random.default_rng((seed, epoch))
    if lengths is None:
        return rng.permutation(num_examples).tolist()
    return get_modality_length_grouped_indices(lengths, batch_size, world_size, rng)


# ---- one sample


class Loaded(NamedTuple):
    """One sample, ready to be packed: `tiles` and `sizes` have an entry for each image."""

    ids: np.ndarray  # int64 [L], -200 where an image goes
    labels: np.ndarray  # int64 [L], -100 where there is none
    tiles: list[np.ndarray]  # uint8 [T, S, S, 3]
    sizes: list[tuple[int, int]]  # (width, height)
    mismatch: tuple[int, int] | None  # see preprocess.Tokenized


def load_example(example: dict, image_folder: str | Path, config: LlavaConfig, tokenizer, template: str) -> Loaded:
    """A sample's ids, labels and tiles (LazySupervisedDataset.__getitem__; EXIF orientation is ignored, as there).

    Args:
        config: `image_aspect_ratio`, `mm_use_im_start_end`, and `tokenizer_model_max_length` for a text-only sample.
        tokenizer: from `training_tokenizer`.
        template: a name in `conv_templates`.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an image is damaged, the `<image>` are not as many, or the conversation is not one.
    """
    paths = [os.path.join(image_folder, path) for path in images_of(example)]
    images = [load_image(path, exif=False) for path in paths]
    turns, conv, wrap = example["conversations"], conv_templates[template], config.mm_use_im_start_end
    if images:
        turns = preprocess_multimodal(turns, conv, mm_use_im_start_end=wrap, num_images=len(images))
    max_length = config.tokenizer_model_max_length
    text = preprocess(turns, tokenizer, conv, has_image=bool(images), max_length=max_length)
    placed = int(np.sum(text.ids == IMAGE_TOKEN_INDEX))
    if placed != len(images):
        raise ValueError(f"{placed} {DEFAULT_IMAGE_TOKEN} for {len(images)} images")
    sizes = [image.size for image in images]
    return Loaded(text.ids, text.labels, process_images(images, config), sizes, text.mismatch)
