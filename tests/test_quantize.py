"""int8 kernels and int8 prefixes: what becomes int8, how near it stays, and that the way there makes no difference."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_attention import normal, pretend

import llava_jax
from llava_jax import checkpoint
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.to_hf import export
from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.model import BUNDLED, NAME, TOWER
from llava_jax.demo.scenes import draw
from llava_jax.inference.batch_shape import memory_bytes, one_pool
from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import CacheLayout
from llava_jax.models.linear import Linear, matmul_of_one_row
from llava_jax.models.quantize import Int8, quantize_params, to_int8
from llava_jax.training.train import train
from llava_jax.training.train_options import TrainOptions


@pytest.fixture(scope="module")
def loaded(scenes_model):
    """(llava and params as stored; the same in int8, and with int8 prefixes)"""
    return llava_jax.load(scenes_model), llava_jax.load(scenes_model, quantize="int8", int8_prefix=True)


def dequantized(params):
    """float32 kernels that an int8 model stands for."""
    flat = flatten_dict(params)
    scales = {path[:-1]: flat.pop(path) for path in list(flat) if path[-1] == "kernel_scale"}
    return {path: x * scales[path[:-1]] if x.dtype == jnp.int8 else x for path, x in flat.items()}


def test_the_nearest_of_255_levels():
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32) * [1, 1e-6, 1e6, 0, 3]
    x[3, 4] = 100
    values, scale = to_int8(jnp.asarray(x), 0)
    assert values.dtype == jnp.int8 and int(abs(values).max()) == 127 and scale.shape == (5,)
    np.testing.assert_allclose(scale, np.where(abs(x).max(0) > 0, abs(x).max(0), 127) / 127, rtol=1e-6)
    assert np.all(abs(values * scale - x) <= scale * 0.5001) and np.all(values[:, 3] == 0)


def test_which_kernels_are_int8(loaded):
    (_, params), (_, int8) = loaded
    before, after = flatten_dict(params, sep="/"), flatten_dict(int8, sep="/")
    made = {path for path, x in after.items() if x.dtype == jnp.int8}
    assert {path.split("/")[0] for path in made} == {"language_model", "vision_tower"}
    assert made == {path for path in before if "/layers_" in path and path.endswith("/kernel")}
    assert set(after) - set(before) == {path + "_scale" for path in made}
    assert all(after[path + "_scale"].dtype == jnp.float32 for path in made)
    assert all(np.array_equal(after[path], x) for path, x in before.items() if path not in made)
    exact = dequantized(int8)
    for path, x in flatten_dict(params).items():
        assert float(jnp.max(jnp.abs(exact[path] - x))) <= float(jnp.max(jnp.abs(x))) / 253
    also = flatten_dict(quantize_params(params, ("lm_head", "mm_projector")), sep="/")
    more = {path for path, x in also.items() if x.dtype == jnp.int8} - made
    assert more == {"language_model/lm_head/kernel", *(f"mm_projector/linear_{n}/kernel" for n in (1, 2))}


@pytest.mark.parametrize("dtype, within", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.01)])
def test_the_scale_comes_after_the_product(dtype, within):
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(64, 8)), jnp.asarray(rng.normal(size=(3, 64)), dtype)
    values, scale = to_int8(jnp.asarray(kernel, jnp.float32), 0)
    bias = jnp.asarray(rng.normal(size=8), dtype)
    out = Linear(8).apply({"params": {"kernel": values, "kernel_scale": scale, "bias": bias}}, x)
    exact = np.asarray(x, np.float64) @ (np.asarray(values, np.float64) * scale) + np.asarray(bias, np.float64)
    assert out.dtype == dtype and np.max(abs(np.asarray(out, np.float64) - exact)) < within * np.max(abs(exact))


def test_a_linear_layer_is_flaxs_dense():
    import flax.linen as nn

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.bfloat16)
    params = nn.Dense(8).init(jax.random.key(0), x)
    assert jnp.array_equal(Linear(8).apply(params, x), nn.Dense(8).apply(params, x))


def test_stored_or_made_while_loading_is_the_same(scenes_model, loaded, tmp_path):
    (_, params), (_, at_load) = loaded
    convert(BUNDLED, vision_tower=str(BUNDLED / TOWER), output=tmp_path / NAME, quantize="int8")
    _, stored = llava_jax.load(tmp_path / NAME)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(jnp.all(a == b)), stored, at_load))
    assert jax.tree.structure(quantize_params(params)) == jax.tree.structure(stored)

    def size(folder):
        return sum(file.stat().st_size for file in (folder / checkpoint.PARAMS).rglob("*") if file.is_file())

    assert size(tmp_path / NAME) < 0.7 * size(scenes_model)  # half of bfloat16's kernels, and what is not int8
    again = llava_jax.load(tmp_path / NAME, quantize="int8")[1]  # is int8 already
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), again, stored))
    half = flatten_dict(llava_jax.load(tmp_path / NAME, dtype="bfloat16")[1], sep="/")
    kinds = {"kernel_scale": jnp.float32}
    assert all(x.dtype in (jnp.int8, kinds.get(path.split("/")[-1], jnp.bfloat16)) for path, x in half.items())


def test_levels_are_those_of_what_is_stored(scenes_model, tmp_path):
    """However the rest is cast: weights that bfloat16 does not hold."""
    llava, params = llava_jax.load(scenes_model, dtype="float32")
    exact = jax.tree.map(lambda x: x * 1.0013, params)
    shutil.copytree(scenes_model, tmp_path / NAME)
    shutil.rmtree(tmp_path / NAME / checkpoint.PARAMS)
    checkpoint.save_params(tmp_path / NAME / checkpoint.PARAMS, exact)
    wanted = flatten_dict(quantize_params(exact), sep="/")
    got = flatten_dict(checkpoint.load_params(tmp_path / NAME, llava.config, "bfloat16", quantize="int8"), sep="/")
    assert all(bool(jnp.all(got[path] == x)) for path, x in wanted.items() if x.dtype == jnp.int8)


@pytest.mark.long
def test_prefill_gives_int8_and_answers_are_the_same_in_a_batch_and_in_chat(loaded):
    _, (llava, params) = loaded
    scene = held_out_scene(0, 2)
    asked = [question.text for question in questions_about(scene, 0, 2)]
    images = llava.load_images(draw(scene))
    prefix, _ = llava.engine.prefill(params, pack([np.array([1, -200, 5])], images, llava.config))
    assert all(isinstance(x, Int8) and x.values.dtype == jnp.int8 for pair in prefix.keys_values for x in pair)
    options = {"max_new_tokens": 24}
    answers = llava.generate_batch(params, [(draw(scene), asked)], **options)
    assert answers[:3] == [llava.generate(params, draw(scene), text, **options) for text in asked[:3]]
    chat = llava.chat(params, draw(scene), **options)
    assert chat.send(asked[0]) == answers[0]
    chat.send(asked[1])
    assert all(isinstance(x, Int8) for pair in chat.cached.prefix.keys_values for x in pair)
    whole, _ = llava.engine.prefill(params, pack([chat.cached.ids], images, llava.config))
    kept = int(whole.lengths[0])
    for folded, wanted in zip(
        chat.cached.prefix.keys_values[0], whole.keys_values[0], strict=True
    ):  # of the first layer
        folded, wanted = (np.asarray(x.values * x.scale[..., None])[:, :, :kept] for x in (folded, wanted))
        assert np.max(abs(folded - wanted)) < 0.03 * np.max(abs(wanted))


@pytest.mark.long
def test_int8_answers_nearly_as_well(loaded):
    (llava, params), (llava8, int8) = loaded
    scenes = 12
    asked = [(scene := held_out_scene(1, n), [q.text for q in questions_about(scene, 1, n)]) for n in range(scenes)]
    requests = [(draw(scene), texts) for scene, texts in asked]
    ours, theirs = (x.generate_batch(p, requests, max_new_tokens=24) for x, p in ((llava8, int8), (llava, params)))
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert 0.9 * len(same) <= sum(same)


SHARDED = """
import json, sys
import llava_jax
from llava_jax.demo.scenes import draw
from llava_jax.demo.held_out import held_out_scene
mesh = llava_jax.make_mesh(data=2, tensor=4)
llava, params = llava_jax.load(sys.argv[1], mesh=mesh, quantize="int8", int8_prefix=True)
kernel = params["language_model"]["layers_0"]["mlp"]["up_proj"]
assert kernel["kernel"].addressable_shards[0].data.shape[1] * 4 == kernel["kernel"].shape[1]
assert kernel["kernel_scale"].addressable_shards[0].data.shape[0] * 4 == kernel["kernel_scale"].shape[0]
requests = [(draw(held_out_scene(0, n)), ["Describe the image.", "What color is the heart?"]) for n in range(2)]
print(json.dumps(llava.generate_batch(params, requests, max_new_tokens=24)))
"""


@pytest.mark.long  # test_parallel.py has eight devices every day
def test_over_eight_devices(scenes_model, loaded):
    llava, params = loaded[1]
    requests = [(draw(held_out_scene(0, n)), ["Describe the image.", "What color is the heart?"]) for n in range(2)]
    wanted = llava.generate_batch(params, requests, max_new_tokens=24)
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(scenes_model)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == wanted


def test_an_int8_prefix_is_planned_for():
    config = llava_jax.LlavaConfig.preset("1.6-vicuna-7b")
    shape = one_pool(1, 4, 3072, 8, 16, 32)
    usual, int8 = (memory_bytes(shape, config, CacheLayout(2, int8_prefix=int8)) for int8 in (False, True))
    assert usual - int8 >= 4 * 3072 * 0.47 * 2**19  # 0.5 MiB a position, and half of it but for the scales


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantize": "int4"}, "quantize='int4' is not supported; supported: int8"),
        ({"quantize": "int8", "quantize_also": ["norms"]}, "quantize_also=norms is not known; known: lm_head, mm_proj"),
        ({"quantize_also": ["lm_head"]}, "quantize_also needs quantize='int8'"),
    ],
)
def test_wrong_options_are_refused(scenes_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        llava_jax.load(scenes_model, **options)
    with pytest.raises(ValueError, match=message):
        convert(BUNDLED, vision_tower=str(BUNDLED / TOWER), output=tmp_path / NAME, **options)
    assert not (tmp_path / NAME).exists()


def test_it_is_for_inference_only(tmp_path):
    folder = convert(BUNDLED, vision_tower=str(BUNDLED / TOWER), output=tmp_path / NAME, quantize="int8")
    message = f"{NAME}: its kernels are int8, for inference only; use the checkpoint that it was made of"
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "exported")
    with pytest.raises(ValueError, match=message):
        train(TrainOptions(stage="finetune", model_path=str(folder), data_path="-", output_dir=str(tmp_path / "tuned")))
    assert not (tmp_path / "tuned").exists()


def test_one_row_is_a_sum():
    x, kernel = 3 * normal(1, 1, 96), to_int8(normal(96, 40, seed=1), 0).values
    np.testing.assert_allclose(matmul_of_one_row(x, kernel), x @ np.float32(kernel), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("capability", "rows", "summed"), [("7.5", 1, True), ("7.5", 2, False), ("8.0", 1, False)])
def test_before_an_ampere_one_row_is_no_product(monkeypatch, capability, rows, summed):
    pretend(monkeypatch, capability)
    params = {"kernel": jnp.ones((64, 32), jnp.int8), "kernel_scale": jnp.ones(32)}
    run = jax.jit(lambda x: Linear(32, use_bias=False).apply({"params": params}, x))
    text = run.trace(jnp.ones((1, rows, 64), jnp.float16)).lower(lowering_platforms=("cuda",)).as_text()
    assert ("dot_general" not in text) == summed
