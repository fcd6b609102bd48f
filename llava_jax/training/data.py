"""LLaVA's training data on the host: read, ordered, and one sample loaded.

Sources: `LazySupervisedDataset` in `llava/train/train.py`, the samplers of `llava/train/llava_trainer.py`. Imports
neither JAX nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_jax.inputs.batch import merged_length
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.image import image_source, load_image, process_image
from llava_jax.inputs.types import ProcessedImage
from llava_jax.records import parse_json, read_file, read_lines
from llava_jax.training.preprocess import Tokenized, preprocess, preprocess_multimodal

# ---- the data file


def load_examples(data_path: str | Path) -> list[dict]:
    """The samples of LLaVA's JSON: {"id", "image": a path or a list of paths or none, "conversations"}.

    Args:
        data_path: a JSON list, or a `.jsonl` file with one sample on each line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a list of samples; of a `.jsonl` file, the line is named.
    """
    what = f"data_path {os.fspath(data_path)!r}"
    if not os.path.isfile(data_path):
        raise FileNotFoundError(f"{what}: no such file")
    if Path(data_path).suffix == ".jsonl":
        lines = enumerate(read_lines(data_path), start=1)
        examples = [parse_json(line, f"{what}, line {number}") for number, line in lines if line.strip()]
    else:
        examples = parse_json(read_file(data_path), what)
    if not isinstance(examples, list) or not examples:
        got = "an empty one" if examples == [] else type(examples).__name__
        raise ValueError(f"{what}: expected a list of samples, got {got}")
    return examples


def images_of(example: dict) -> list[str]:
    """The paths of a sample's images: none, one, or several."""
    images = example.get("image")
    return [] if images is None else [images] if isinstance(images, str) else images


def name_of(example: dict, number: int) -> str:
    """What an error calls a sample."""
    return f"id={example.get('id')!r:.80} (number {number})" if isinstance(example, dict) else f"number {number}"


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
    """The same, but a batch has samples with images or text-only ones; the last batch is what is left of both.

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

# Why a sample has no labels, beside what its turns show (checks.py).
MISMATCH = "tokenization mismatch"
CUT_OFF = "cut off at model_max_length before the first answer"
NO_LABEL = "no label"


class Loaded(NamedTuple):
    """One sample, ready to be packed."""

    ids: np.ndarray  # int64 [L], -200 where an image goes
    labels: np.ndarray  # int64 [L], -100 where there is none
    images: list[ProcessedImage]
    mismatch: tuple[int, int] | None  # see preprocess.Tokenized


def tokenized(example: dict, config: LlavaConfig, tokenizer, template: str) -> Tokenized:
    """A sample's ids and labels, an `<image>` not yet as long as its picture.

    Args:
        config, tokenizer, template: as of `load_example`.

    Raises:
        ValueError: the `<image>` are not as many as the images, or the conversation is not one.
    """
    images, turns, conv = len(images_of(example)), example["conversations"], conv_templates[template]
    if images:
        wrap = config.mm_use_im_start_end
        turns = preprocess_multimodal(turns, conv, mm_use_im_start_end=wrap, num_images=images)
    max_length = config.tokenizer_model_max_length
    text = preprocess(turns, tokenizer, conv, has_image=images > 0, max_length=max_length)
    placed = int(np.sum(text.ids == IMAGE_TOKEN_INDEX))
    if placed != images:
        raise ValueError(f"{placed} {DEFAULT_IMAGE_TOKEN} for {images} images")
    return text


def load_example(example: dict, image_folder: str | Path, config: LlavaConfig, tokenizer, template: str) -> Loaded:
    """A sample's ids, labels and tiles (LazySupervisedDataset.__getitem__; EXIF orientation is ignored, as there).

    Args:
        config: `image_aspect_ratio`, `mm_use_im_start_end`, and `tokenizer_model_max_length` for a text-only sample.
        tokenizer: from `training_tokenizer`.
        template: a name in `conv_templates`.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an image is damaged or outside of the folder, the `<image>` are not as many, or the conversation
            is not one.
    """
    text = tokenized(example, config, tokenizer, template)
    sources = [image_source(path, os.fspath(image_folder)) for path in images_of(example)]
    images = [process_image(load_image(source, exif=False), config) for source in sources]
    return Loaded(text.ids, text.labels, images, text.mismatch)


def why_unlabelled(text: Tokenized | Loaded, sizes: Sequence[tuple[int, int]], config: LlavaConfig) -> str | None:
    """The kind of fault for which a sample has nothing to learn; None if it has.

    Args:
        sizes: (width, height) of each of its images.
        config: its `tokenizer_model_max_length` is where a row is cut off.
    """
    if text.mismatch is not None:
        return MISMATCH
    labelled = np.flatnonzero(text.labels != IGNORE_INDEX)
    if not len(labelled):
        return CUT_OFF if len(text.ids) == config.tokenizer_model_max_length else NO_LABEL
    limit = config.tokenizer_model_max_length
    return CUT_OFF if limit is not None and merged_length(text.ids[: labelled[0]], sizes, config) >= limit else None
