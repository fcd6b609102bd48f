"""One model over eight simulated devices: the same tokens as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import jax, llava_jax
import numpy as np
from llava_jax.parallel.multihost import local_shards, place_rows
from llava_jax.parallel.sharding import constrain_rows, constrain_sequence, each_its_own
folder, picture = sys.argv[1:]
mesh = llava_jax.make_mesh(data=4, tensor=2)
rows = np.arange(24).reshape(8, 3)
placed = place_rows([rows], mesh)[0]
assert local_shards(mesh) == [0, 1, 2, 3] and placed.shape == rows.shape
assert all(len(x.data) == 2 and np.array_equal(x.data, rows[x.index]) for x in placed.addressable_shards)
seen = []
def double(x):
    seen.append(x.shape)
    return 2 * constrain_rows(x)
with jax.set_mesh(mesh):
    for count in (1, 3, 8, 12):  # four shards of two devices, or rows that no shard divides
        x = np.arange(5.0 * count).reshape(count, 5)
        assert np.array_equal(jax.jit(lambda x: each_its_own(double, x))(x), 2 * x)
    assert seen == [(8, 5), (8, 5), (8, 5), (16, 5)]
    x = np.zeros((4, 256, 6))
    spread = {length: jax.jit(constrain_sequence)(x[:, :length]) for length in (256, 254, 255)}
    shapes = {length: out.addressable_shards[0].data.shape for length, out in spread.items()}
    assert shapes == {256: (1, 128, 6), 254: (1, 254, 6), 255: (1, 255, 6)}
llava, params = llava_jax.load(folder, mesh=mesh)
kernel = params["language_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 2
tokens = llava.generate_tokens(params, [[1, 100, -200, 5], [1, 7, 8]], picture, max_new_tokens=8)
print(json.dumps(tokens.tolist()))
"""


def test_tensor_parallel_generation_gives_the_same_tokens(bundled, scenes_model, pictures):
    llava, params = bundled
    picture = pictures["chelsea"]
    wanted = llava.generate_tokens(params, [[1, 100, -200, 5], [1, 7, 8]], picture, max_new_tokens=8)
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, scenes_model, picture]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted.tolist()


BATCH = """
import jax
import numpy as np
import llava_jax
from small import small_model
from llava_jax.inference.llava import Llava
from llava_jax.parallel.sharding import param_shardings
alone, params = small_model()
rng = np.random.default_rng(0)
wide, high = (rng.integers(0, 256, (*size, 3), np.uint8) for size in ((300, 500), (700, 300)))
asked = [(wide, ["Is it?", "Why is it so?", "Who?"]), (high, ["A cat?"]), (None, ["Who are you?", "And now?"])]
options = {"max_new_tokens": [5, 20, 3, 9, 17, 2]}
wanted = alone.generate_batch(params, asked, **options)
mesh = llava_jax.make_mesh(jax.devices(), data=2)
llava, placed = Llava(alone.config, alone.tokenizer, mesh), jax.device_put(params, param_shardings(params, mesh))
programs = [value.jitted for value in vars(llava.engine.batch).values() if hasattr(value, "jitted")]
counts = []
for _ in range(2):
    assert llava.generate_batch(placed, asked, **options) == wanted
    counts.append([program._cache_size() for program in programs])
assert counts[0] == counts[1] and sum(counts[0]) == llava.engine.batch.compiled, counts
"""


@pytest.mark.long
def test_a_batch_over_two_devices_gives_the_same_and_compiles_once():
    """Pools and rows keep their shardings from call to call. Some 20 seconds."""
    flags = {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", BATCH], env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
