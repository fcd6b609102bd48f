"""What the host hands to the device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Array = TypeVar("Array")  # np.ndarray on the host, jax.Array in what is compiled


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """A picture as the model takes it, a few megabytes however large it was."""

    tiles: np.ndarray  # uint8 [T, S, S, 3]
    size: tuple[int, int]  # (width, height) in pixels

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell it from other pictures."""
        digest = hashlib.blake2b(repr(self.size).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.tiles).data)
        return digest.digest()


class Batch(NamedTuple, Generic[Array]):
    """Planned rows, padded to bucketed shapes; a pytree of arrays.

    `gather_indices` point into the table [embed(text_ids) | projected tiles, row by row | image_newline | zeros]. Rows
    divided into S shards have text_ids [S, X], and each shard's rows point into the table of its own text and tiles.
    """

    tiles: Array  # uint8 [T, S, S, 3]
    text_ids: Array  # int32 [text tokens of all rows]
    gather_indices: Array  # int32 [B, L]
    position_ids: Array  # int32 [B, L], 0 at padding
    attention_mask: Array  # bool [B, L]
    lengths: Array  # int32 [B]
    labels: Array | None = None  # int32 [B, L], -100 where there is none; None in inference


class Targets(NamedTuple, Generic[Array]):
    """The positions that have something to predict, M for each row; a pytree of arrays."""

    positions: Array  # int32 [B, M], of the position before the label
    labels: Array  # int32 [B, M], -100 where there is none


class Questions(NamedTuple, Generic[Array]):
    """What the R rows of each of G prefixes go on with; a pytree of arrays. Q may be 0."""

    ids: Array  # int32 [G, R, Q], right-padded
    lengths: Array  # int32 [G, R]
    active: Array  # bool [G, R], False where a row only fills the shape
