"""Rows of ids and pictures into one batch with its gather index: the host half of LLaVA's multimodal merge."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_jax.inputs.anyres import NEWLINE, image_index, num_image_tokens, num_tiles, pinpoints
from llava_jax.inputs.types import Batch, Targets

PLACEHOLDERS = {IMAGE_TOKEN_INDEX: "an image", IGNORE_INDEX: "no label"}


class _Table(NamedTuple):
    """Where the kinds of rows start in the device's table."""

    image_start: list[int]  # for each image that is shown
    newline: int
    zeros: int


def bucket_length(n: int, config: LlavaConfig) -> int:
    """Sequence lengths to a few: 64, 128, 256, then multiples of 512, or of more where images are longer than the
    published ones: one image of any size and a question are at most six lengths."""
    widths, heights = np.transpose(pinpoints(config) or [(1, 1)])
    largest = num_image_tokens(widths, heights, config).max()
    step = 512 * -(-(largest + 128) // (6 * 512))  # 128: room for a question
    return int(next((size for size in (64, 128, 256) if n <= size), -(-n // step) * step))


def bucket_count(n: int, per_doubling: int = 2) -> int:
    """Counts to a few, so many to each doubling: 0, 1, 2, 3, 4, 6, 8, 12, … for two."""
    step = max(1, (1 << max(0, n - 1).bit_length()) // (2 * per_doubling))
    return -(-n // step) * step


def as_rows(input_ids, attention_mask=None, labels=None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The reference's [B, L] arrays (or lists of rows) as one id and one label array a row, padding taken out.

    Raises:
        ValueError: rows of ids, mask and labels do not match, or hold something else than whole numbers.
    """
    rows = _rows("input_ids", input_ids)
    masks = [np.ones(len(row), bool) for row in rows]
    if attention_mask is not None:
        masks = [mask.astype(bool) for mask in _rows("attention_mask", attention_mask, "biuf")]
    targets = [np.full(len(row), IGNORE_INDEX) for row in rows] if labels is None else _rows("labels", labels)
    for name, other in (("attention_mask", masks), ("labels", targets)):
        if [len(x) for x in other] != [len(row) for row in rows]:
            raise ValueError(
                f"{name}: its rows {[len(x) for x in other]} do not match input_ids' {[len(r) for r in rows]}"
            )
    return [r[m] for r, m in zip(rows, masks, strict=True)], [t[m] for t, m in zip(targets, masks, strict=True)]


def _rows(name: str, values, kinds: str = "iu") -> list[np.ndarray]:
    """[B, L], or a list of rows, of numbers of these NumPy kinds; integers as int64."""
    try:
        rows = [np.asarray(row) for row in values]
    except (TypeError, ValueError):  # no rows, or rows of rows of different lengths
        rows = []
    if not rows or any(row.ndim != 1 or (row.size and row.dtype.kind not in kinds) for row in rows):
        what = "one row of token ids for each prompt" if name == "input_ids" else "rows of numbers like input_ids'"
        raise ValueError(f"{name}: expected [B, L], {what}")
    return [row if row.size and row.dtype.kind in "bf" else _as_int64(row) for row in rows]


def _as_int64(row: np.ndarray) -> np.ndarray:
    if row.dtype == np.uint64:  # the largest would come out negative
        row = np.minimum(row, np.uint64(np.iinfo(np.int64).max))
    return row.astype(np.int64)


def check_ids(what: str, ids: np.ndarray, vocab_size: int, other: int) -> None:
    """ValueError if one of the ids, int [L], is no row of the embedding table nor `other`, the one placeholder here."""
    outside = ((ids < 0) | (ids >= vocab_size)) & (ids != other)
    if outside.any():
        position = int(np.argmax(outside))
        raise ValueError(
            f"{what}, position {position}: {ids[position]} is not in the embedding table, which has {vocab_size} rows "
            f"(0 to {vocab_size - 1}), nor is it {other}, {PLACEHOLDERS[other]}"
        )


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


def _splice(row, labels, text_start: int, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One row's table index and labels: text in place, each placeholder replaced by its image's positions."""
    index, targets, next_text = [], [], text_start
    placeholders = np.flatnonzero(row == IMAGE_TOKEN_INDEX)
    for i, (start, stop) in enumerate(zip([0, *placeholders + 1], [*placeholders, len(row)], strict=True)):
        index.append(np.arange(next_text, next_text + stop - start))
        targets.append(labels[start:stop])
        next_text += stop - start
        if i < len(images):
            index.append(images[i])
            targets.append(np.full(len(images[i]), IGNORE_INDEX))
    return np.concatenate(index), np.concatenate(targets)


def _check_tiles(tiles, sizes, config: LlavaConfig) -> None:
    for i, (tile, size) in enumerate(zip(tiles, sizes, strict=True)):
        if len(tile) != num_tiles(size, config):
            raise ValueError(
                f"image_sizes[{i}]={tuple(size)} (width, height) asks for {num_tiles(size, config)} tiles, "
                f"but the image has {len(tile)}"
            )


def _table(shown: list[int], tiles, config: LlavaConfig, text_rows: int) -> tuple[_Table, np.ndarray]:
    """The table's layout, and the shown images' tiles [T, S, S, 3], padded to a bucket."""
    counts = [len(tiles[i]) for i in shown]
    per_image = config.max_tiles_per_image
    total = per_image * bucket_count(-(-sum(counts) // per_image))
    packed = np.zeros((total, config.tile_size, config.tile_size, 3), np.uint8)
    if shown:
        packed[: sum(counts)] = np.concatenate([tiles[i] for i in shown])
    starts = dict.fromkeys(range(len(tiles)), 0)
    starts.update(zip(shown, text_rows + config.tokens_per_tile * np.cumsum([0, *counts])[:-1], strict=True))
    newline = text_rows + config.tokens_per_tile * total
    return _Table([int(starts[i]) for i in range(len(tiles))], newline, newline + 1), packed


def pack(
    rows,
    labels,
    tiles,
    sizes,
    config: LlavaConfig,
    *,
    padding_side: str = "right",
    max_length: int | None = None,
    attend_to_padding: bool = False,
) -> Batch[np.ndarray]:
    """Any mix of rows into one bucketed batch (the original's prepare_inputs_labels_for_multimodal, planned).

    Args:
        rows, labels: for each row, int arrays of ids (-200 where an image goes) and labels, from `as_rows`.
        tiles, sizes: for each image, uint8 [T, S, S, 3] and (width, height), in the order of the placeholders.
        padding_side: "left" puts rows against the end of the longest one.
        max_length: rows are cut off on the right after so many positions, inside an image if need be.
        attend_to_padding: what the original does where no attention_mask went in.

    Returns:
        Batch; L is bucketed, and positions beyond the longest row are padding.

    Raises:
        ValueError: an id or a label is outside the embedding table, the images do not fit the placeholders, or a size
            does not fit its tiles. Positions are counted without padding.
    """
    for b, (row, target) in enumerate(zip(rows, labels, strict=True)):
        check_ids(f"input_ids: row {b}", row, config.text.vocab_size, IMAGE_TOKEN_INDEX)
        text_labels = np.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, target)  # an image takes its own out
        check_ids(f"labels: row {b}", text_labels, config.text.vocab_size, IGNORE_INDEX)
    assigned = assign_images(rows, len(tiles))
    shown = [i for images in assigned for i in images]
    _check_tiles([tiles[i] for i in shown], [sizes[i] for i in shown], config)
    text = [row[row != IMAGE_TOKEN_INDEX] for row in rows]
    text_rows = max(128, bucket_count(sum(map(len, text))))
    table, packed = _table(shown, tiles, config, text_rows)

    def positions_of(i: int) -> np.ndarray:
        cells = image_index(sizes[i], config)
        return np.where(cells == NEWLINE, table.newline, cells + table.image_start[i])

    text_starts = np.cumsum([0, *map(len, text)])
    spliced = [
        _splice(row, target, start, [positions_of(i) for i in images])
        for row, target, start, images in zip(rows, labels, text_starts, assigned, strict=False)
    ]
    spliced = [(index[:max_length], target[:max_length]) for index, target in spliced]
    text_ids = np.zeros(text_rows, np.int32)
    text_ids[: text_starts[-1]] = np.concatenate(text)
    lengths = np.array([len(index) for index, _ in spliced], np.int32)
    shape = len(rows), bucket_length(lengths.max(), config)
    arrays = _lay_out(spliced, lengths, shape, table.zeros, padding_side, attend_to_padding)
    index, position_ids, mask, targets = arrays
    return Batch(packed, text_ids, index, position_ids, mask, targets, lengths)


def _lay_out(spliced, lengths, shape, zeros: int, padding_side: str, attend_to_padding: bool):
    """Rows of (index, labels) as index, position_ids, attention_mask and labels, each [B, L]."""
    longest = lengths.max()
    index, targets = np.full(shape, zeros, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
    position_ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for b, (row_index, row_targets) in enumerate(spliced):
        start = longest - lengths[b] if padding_side == "left" else 0
        here = slice(start, start + lengths[b])
        index[b, here], targets[b, here] = row_index, row_targets
        position_ids[b, here], mask[b, here] = np.arange(lengths[b]), True
    if attend_to_padding:
        mask[:, :longest], position_ids[:, :longest] = True, np.arange(longest)
    return index, position_ids, mask, targets


def pack_text(input_ids, attention_mask, labels, config: LlavaConfig) -> Batch[np.ndarray]:
    """Rows without any image, padding left where it stands: the original touches nothing when `images` is None.

    Args:
        input_ids: [B, L]; attention_mask: [B, L] or None; labels: [B, L] or None.

    Raises:
        ValueError: an image placeholder, but no images; rows of different lengths.
    """
    as_rows(input_ids, attention_mask)  # for its errors
    rows, targets = as_rows(input_ids, None, labels)
    if any(np.any(row == IMAGE_TOKEN_INDEX) for row in rows):
        raise ValueError(f"images: none given, but input_ids have <image> placeholders ({IMAGE_TOKEN_INDEX})")
    if len({len(row) for row in rows}) != 1:
        raise ValueError("input_ids: rows of different lengths need padding to [B, L] and an attention_mask")
    batch = pack(rows, targets, [], [], config, attend_to_padding=True)
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
    targets: int  # in a row


def room_for(batches: list[Batch[np.ndarray]]) -> Room:
    """What the largest of the batches needs, and as much text as there are positions: the shapes then differ by length
    and tiles alone."""
    length = max(batch.index.shape[1] for batch in batches)
    return Room(
        text_rows=max(len(batches[0].index) * length, *(len(batch.text_ids) for batch in batches)),
        tiles=max(len(batch.tiles) for batch in batches),
        length=length,
        targets=max(int((batch.labels[:, 1:] != IGNORE_INDEX).sum(1).max()) for batch in batches),
    )


def stack_shards(
    batches: list[Batch[np.ndarray]], room: Room, config: LlavaConfig
) -> tuple[Batch[np.ndarray], Targets[np.ndarray]]:
    """Batches of as many rows each as one, a shard for each: grown to like shapes, one after another."""
    grown = [_grow(batch, room.text_rows, room.tiles, room.length, config.tokens_per_tile) for batch in batches]
    text_ids = np.stack([batch.text_ids for batch in grown])
    stacked = Batch(*(np.concatenate(arrays) for arrays in zip(*grown, strict=True)))._replace(text_ids=text_ids)
    return stacked, next_tokens(stacked.labels, room.targets)


def _grow(batch: Batch[np.ndarray], text_rows: int, tiles: int, length: int, tokens_per_tile: int) -> Batch[np.ndarray]:
    """The same rows with room for more text, tiles and positions."""
    more_text, more_tiles = text_rows - len(batch.text_ids), tiles - len(batch.tiles)
    image_start = len(batch.text_ids)
    newline = image_start + len(batch.tiles) * tokens_per_tile
    index = batch.index + np.where(batch.index >= image_start, more_text, 0)
    index += np.where(batch.index >= newline, more_tiles * tokens_per_tile, 0)
    zeros = newline + 1 + more_text + more_tiles * tokens_per_tile

    def widen(array, value=0):
        return np.pad(array, ((0, 0), (0, length - array.shape[1])), constant_values=value)

    return Batch(
        tiles=np.pad(batch.tiles, ((0, more_tiles), (0, 0), (0, 0), (0, 0))),
        text_ids=np.pad(batch.text_ids, (0, more_text)),
        index=widen(index.astype(np.int32), zeros),
        position_ids=widen(batch.position_ids),
        attention_mask=widen(batch.attention_mask),
        labels=widen(batch.labels, IGNORE_INDEX),
        lengths=batch.lengths,
    )
