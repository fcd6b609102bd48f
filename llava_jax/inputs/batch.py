"""Rows of ids and pictures into one batch with its gather index: the host half of LLaVA's multimodal merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_jax.inputs.anyres import NEWLINE, image_index, image_length, num_tiles, pinpoints
from llava_jax.inputs.types import Batch, ProcessedImage, Targets


def bucket_length(n: int, config: LlavaConfig) -> int:
    """Sequence lengths to a few: 64, 128, 256, then multiples of 512, or of more where images are longer than the
    published ones: one image of any size and a question are at most six lengths."""
    largest = max(image_length(width, height, config) for width, height in pinpoints(config) or [(1, 1)])
    step = 512 * -(-(largest + 128) // (6 * 512))  # 128: room for a question
    return int(next((size for size in (64, 128, 256) if n <= size), -(-n // step) * step))


def bucket_count(n: int, per_doubling: int = 2) -> int:
    """Counts to a few, so many to each doubling: 0, 1, 2, 3, 4, 6, 8, 12, … for two."""
    step = max(1, (1 << max(0, n - 1).bit_length()) // (2 * per_doubling))
    return -(-n // step) * step


def merged_length(ids, sizes: Iterable[tuple[int, int]], config: LlavaConfig) -> int:
    """Positions that a row takes once its images, of these (width, height) in order, stand for their placeholders.

    Images beyond the placeholders are passed over: `ids` may be the beginning of a row.
    """
    placeholders = int(np.sum(np.asarray(ids) == IMAGE_TOKEN_INDEX))
    images = (image_length(width, height, config) for width, height in islice(sizes, placeholders))
    return len(ids) - placeholders + sum(images)


class Rows(NamedTuple):
    """One array a row, without padding."""

    ids: list[np.ndarray]  # -200 where an image goes
    labels: list[np.ndarray] | None


def as_rows(input_ids, attention_mask=None, labels=None) -> Rows:
    """The reference's [B, L] arrays, or lists of rows, with padding taken out.

    Raises:
        ValueError: rows of ids, mask and labels do not match, or hold something else than whole numbers.
    """
    rows = _rows("input_ids", input_ids)
    masks = [np.ones(len(row), bool) for row in rows]
    if attention_mask is not None:
        masks = [mask.astype(bool) for mask in _rows("attention_mask", attention_mask, "biuf")]
    targets = None if labels is None else _rows("labels", labels)
    lengths = list(map(len, rows))
    for name, other in (("attention_mask", masks), ("labels", targets)):
        if other is not None and list(map(len, other)) != lengths:
            raise ValueError(f"{name}: its rows {list(map(len, other))} do not match input_ids' {lengths}")

    def kept(values):
        return [value[mask] for value, mask in zip(values, masks, strict=True)]

    return Rows(kept(rows), None if targets is None else kept(targets))


def _rows(name: str, values, kinds: str = "iu") -> list[np.ndarray]:
    """[B, L], or a list of rows, of numbers of these NumPy kinds; integers as int64."""
    try:
        rows = [np.asarray(row) for row in values]
    except (TypeError, ValueError):  # no rows, or rows of rows of different lengths
        rows = []
    if not rows or any(row.ndim != 1 or (row.size and row.dtype.kind not in kinds) for row in rows):
        what = "one row of token ids for each prompt" if name == "input_ids" else "rows of numbers like input_ids'"
        raise ValueError(f"{name}: expected [B, L], {what}")
    most = np.uint64(2**63 - 1)  # larger ones would come out negative
    rows = [np.minimum(row, most) if row.dtype == np.uint64 else row for row in rows]
    return [row if row.size and row.dtype.kind in "bf" else row.astype(np.int64) for row in rows]


def check_ids(what: str, ids: np.ndarray, vocab_size: int, other: int) -> None:
    """ValueError if one of the ids, int [L], is no row of the embedding table nor `other`, the one placeholder here."""
    outside = ((ids < 0) | (ids >= vocab_size)) & (ids != other)
    if outside.any():
        position = int(np.argmax(outside))
        table = f"the embedding table, which has {vocab_size} rows (0 to {vocab_size - 1})"
        placeholder = f"{other}, {'an image' if other == IMAGE_TOKEN_INDEX else 'no label'}"
        raise ValueError(f"{what}, position {position}: {ids[position]} is not in {table}, nor is it {placeholder}")


def assign_images(rows, num_images: int) -> list[list[int]]:
    """Which images each row shows, in order.

    A text-only row needs none; if there is exactly one image more for each text-only row, those are the dummies that
    the original needs there, and are passed over.

    Raises:
        ValueError: the number of images does not fit the number of <image> placeholders.
    """
    wanted = [int(np.sum(row == IMAGE_TOKEN_INDEX)) for row in rows]
    text_only = wanted.count(0)
    if num_images not in (sum(wanted), sum(wanted) + text_only):
        raise ValueError(
            f"images: got {num_images} for {sum(wanted)} <image> placeholders ({IMAGE_TOKEN_INDEX} in input_ids) in "
            f"{len(rows)} rows; give one image for each placeholder"
        )
    dummies = num_images > sum(wanted)
    out, start = [], 0
    for count in wanted:
        out.append(list(range(start, start + count)))
        start += count or dummies
    return out


def _splice(row, text, images: Sequence[np.ndarray]) -> np.ndarray:
    """The values of a row's text, [L], those at its placeholders replaced by the values of each image in turn."""
    pieces, start = [], 0
    for stop, image in zip(np.flatnonzero(row == IMAGE_TOKEN_INDEX), images, strict=True):
        pieces += [text[start:stop], image]
        start = int(stop) + 1
    return np.concatenate([*pieces, text[start:]])


def _image_rows(image: ProcessedImage, config: LlavaConfig, first: int, newline: int) -> np.ndarray:
    """The rows of a table that stand for an image: its features begin at `first`, its lines end with `newline`."""
    cells = image_index(image.size, config)
    return np.where(cells == NEWLINE, newline, cells + first)


class PlacedImage(NamedTuple):
    """An image among a prompt's positions."""

    tiles: np.ndarray  # uint8 [T, S, S, 3]
    start: int  # its first position
    rows: (
        np.ndarray
    )  # int32 [n]: what stands at each, of [features of as many tiles as an image can have | image_newline]

    @property
    def end(self) -> int:
        """The position behind it."""
        return self.start + len(self.rows)


class PlacedPrompt(NamedTuple):
    """A prompt whose images are merged one at a time."""

    text_ids: np.ndarray  # int [L], 0 where an image goes
    images: list[PlacedImage]


def place_images(ids: np.ndarray, images: Sequence[ProcessedImage], config: LlavaConfig) -> PlacedPrompt:
    """Where each id of a prompt stands, and each of its images, of which there is one for each placeholder."""
    newline = config.max_tiles_per_image * config.tokens_per_tile
    rows = [_image_rows(image, config, 0, newline) for image in images]
    placeholders, widths = np.flatnonzero(ids == IMAGE_TOKEN_INDEX), np.ones(len(ids), np.int64)
    widths[placeholders] = [len(own) for own in rows]
    starts = (np.cumsum(widths) - widths)[placeholders].tolist()
    placed = [PlacedImage(image.tiles, start, own) for image, start, own in zip(images, starts, rows, strict=True)]
    return PlacedPrompt(_splice(ids, ids, [np.zeros(len(own), np.int64) for own in rows]), placed)


class _Table(NamedTuple):
    """The device's table, as far as the host has it and needs to know it."""

    tiles: np.ndarray  # uint8 [T, S, S, 3], padded to a bucket
    image_indices: list[np.ndarray]  # for each image, the rows that stand for it
    zeros: int  # the row of zeros


def _table(images: Sequence[ProcessedImage], config: LlavaConfig, text_rows: int) -> _Table:
    counts = [len(image.tiles) for image in images]
    per_image = config.max_tiles_per_image
    total = per_image * bucket_count(-(-sum(counts) // per_image))
    tiles = np.zeros((total, config.tile_size, config.tile_size, 3), np.uint8)
    if images:
        tiles[: sum(counts)] = np.concatenate([image.tiles for image in images])
    newline = text_rows + config.tokens_per_tile * total
    indices = []
    for image, first_tile in zip(images, np.cumsum([0, *counts])[:-1], strict=True):
        indices.append(_image_rows(image, config, text_rows + config.tokens_per_tile * first_tile, newline))
    return _Table(tiles, indices, newline + 1)


def pack(
    rows: Sequence[np.ndarray],
    images: Sequence[ProcessedImage],
    config: LlavaConfig,
    *,
    labels: Sequence[np.ndarray] | None = None,
    padding_side: str = "right",
    max_length: int | None = None,
    attend_to_padding: bool = False,
) -> Batch[np.ndarray]:
    """Any mix of rows into one bucketed batch (the original's prepare_inputs_labels_for_multimodal, planned).

    Args:
        rows: for each row, ids as `as_rows` gives them; labels: likewise, in training.
        images: in the order of the placeholders.
        padding_side: "left" puts rows against the end of the longest one.
        max_length: rows are cut off on the right after so many positions, inside an image if need be.
        attend_to_padding: what the original does where no attention_mask went in.

    Returns:
        Batch; L is bucketed, and positions beyond the longest row are padding.

    Raises:
        ValueError: an id or a label is outside the embedding table, the images do not fit the placeholders, or a size
            does not fit its tiles. Positions are counted without padding.
    """
    for b, row in enumerate(rows):
        check_ids(f"input_ids: row {b}", row, config.text.vocab_size, IMAGE_TOKEN_INDEX)
    for b, target in enumerate(labels or ()):
        text_labels = np.where(rows[b] == IMAGE_TOKEN_INDEX, IGNORE_INDEX, target)  # an image takes its own out
        check_ids(f"labels: row {b}", text_labels, config.text.vocab_size, IGNORE_INDEX)
    assigned = assign_images(rows, len(images))
    shown = [images[i] for of_row in assigned for i in of_row]
    for i, image in enumerate(shown):
        given, due = len(image.tiles), num_tiles(image.size, config)
        if given != due:
            size = f"image_sizes[{i}]={tuple(image.size)} (width, height)"
            raise ValueError(f"{size} asks for {due} tiles, but the image has {given}")
    is_text = [row != IMAGE_TOKEN_INDEX for row in rows]
    text = np.concatenate([row[here] for row, here in zip(rows, is_text, strict=True)])
    text_ids = np.zeros(max(128, bucket_count(len(text))), np.int32)
    text_ids[: len(text)] = text
    table = _table(shown, config, len(text_ids))

    image_indices, merged, targets = iter(table.image_indices), [], []
    text_starts = np.cumsum([0, *(here.sum() for here in is_text)])
    for b, row in enumerate(rows):
        own = list(islice(image_indices, len(assigned[b])))
        merged.append(_splice(row, text_starts[b] + np.cumsum(is_text[b]) - 1, own)[:max_length])
        if labels is not None:
            targets.append(_splice(row, labels[b], [np.full(len(image), IGNORE_INDEX) for image in own])[:max_length])

    lengths = np.array([len(indices) for indices in merged], np.int32)
    longest = int(lengths.max())
    starts = longest - lengths if padding_side == "left" else np.zeros_like(lengths)
    shape = len(rows), bucket_length(longest, config)
    positions = _lay_out([np.arange(length) for length in lengths], starts, np.zeros(shape, np.int32))
    mask = _lay_out([np.ones(length, bool) for length in lengths], starts, np.zeros(shape, bool))
    if attend_to_padding:
        mask[:, :longest], positions[:, :longest] = True, np.arange(longest)
    indices = _lay_out(merged, starts, np.full(shape, table.zeros, np.int32))
    laid_labels = None if labels is None else _lay_out(targets, starts, np.full(shape, IGNORE_INDEX, np.int32))
    return Batch(table.tiles, text_ids, indices, positions, mask, lengths, laid_labels)


def _lay_out(rows, starts, out: np.ndarray) -> np.ndarray:
    """`out` [B, L] with each row's values from its start on."""
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        out[b, start : start + len(row)] = row
    return out


def pack_text(input_ids, attention_mask, labels, config: LlavaConfig) -> Batch[np.ndarray]:
    """Rows [B, L] without any image, padding left where it stands: the original touches nothing when `images` is None.

    Raises:
        ValueError: an image placeholder, but no images; rows of different lengths.
    """
    as_rows(input_ids, attention_mask)  # for its errors
    rows, targets = as_rows(input_ids, None, labels)
    if any(np.any(row == IMAGE_TOKEN_INDEX) for row in rows):
        raise ValueError(f"images: none given, but input_ids have <image> placeholders ({IMAGE_TOKEN_INDEX})")
    if len({len(row) for row in rows}) != 1:
        raise ValueError("input_ids: rows of different lengths need padding to [B, L] and an attention_mask")
    batch = pack(rows, [], config, labels=targets, attend_to_padding=True)
    if attention_mask is not None:
        batch.attention_mask[:, : len(rows[0])] = np.asarray(attention_mask).astype(bool)
    return batch


# ---- training


def next_tokens(labels: np.ndarray, most: int) -> Targets[np.ndarray]:
    """Where labels [B, L] have something to predict, and what: up to M in each row, M being 64, 256, 1024, … ≥ most."""
    wanted = [np.flatnonzero(row[1:] != IGNORE_INDEX) for row in labels]
    shape = len(labels), next(64 * 4**n for n in range(16) if most <= 64 * 4**n)
    positions, targets = np.zeros(shape, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
    for b, where in enumerate(wanted):
        positions[b, : len(where)], targets[b, : len(where)] = where, labels[b, where + 1]
    return Targets(positions, targets)


class Room(NamedTuple):
    """What every shard of a step has room for."""

    text_rows: int
    tiles: int
    length: int
    targets: int  # in a row; 0 in inference


def room_for(batches: list[Batch[np.ndarray]]) -> Room:
    """What the largest of the batches needs, and as much text as there are positions: the shapes then differ by length
    and tiles alone."""
    length = max(batch.gather_indices.shape[1] for batch in batches)
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Room(
        text_rows=max(len(batches[0].gather_indices) * length, *(len(batch.text_ids) for batch in batches)),
        tiles=max(len(batch.tiles) for batch in batches),
        length=length,
        targets=max((int((of_batch[:, 1:] != IGNORE_INDEX).sum(1).max()) for of_batch in labels), default=0),
    )


def stack_shards(batches: list[Batch[np.ndarray]], room: Room, config: LlavaConfig) -> Batch[np.ndarray]:
    """Batches of as many rows each as one, a shard for each: grown to like shapes, one after another."""
    grown = [_grow(batch, room, config.tokens_per_tile) for batch in batches]

    def joined(arrays):
        return None if arrays[0] is None else np.concatenate(arrays)

    text_ids = np.stack([batch.text_ids for batch in grown])
    return Batch(*map(joined, zip(*grown, strict=True)))._replace(text_ids=text_ids)


def _grow(batch: Batch[np.ndarray], room: Room, tokens_per_tile: int) -> Batch[np.ndarray]:
    """The same rows with room for more text, tiles and positions."""
    more_text, more_tiles = room.text_rows - len(batch.text_ids), room.tiles - len(batch.tiles)
    image_start = len(batch.text_ids)
    newline = image_start + len(batch.tiles) * tokens_per_tile
    indices = batch.gather_indices + np.where(batch.gather_indices >= image_start, more_text, 0)
    indices += np.where(batch.gather_indices >= newline, more_tiles * tokens_per_tile, 0)
    zeros = newline + 1 + more_text + more_tiles * tokens_per_tile

    def widen(array, value=0):
        return np.pad(array, ((0, 0), (0, room.length - array.shape[1])), constant_values=value)

    return Batch(
        tiles=np.pad(batch.tiles, ((0, more_tiles), (0, 0), (0, 0), (0, 0))),
        text_ids=np.pad(batch.text_ids, (0, more_text)),
        gather_indices=widen(indices.astype(np.int32), zeros),
        position_ids=widen(batch.position_ids),
        attention_mask=widen(batch.attention_mask),
        lengths=batch.lengths,
        labels=None if batch.labels is None else widen(batch.labels, IGNORE_INDEX),
    )
