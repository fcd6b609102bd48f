"""What the host hands to the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Planned rows, padded to bucketed shapes; a pytree of arrays.

    `index` points into the table [embed(text_ids) | projected tiles, row by row | image_newline | zeros]. Rows
    divided into S shards have text_ids [S, X], and each shard's rows point into the table of its own text and tiles.
    """

    tiles: np.ndarray  # uint8 [T, S, S, 3]
    text_ids: np.ndarray  # int32 [text tokens of all rows]
    index: np.ndarray  # int32 [B, L]
    position_ids: np.ndarray  # int32 [B, L], 0 at padding
    attention_mask: np.ndarray  # bool [B, L]
    labels: np.ndarray  # int32 [B, L], -100 where there is none
    lengths: np.ndarray  # int32 [B]


class Targets(NamedTuple):
    """The positions that have something to predict, M for each row; a pytree of arrays."""

    positions: np.ndarray  # int32 [B, M], of the position before the label
    labels: np.ndarray  # int32 [B, M], -100 where there is none


class Questions(NamedTuple):
    """What the R rows of each of G prefixes go on with; a pytree of arrays. Q may be 0."""

    ids: np.ndarray  # int32 [G, R, Q], right-padded
    lengths: np.ndarray  # int32 [G, R]
    active: np.ndarray  # bool [G, R], False where a row only fills the shape
