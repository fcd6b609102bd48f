"""The packer: few shapes for many sizes, and what it refuses. Its results are in test_golden.py."""

import jax
import numpy as np
import pytest
import torch

from llava_jax.config import LlavaConfig
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.batch import as_rows, assign_images, bucket_count, bucket_length, pack
from llava_jax.inputs.types import ProcessedImage

CONFIG = LlavaConfig.preset("1.6-vicuna-7b")
NINE = tuple((336 * w, 336 * h) for w in (1, 2, 3) for h in (1, 2, 3))


@pytest.mark.parametrize("pinpoints", [CONFIG.image_grid_pinpoints, NINE, ((336, 336),), ((2016, 2016), (336, 672))])
@pytest.mark.parametrize("question", [20, 150])
def test_one_image_of_any_size_is_at_most_six_lengths(pinpoints, question):
    config = CONFIG.replace(image_grid_pinpoints=pinpoints)
    sizes = np.random.default_rng(0).integers(1, 4000, (2, 3000))
    lengths = {bucket_length(n + question, config) for n in num_image_tokens(*sizes, config)}
    assert len(lengths) <= 6
    assert all(bucket_length(n, config) >= n for n in range(1, 7000, 13))


def test_counts_go_to_a_few():
    assert [bucket_count(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13)] == [0, 1, 2, 3, 4, 6, 6, 8, 12, 16]


def test_images_go_to_rows_in_order_and_dummies_are_passed_over():
    rows = [np.array(row) for row in ([1, 2], [1, -200], [3], [-200, 4, -200])]
    assert assign_images(rows, 3) == [[], [0], [], [1, 2]]
    assert assign_images(rows, 5) == [[], [1], [], [3, 4]]
    for wrong in (0, 2, 4, 6):
        with pytest.raises(ValueError, match=f"got {wrong} for 3 <image> placeholders"):
            assign_images(rows, wrong)


def test_rows_without_images_hold_their_own_text_and_nothing_else():
    rows = [np.array([5, 6, 7]), np.array([8])]
    batch = pack(rows, [], CONFIG, labels=rows, padding_side="left")
    assert batch.tiles.shape == (0, 336, 336, 3) and batch.gather_indices.shape == (2, 64)
    assert batch.lengths.tolist() == [3, 1]
    assert batch.attention_mask[:, :4].tolist() == [[True, True, True, False], [False, False, True, False]]
    assert batch.text_ids[batch.gather_indices[0, :3]].tolist() == [5, 6, 7]
    assert batch.text_ids[batch.gather_indices[1, 2]] == 8
    assert batch.labels[1, :4].tolist() == [-100, -100, 8, -100]
    assert batch.position_ids[1, :4].tolist() == [0, 0, 0, 0]


def test_an_image_takes_its_own_label_out():
    rows, labels = [np.array([1, -200, 5])], [np.array([-100, -200, 5])]  # as a model's turn with <image> is labelled
    image = ProcessedImage(np.zeros((1, 336, 336, 3), np.uint8), (336, 336))
    batch = pack(rows, [image], CONFIG.replace(image_aspect_ratio="pad"), labels=labels)
    assert set(batch.labels.ravel().tolist()) == {-100, 5}
    with pytest.raises(
        ValueError, match="row 0, position 1: 32000 is not in the embedding table, which has 32000 rows"
    ):
        pack([np.array([1, 32000])], [], CONFIG)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"])
def test_ids_of_any_whole_type_are_rows(dtype):
    ids, labels = as_rows(np.array([[1, 2, 0]], dtype), np.array([[1, 1, 0]], dtype), np.array([[3, 4, 5]], dtype))
    assert ids[0].tolist() == [1, 2] and labels[0].tolist() == [3, 4] and ids[0].dtype == np.int64
    torch_ids, _ = as_rows(torch.tensor([[1, 2]], dtype=torch.int32), jax.numpy.ones((1, 2), bool))
    assert torch_ids[0].tolist() == [1, 2]
