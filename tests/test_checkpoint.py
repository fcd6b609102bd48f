"""Converted directories: restored into shardings and cast, and every bad directory refused with what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from make_7b import ROOT
from published import Checkpoint, config_dict, read_params

from llava_jax import checkpoint
from llava_jax.checkpoint import load_config, load_params, save_params
from llava_jax.config import LlavaConfig
from llava_jax.conversion.from_hf import convert
from llava_jax.parallel.sharding import default_axes, make_mesh, partition_spec


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("converted")
    tiny = Checkpoint(tmp_path, dtype=ml_dtypes.bfloat16)
    return convert(tiny.path, tmp_path / "llava-tiny", progress=False)


@pytest.fixture
def broken(converted, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "llava-tiny"))


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_config(converted):
    config = load_config(converted)
    assert config.name == "llava-v1.6-tiny"
    assert config.reading == "original"
    assert config.vision.image_mean == (0.5, 0.4, 0.3)  # the tower's preprocessor_config.json
    assert config.vision.hidden_size == 8
    assert config.generation.eos_token_ids == (2,)
    assert config.to_hf() == json.loads((converted / "config.json").read_text())


def test_reading_of_the_manifest(broken):
    manifest = json.loads((broken / "llava_jax.json").read_text())
    (broken / "llava_jax.json").write_text(json.dumps({**manifest, "reading": "llava-hf"}))
    assert load_config(broken).reading == "llava-hf"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_params(converted, dtype):
    """Cast from what is stored; float32 by default on a CPU; committed to one device."""
    config = load_config(converted)
    params = flatten_dict(load_params(converted, config, dtype), sep="/")
    stored = read_params(converted)
    assert params.keys() == stored.keys()
    for path, value in params.items():
        assert isinstance(value, jax.Array) and len(value.devices()) == 1
        assert same_bits(value, np.asarray(stored[path]).astype(np.dtype(dtype or "float32"))), path


def test_save_params_round_trip(converted, tmp_path):
    config = load_config(converted)
    params = load_params(converted, config)
    again = Path(shutil.copytree(converted, tmp_path / "again"))
    shutil.rmtree(again / "params")
    save_params(again / "params", params)
    assert jax.tree.all(jax.tree.map(same_bits, load_params(again, config), params))


# ---- what cannot be loaded


def refuses(directory, message, kind=ValueError):
    with pytest.raises(kind, match=message) as error:
        load_params(directory, load_config(directory))
    assert str(directory) in str(error.value)


def test_no_directory(tmp_path):
    refuses(tmp_path / "x", r"no such directory; .* `python convert/from_hf.py .*/x`", FileNotFoundError)


def test_somebody_elses_directory(tmp_path):
    refuses(
        tmp_path, r"no llava_jax checkpoint \(it has no llava_jax.json\); make one with `python convert/from_hf.py`"
    )


@pytest.mark.parametrize("weights", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_published_checkpoint_that_is_not_converted(tmp_path, weights):
    path = tmp_path / "my llava"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / weights).write_bytes(b"")
    refuses(path, rf"not converted yet; run `python convert/from_hf.py '{path}' --output '{path}-jax'` and load that")


def test_other_version(broken):
    (broken / "llava_jax.json").write_text('{"version": 2}')
    refuses(broken, "version 2, and this llava_jax reads version 1; update llava_jax, or convert")


@pytest.mark.parametrize("name", ["llava_jax.json", "config.json", "vision_config.json", "preprocessor_config.json"])
def test_damaged_json(broken, name):
    (broken / name).write_text('{"version": 1,')
    refuses(broken, rf"{name}: not JSON \(.*\); convert the checkpoint again")
    (broken / name).write_text("[]")
    refuses(broken, rf"{name}: a JSON object was expected, not list; convert")


def test_missing_config(broken):
    (broken / "config.json").unlink()
    refuses(broken, r"config.json: cannot be read \(.*\); convert the checkpoint again", FileNotFoundError)


def test_no_params(broken):
    (broken / "params").rename(broken / "params.partial_save")
    refuses(broken, r"half-written \(it has no params\); delete it and convert again")


@pytest.mark.parametrize("gone", ["state/manifest.ocdbt", "state/_METADATA", "state", "_CHECKPOINT_METADATA", "*"])
def test_half_written_params(broken, gone):
    for path in (broken / "params").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refuses(broken, "params: half-written or damaged .* convert the checkpoint again")


def test_lost_data(broken):
    for path in (broken / "params" / "state").glob("ocdbt.process_*/d"):
        shutil.rmtree(path)
    refuses(broken, "params: half-written or damaged .* convert the checkpoint again")


def test_parameters_of_another_config(broken):
    config = json.loads((broken / "config.json").read_text())
    changed = {**config, "num_hidden_layers": 3, "vocab_size": 31, "mm_patch_merge_type": "flat"}
    (broken / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="its parameters do not match its config") as error:
        load_params(broken, load_config(broken))
    assert "language_model/layers_2/input_layernorm/scale is missing" in str(error.value)
    assert "and 7 more" in str(error.value)
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 31, "mm_patch_merge_type": "flat"}))
    with pytest.raises(ValueError, match=r"image_newline has no place .*embedding is \[30, 16\] instead of \[31, 16\]"):
        load_params(broken, load_config(broken))


def test_dtype_that_nobody_knows(converted):
    with pytest.raises(ValueError, match="dtype=int8 is not supported; supported: float32, bfloat16, float16"):
        load_params(converted, load_config(converted), "int8")


# ---- the mesh


class Axes:
    """Stands for a mesh where only its shape counts."""

    def __init__(self, **shape):
        self.shape = shape


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("language_model/embed_tokens/embedding", (32000, 4096), ("tensor", None)),
        ("language_model/embed_tokens/embedding", (32001, 4096), (None, None)),  # 4 does not divide it
        ("language_model/lm_head/kernel", (4096, 32000), (None, "tensor")),
        ("language_model/layers_3/self_attn/k_proj/kernel", (4096, 1024), (None, "tensor")),
        ("language_model/layers_3/self_attn/k_proj/bias", (1024,), ("tensor",)),
        ("language_model/layers_3/self_attn/o_proj/kernel", (4096, 4096), ("tensor", None)),
        ("language_model/layers_3/self_attn/o_proj/bias", (4096,), ()),
        ("language_model/layers_3/mlp/up_proj/kernel", (4096, 11008), (None, "tensor")),
        ("language_model/layers_3/mlp/down_proj/kernel", (11008, 4096), ("tensor", None)),
        ("language_model/norm/scale", (4096,), ()),
        ("vision_tower/layers_0/self_attn/out_proj/kernel", (1024, 1024), (None, None)),  # whole: tiles are divided
        ("vision_tower/layers_0/mlp/fc1/bias", (4096,), ()),
        ("vision_tower/layers_0/mlp/fc2/kernel", (4096, 1024), (None, None)),
        ("mm_projector/linear_1/kernel", (1024, 4096), (None, None)),
        ("image_newline", (4096,), ()),
    ],
)
def test_table(path, shape, spec):
    assert partition_spec(path, shape, Axes(data=2, tensor=4)) == jax.sharding.PartitionSpec(*spec)
    assert not any(partition_spec(path, shape, Axes(data=2)))


@pytest.mark.parametrize(
    ("devices", "kv_heads", "params", "memory", "axes"),
    [
        (8, 32, 13.2, 15.75, (4, 2)),  # a 7B in bfloat16 on v5e-8
        (8, 32, 6.9, 15.75, (8, 1)),  # in int8
        (8, 40, 24.5, 15.75, (2, 4)),  # a 13B
        (8, 32, 13.2, 31.24, (8, 1)),  # v6e-8
        (4, 8, 13.2, 15.75, (2, 2)),
        (8, 4, 60, 15.75, (2, 4)),  # no more than the kv heads, whatever is left
        (3, 8, 13.2, 15.75, (3, 1)),
    ],
)
def test_axes_by_default(devices, kv_heads, params, memory, axes):
    assert tuple(default_axes(devices, kv_heads, params, memory).values()) == axes


def test_mesh_that_cannot_be(converted):
    count = len(jax.devices())
    with pytest.raises(
        ValueError, match=rf"^mesh tensor={count + 1}: needs {count + 1} devices, and here are {count} "
    ):
        make_mesh(tensor=count + 1)
    with pytest.raises(ValueError, match="positive size for each axis"):
        make_mesh(tensor=0)
    with pytest.raises(ValueError, match="positive size for each axis"):
        make_mesh()
    mesh = make_mesh(tensor=1)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


ON_EIGHT_DEVICES = """
import sys, jax, numpy as np
from llava_jax.checkpoint import load_config, load_params
from llava_jax.parallel.sharding import make_mesh
directory, saved = sys.argv[1:]
config = load_config(directory)
expected = np.load(saved)
mesh = make_mesh(data=2, tensor=4)
params = load_params(directory, config, mesh=mesh)
held = {}
for keys, value in jax.tree_util.tree_leaves_with_path(params):
    path = "/".join(k.key for k in keys)
    assert len(value.sharding.device_set) == 8, path
    assert np.array_equal(value, expected[path]), path
    held[path] = value.addressable_shards[0].data.shape
assert held["language_model/layers_0/self_attn/q_proj/kernel"] == (16, 4)
assert held["language_model/layers_0/self_attn/o_proj/kernel"] == (4, 16)
assert held["language_model/layers_0/mlp/up_proj/kernel"] == (16, 5)
assert held["language_model/layers_0/mlp/down_proj/kernel"] == (5, 16)
assert held["language_model/embed_tokens/embedding"] == (30, 16)  # 4 does not divide 30
assert held["vision_tower/layers_0/mlp/fc1/kernel"] == (8, 12)
assert held["language_model/norm/scale"] == (16,)
one = load_params(directory, config)
assert all(value.devices() == {jax.devices()[0]} for value in jax.tree.leaves(one))
print("all as expected")
"""


def test_on_eight_devices(converted, tmp_path):
    """Straight into the shardings of a 2 × 4 mesh, with the same values."""
    values = {k: np.asarray(v, np.float32) for k, v in read_params(converted).items()}
    np.savez(tmp_path / "expected.npz", **values)
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(converted), str(tmp_path / "expected.npz")]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "all as expected" in done.stdout, done.stderr


# ---- memory


MEMORY = """
import sys, threading, time, jax
from llava_jax.checkpoint import load_config, load_params
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
config = load_config(sys.argv[1])
jax.block_until_ready(jax.numpy.zeros(1))
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(load_params(sys.argv[1], config, sys.argv[2]))
done.set()
watcher.join()
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), max(peak[0], anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_no_second_copy_in_memory(wide):
    """Loading, with a cast, takes the parameters' own memory and what is in flight, which is bounded."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MEMORY, str(wide), "float32"], cwd=ROOT, env=env, capture_output=True)
    size, peak = map(int, done.stdout.split())
    assert size > 1.1e9
    assert peak < 1.6 * size, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of parameters"


@pytest.fixture(scope="module")
def wide(converted, tmp_path_factory):
    """300 million parameters in tensors of 4 million."""
    path = tmp_path_factory.mktemp("wide")
    directory = Path(shutil.copytree(converted, path / "wide"))
    text = dict(hidden_size=2048, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=16)
    text["num_key_value_heads"] = 16
    config = config_dict("clip", **text)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = checkpoint.param_shapes(load_config(directory))
    shutil.rmtree(directory / "params")
    leaves = flatten_dict(shapes, sep="/").items()
    zeros = ((name, np.zeros(leaf.shape, jnp.bfloat16)) for name, leaf in leaves)
    checkpoint.stream_params(directory / "params", zeros)
    yield directory
    shutil.rmtree(directory)


def test_default_presets_have_shapes():
    """`param_shapes` of the published 7B: 7.06 billion parameters, without computing anything."""
    shapes = checkpoint.param_shapes(LlavaConfig.preset("1.6-vicuna-7b"))
    assert 7.05e9 < sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) < 7.07e9
