"""Positions written into rows' rings, in each of the forms that a backend may have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.inference import ring

HEADS, ROWS, WIDTH, QUESTION = 2, 4, 3, 4


def check(form, size, slots, row_ids, starts, groups):
    """Against what NumPy writes, one position after another. Of an admitted row nothing else is looked at."""
    rng, slots, row_ids = np.random.default_rng(size), np.array(slots), np.array(row_ids)
    old = rng.standard_normal((groups, HEADS, ROWS, size, WIDTH)).astype(np.float32)
    new = rng.standard_normal((len(slots), HEADS, row_ids.shape[1], QUESTION, WIDTH)).astype(np.float32)
    got = np.asarray(jax.jit(form)(old, new, slots, row_ids, np.array(starts)))
    wanted, each = got.copy(), groups // len(slots)
    admitted = np.zeros((groups, ROWS), bool)
    for b, n in np.ndindex(row_ids.shape):
        if slots[b] < each and row_ids[b, n] < ROWS:
            group, row = b * each + slots[b], row_ids[b, n]
            admitted[group, row] = True
            for i in range(QUESTION):
                wanted[group, :, row, (starts[b][n] + i) % size] = new[b, :, n, i]
    for group, row in np.argwhere(~admitted):
        wanted[group, :, row] = old[group, :, row]
    assert np.array_equal(got, wanted)
    return admitted.sum()


@pytest.mark.parametrize("form", [ring.put, ring.by_position, ring.by_block])
@pytest.mark.parametrize("size", [4, 6, 8, 12], ids=lambda size: f"{size} slots")
def test_each_position_has_its_slot(form, size):
    """Wherever the ring begins, for rows in any order; two shards, and what is out of range. 0.3 s each."""
    for start in range(-size, size):
        starts = [[start, start + 3, start + 1], [start + 2, start, start + 5]]
        assert check(form, size, [1, 0], [[3, 0, 2], [1, 2, 0]], starts, 4) == 6
    assert check(form, size, [2, 1], [[3, 0, 2], [4, 2, 5]], starts, 4) == 1
    assert check(form, size, [1], [[2]], [[size - 1]], 2) == 1


@pytest.mark.parametrize("form", [ring.by_position, ring.by_block])
def test_no_two_positions_have_one_slot(form):
    """Compilers are told so: else a GPU takes turns for each number of 16 bits."""
    arguments = jnp.zeros((1, HEADS, ROWS, 8, WIDTH)), jnp.zeros((1, HEADS, 2, QUESTION, WIDTH)), jnp.zeros(1, int)
    text = jax.jit(form).lower(*arguments, jnp.array([[1, 0]]), jnp.array([[1, 2]])).as_text()
    assert "unique_indices = true" in text and "unique_indices = false" not in text
