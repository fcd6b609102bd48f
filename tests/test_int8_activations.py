"""Products of int8 by int8 in prefill: exact sums, the same on every mesh, not in decoding, and answers that hold."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_model
from test_ceilings import shallow

import llava_jax
from llava_jax.capacity.ahead import abstract_params, compile_for, slice_mesh
from llava_jax.capacity.hlo import parse
from llava_jax.capacity.roofline import SLICES, Precision, works
from llava_jax.capacity.traffic import estimated_cycles
from llava_jax.cli import main
from llava_jax.config import LlavaConfig
from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.scenes import draw
from llava_jax.evaluation.evaluate_options import EvaluateOptions
from llava_jax.evaluation.run import prepare
from llava_jax.inference import generate
from llava_jax.inference.batch_shape import one_pool
from llava_jax.inference.sampling import Greedy
from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import pack_questions
from llava_jax.inputs.types import Batch
from llava_jax.models.linear import Linear
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.models.quantize import quantize_params, to_int8
from llava_jax.parallel.sharding import batch_sharding

ASKED = ["Describe the image.", "What color is the heart?"]


@pytest.fixture(scope="module")
def loaded(scenes_model):
    return llava_jax.load(scenes_model, quantize="int8", int8_activations=True)


# ---- the product


def by_numpy(x, kernel, scale):
    """In numpy's int32, and then float32."""
    largest = np.abs(x).max(-1, keepdims=True)
    of_rows = np.where(largest > 0, largest, np.float32(127)) / np.float32(127)
    rows = np.rint(x / of_rows).astype(np.int32)
    return (rows @ kernel.astype(np.int32)).astype(np.float32) * of_rows * scale


@pytest.mark.parametrize("width", [96, 14336])
def test_sums_are_exact(width):
    """At the width of an MLP too, where the sums are 14 times what float32 counts one by one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, width), np.float32) * np.float32([[[1], [1e-3], [30], [0], [1]]])
    x[0, 4] = 5 * np.sign(x[0, 4])
    kernel = rng.integers(-127, 128, (width, 24)).astype(np.int8)
    kernel[:, 3] = 127 * np.where(x[0, 4] < 0, -1, 1)
    scale = rng.uniform(0.5, 2, 24).astype(np.float32)
    run = jax.jit(
        lambda x: Linear(24, use_bias=False).apply({"params": dict(kernel=kernel, kernel_scale=scale)}, x, True)
    )
    out, wanted = np.asarray(run(x)), by_numpy(x, kernel, scale)
    assert np.array_equal(out, wanted) and not out[:, 3].any()
    assert out[0, 4, 3] == np.float32(127 * 127 * width) * (np.float32(5) / np.float32(127)) * scale[3]


def test_bias_and_dtype():
    x, kernel = jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16).reshape(2, 32), to_int8(jnp.eye(32)[:, :8], 0)
    params = dict(kernel=kernel.values, kernel_scale=kernel.scale, bias=jnp.full(8, 2, jnp.bfloat16))
    out = Linear(8).apply({"params": params}, x, True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), np.float32(x[:, :8]) + 2, atol=0.02)


def test_without_int8_kernels_nothing_changes():
    x = jax.random.normal(jax.random.key(0), (3, 64))
    params = Linear(8).init(jax.random.key(1), x)
    assert jnp.array_equal(Linear(8).apply(params, x, True), Linear(8).apply(params, x))


# ---- where


def int8_products(function, *args) -> int:
    """How many products of int8 by int8 a program has."""
    return len(
        re.findall(r"dot_general .*xi8>, tensor<\w+xi8>\) -> tensor<\w+xi32>", jax.jit(function).lower(*args).as_text())
    )


def test_prefill_and_questions_have_them_and_decoding_has_none():
    llava, params = small_model()
    model, params = LlavaLlamaForCausalLM(llava.config, int8_activations=True), quantize_params(params)
    batch = pack([np.array([1, 5, 6])], [], llava.config)
    one, several = pack_questions([[[7]]], 1, 1), pack_questions([[[7, 8, 9], [4]]], 1, 2)
    prefix, last = jax.eval_shape(partial(generate.prefill, model), params, batch)
    decode = partial(generate.decode_loop, model)
    ask = partial(generate.sample_first_token, model, 4)
    state = jax.eval_shape(ask, params, prefix, last, several, Greedy())
    assert int8_products(partial(generate.prefill, model), params, batch) == 7  # of a layer
    assert int8_products(ask, params, prefix, last, several, Greedy()) == 7
    assert int8_products(ask, params, prefix, last, one, Greedy()) == 7
    assert int8_products(decode, params, prefix, state, Greedy(), np.int32(4)) == 0
    plain = LlavaLlamaForCausalLM(llava.config)
    assert int8_products(partial(generate.prefill, plain), params, batch) == 0


# ---- answers


@pytest.mark.long  # ten seconds; test_quantize.py has int8 kernels every day
def test_answers_hold(loaded, scenes_model):
    """Of 12 scenes, and each alone is what it is among others."""
    llava, params = loaded
    exact, of_file = llava_jax.load(scenes_model)
    asked = [(scene := held_out_scene(1, n), [q.text for q in questions_about(scene, 1, n)]) for n in range(12)]
    requests = [(draw(scene), texts) for scene, texts in asked]
    ours, theirs = (x.generate_batch(p, requests, max_new_tokens=24) for x, p in ((llava, params), (exact, of_file)))
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert 0.9 * len(same) <= sum(same)
    scene, texts = asked[2]
    first = sum(len(texts) for _, texts in asked[:2])
    assert ours[first : first + 2] == [
        llava.generate(params, draw(scene), text, max_new_tokens=24) for text in texts[:2]
    ]


SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import llava_jax
from jax.sharding import NamedSharding, PartitionSpec
from llava_jax.demo.held_out import held_out_scene
from llava_jax.demo.scenes import draw
from llava_jax.models.linear import Linear
mesh = llava_jax.make_mesh(data=2, tensor=4)
rng = np.random.default_rng(0)
x, kernel = rng.standard_normal((2, 8, 64), np.float32), rng.integers(-127, 128, (64, 32)).astype(np.int8)
params = {"params": dict(kernel=kernel, kernel_scale=rng.uniform(1, 2, 32).astype(np.float32))}
run = jax.jit(lambda params, x: Linear(32, use_bias=False).apply(params, x, True))
whole = run(params, x)
for spec in (("tensor", None), (None, "tensor")):  # the contraction is divided, or the outputs
    params["params"]["kernel"] = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, spec[0])))
        assert np.array_equal(run(params, placed), whole), spec
llava, params = llava_jax.load(sys.argv[1], mesh=mesh, quantize="int8", int8_activations=True)
requests = [(draw(held_out_scene(0, n)), json.loads(sys.argv[2])) for n in range(2)]
print(json.dumps(llava.generate_batch(params, requests, max_new_tokens=24)))
"""


@pytest.mark.long  # test_parallel.py has eight devices every day
def test_over_eight_devices(scenes_model, loaded):
    llava, params = loaded
    requests = [(draw(held_out_scene(0, n)), ASKED) for n in range(2)]
    wanted = llava.generate_batch(params, requests, max_new_tokens=24)
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(scenes_model), json.dumps(ASKED)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == wanted


# ---- asking for it


def test_kernels_must_be_int8(scenes_model, tmp_path, capsys):
    message = f"{scenes_model} has no int8 kernels for int8_activations: add quantize='int8' (--quantize int8)"
    ask = ["ask", "--model-path", str(scenes_model), "--query", "What?", "--int8-activations"]
    assert main(ask) == 1 and message in capsys.readouterr().err
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(dict(question_id=1, text="What?")))
    of_file = dict(model_path=str(scenes_model), question_file=str(questions), answers_file=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="has no int8 kernels"):
        prepare(EvaluateOptions(**of_file, int8_activations=True))
    assert main(["capacity", "--topology", "v5e-1", "--int8-activations"]) == 1
    assert "--int8-activations needs --quantize int8" in capsys.readouterr().err


def test_an_answers_id_says_so(scenes_model, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(dict(question_id=1, text="What?")))
    of_file = dict(model_path=str(scenes_model), question_file=str(questions), answers_file=str(tmp_path / "a.jsonl"))
    ids = {
        prepare(EvaluateOptions(**of_file, quantize="int8", int8_activations=int8)).file.questions[0].answer_id
        for int8 in (False, True)
    }
    assert len(ids) == 2


# ---- what it gains


def test_the_roofline_counts_them():
    config, shape = LlavaConfig.preset("1.6-vicuna-7b"), one_pool(1, 8, 2560, 16, 64, 128)
    usual, int8 = (works(config, shape, 1, Precision("int8", True, asked)) for asked in (False, True))
    faster = {
        name: int8[name].seconds(SLICES["v5e-1"].chip, 1) / usual[name].seconds(SLICES["v5e-1"].chip, 1)
        for name in usual
    }
    assert (
        0.5 < faster["prefill"] < 0.56 and 0.5 < faster["question"] < 0.62 and faster["step"] == faster["encode"] == 1
    )
    assert int8["prefill"].seconds(SLICES["v4-8"].chip, 1) == usual["prefill"].seconds(SLICES["v4-8"].chip, 1)


@pytest.mark.long  # a minute
def test_a_v5e_takes_less_time_to_prefill(no_tpu):
    """One layer of the 7B's widths, by libtpu's own estimate."""
    config, mesh = shallow(LlavaConfig.preset("1.6-vicuna-7b"), 1), slice_mesh(SLICES["v5e-1"], data=1)
    array = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    whole = partial(array, (1, 2560))
    tiles, text = array((0, 336, 336, 3), jnp.uint8), array((2560,), jnp.int32)
    batch = Batch(tiles, text, *map(whole, (jnp.int32, jnp.int32, bool)), array((1,), jnp.int32))
    modules = []
    for int8_activations in (False, True):
        model = LlavaLlamaForCausalLM(config, int8_activations=int8_activations)
        prefill = compile_for(
            mesh, jax.jit(partial(generate.prefill, model)), abstract_params(config, mesh, "int8"), batch
        )
        modules.append(parse(prefill.text))
        products = re.findall(r"= s32\[[^=]* convolution\(", prefill.text)
        assert len(products) == (7 if int8_activations else 0)
    usual, int8 = (estimated_cycles(module, module.entry) for module in modules)
    assert int8 < 0.8 * usual
