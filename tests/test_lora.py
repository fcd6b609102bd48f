"""LoRA's adapters against peft's: which layers have them, how they start, their dropout, what they are merged into."""

import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_training import GOLDEN, reference_name, training_data

from llava_jax.conversion.key_table import invert_transform, liuhaotian_rules
from llava_jax.inputs.batch import pack
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.training.lora import adapters, init_lora, merge_lora
from llava_jax.training.optimizer import split_params, trainable_pattern
from llava_jax.training.step import LORA

VARIANT, RUN = training_data.RUNS["lora"]
TOWER = "model.vision_tower."


@pytest.fixture(scope="module")
def recorded():
    """What the original's LoRA run left, without the run's name."""
    with np.load(GOLDEN / "training.npz") as file:
        return {key.removeprefix("lora/"): file[key] for key in file if key.startswith("lora/")}


@pytest.fixture(scope="module")
def begun(model):
    """(config, parameters, adapters as a run begins with them)"""
    llava, params = model(VARIANT)
    return llava.config, params, init_lora(params, RUN["lora_r"], jax.random.key(0))


def test_the_layers_with_adapters_and_what_else_is_trained(begun, recorded):
    config, params, lora = begun
    trained, _ = split_params(params, trainable_pattern("lora", config))
    rules = liuhaotian_rules(config)
    ours = {reference_name(path, rules)[0] for path in flatten_dict({**trained, LORA: lora}, sep="/")}
    theirs = {key.removeprefix("weight/") for key in recorded if key.startswith("weight/")}
    assert ours == {name for name in theirs if not name.startswith(TOWER)}
    adapted = {name.split(".")[-3] for name in ours if "lora_" in name}
    assert adapted == set(json.loads(str(recorded["linear_names"])))
    # peft finds the tower's q, k and v by their names too; under its no_grad they never change, and add nothing
    inert = [name for name in theirs if name.startswith(TOWER) and "lora_B" in name]
    assert inert and not any(recorded[f"weight/{name}"].any() for name in inert)


def test_adapters_begin_as_pefts_do(begun, recorded):
    """A is uniform within 1 / sqrt(inputs), B is zero."""
    config, _, lora = begun
    ours, theirs = [], []
    for path, x in flatten_dict({LORA: lora}, sep="/").items():
        assert x.dtype == jnp.float32
        if path.endswith("/b"):
            assert not x.any()
            continue
        drawn = recorded[f"start/{reference_name(path, liuhaotian_rules(config))[0]}"]
        assert x.shape == drawn.shape[::-1]
        for values, one in ((ours, x), (theirs, drawn)):
            values.append(np.ravel(one) * x.shape[0] ** 0.5)
    ours, theirs = (np.sort(np.concatenate(values)) for values in (ours, theirs))
    assert np.abs(ours).max() <= 1 and np.abs(ours - theirs).max() < 0.03  # about 10,000 values of each


def test_adapters_are_merged_as_peft_merges_them(begun, recorded):
    config, params, lora = begun
    rules, flat = liuhaotian_rules(config), flatten_dict({LORA: lora}, sep="/")
    for path in flat:
        published, transform = reference_name(path, rules)
        if published.startswith(training_data.MERGED):
            flat[path] = invert_transform(transform, recorded[f"last/{published}"])
    merged = merge_lora(params, unflatten_dict(flat, sep="/")[LORA], RUN["lora_alpha"] / RUN["lora_r"])
    before, after = (flatten_dict(tree, sep="/") for tree in (params, merged))
    kernels = {
        path: reference_name(path, rules) for path in before if re.match(r"language_model/layers_1/.*_proj", path)
    }
    assert {f"merged/{name}" for name, _ in kernels.values()} == {key for key in recorded if key.startswith("merged/")}
    for path, (published, transform) in kernels.items():
        ours = invert_transform(transform, np.asarray(after[path])).ravel()
        np.testing.assert_allclose(
            ours[training_data.sampled(ours.size)], recorded[f"merged/{published}"], atol=1e-6, err_msg=path
        )
        assert np.abs(after[path] - before[path]).max() > 1e-3


def test_merged_adapters_give_what_adapters_beside_the_weights_gave(model):
    llava, params = model("llava15")
    lora = init_lora(params, 4, jax.random.key(0))
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.05, lora)
    batch = pack([np.arange(1, 9)], [], llava.config)
    hidden = partial(LlavaLlamaForCausalLM(llava.config, remat=True).apply, method="hidden")
    with adapters(lora, 2.0, 0.0, None):
        beside = hidden({"params": params}, batch)
    merged = hidden({"params": merge_lora(params, lora, 2.0)}, batch)
    np.testing.assert_allclose(beside[:, :8], merged[:, :8], atol=2e-5)
    assert np.abs(merged - hidden({"params": params}, batch))[:, :8].max() > 0.01


# ---- dropout


class TwoProjections(nn.Module):
    """Two linear layers of 32 inputs, side by side."""

    @nn.compact
    def __call__(self, x):
        return [nn.Dense(32, use_bias=False, name=name)(x) for name in ("q_proj", "k_proj")]


def test_dropout_is_pefts():
    """lora_B(lora_A(dropout(x))) * scaling: on the adapter's input alone, scaled up, for each layer, row and column."""
    one, rate, scale = jnp.eye(32), 0.25, 2.0
    x = 1 + jax.random.uniform(jax.random.key(0), (4, 400, 32))
    params = {"params": {name: {"kernel": 3 * one} for name in ("q_proj", "k_proj")}}
    lora = {name: {"a": one, "b": one} for name in ("q_proj", "k_proj")}

    def added(dropout, key):
        with adapters(lora, scale, dropout, key):
            return [np.asarray(out - 3 * x) / np.asarray(x) for out in TwoProjections().apply(params, x)]

    both = [added(rate, jax.random.key(1)), added(rate, jax.random.key(2))]
    outs = [out for outs in both for out in outs]
    for out in outs:
        kept = np.abs(out) > 1e-5
        np.testing.assert_allclose(out[kept], scale / (1 - rate), rtol=1e-5)
        sigma = (rate * (1 - rate) / kept.size) ** 0.5
        assert abs(kept.mean() - (1 - rate)) < 5 * sigma
        for axis in ((0, 1), (2,)):  # neither whole columns nor whole rows
            share, width = kept.mean(axis), (rate * (1 - rate) * kept.mean(axis).size / kept.size) ** 0.5
            assert np.abs(share - (1 - rate)).max() < 6 * width
    for i in range(4):
        for j in range(i):  # another layer or another step has its own mask
            together = ((np.abs(outs[i]) > 1e-5) & (np.abs(outs[j]) > 1e-5)).mean()
            assert abs(together - (1 - rate) ** 2) < 0.01
    for undropped in (added(rate, None), added(0.0, jax.random.key(1))):
        np.testing.assert_allclose(undropped, scale, rtol=1e-5)
