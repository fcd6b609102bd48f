"""The parts of a wave of prefixes, put together in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax.capacity.programs import slice_mesh
from llava_jax.capacity.roofline import SLICES
from llava_jax.inference.cache import Prefix, add_to_wave, start_wave
from llava_jax.models.quantize import Int8
from llava_jax.parallel.sharding import make_mesh


def parts(shards, count):
    """Results of prefill, one prefix of each shard each, whose numbers say which they are."""
    for i in range(count):
        numbers = np.arange(shards) * count + i
        keys = np.broadcast_to(numbers[:, None, None, None], (shards, 2, 3, 4)).astype(np.float32)
        int8 = Int8(keys.astype(np.int8), keys[..., 0])
        yield Prefix([(jnp.asarray(keys), int8)], jnp.asarray(numbers)), jnp.asarray(keys[:, 0, 0])


@pytest.mark.parametrize("shards", [1, 2])
def test_each_shards_prefixes_stay_together(shards):
    wave, *others = parts(shards, 3)
    wave = start_wave(shards, 3, wave)
    for first, part in enumerate(others, start=1):
        wave = add_to_wave(shards, wave, part, np.int32(first))
    for leaf in jax.tree.leaves(wave):
        assert np.array_equal(np.asarray(leaf).reshape(shards * 3, -1)[:, 0], np.arange(shards * 3))


def compiled(mesh, shards, sharding, dtype):
    def part(count):
        shape = jax.ShapeDtypeStruct((count * shards, 4, 256, 128), dtype, sharding=sharding)
        return Prefix([(shape, shape)] * 2, jax.ShapeDtypeStruct((count * shards,), jnp.int32))

    run = jax.jit(add_to_wave, static_argnums=0, donate_argnums=1)
    with jax.set_mesh(mesh):
        return run.lower(shards, part(8), part(1), jax.ShapeDtypeStruct((), jnp.int32)).compile()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_part_is_written_into_the_waves_own_memory(no_tpu, platform):
    mesh = slice_mesh(SLICES["v5e-8"], data=2, tensor=4) if platform == "tpu" else make_mesh(data=1)
    sharding = NamedSharding(mesh, PartitionSpec("data", "tensor" if platform == "tpu" else None))
    program = compiled(mesh, mesh.shape["data"], sharding, jnp.bfloat16 if platform == "tpu" else jnp.float32)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2**16
    assert memory.alias_size_in_bytes == pytest.approx(memory.output_size_in_bytes, abs=2**12)
    text = program.as_text()
    assert not any(sent in text for sent in ("all-gather(", "all-to-all(", "collective-permute("))
