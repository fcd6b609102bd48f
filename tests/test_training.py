"""Ten steps of training against the original's, in float32; and what a run promises about being killed and resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import llava_jax
from llava_jax.checkpoint import load_config, load_params
from llava_jax.conversion.key_table import invert_transform, liuhaotian_rules, published_name
from llava_jax.inputs.batch import pack
from llava_jax.models.llava import LlavaLlamaForCausalLM
from llava_jax.training.lora import adapters, init_lora, merge_lora
from llava_jax.training.options import TrainOptions
from llava_jax.training.train import compiled_step, initial_state, make_batch, train, training_config

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import training_data  # noqa: E402


@pytest.fixture(scope="module")
def recorded():
    return np.load(GOLDEN / "training.npz")


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures):
    """plain → the JSON file of the recorded examples, or of the first few."""
    folder = tmp_path_factory.mktemp("training")

    def write(plain=False, count=None):
        path = folder / f"plain-{plain}-{count}.json"
        examples = training_data.examples(plain)[:count]
        for example in examples:
            if "image" in example:
                example["image"] = os.path.abspath(pictures[example["image"]])
        path.write_text(json.dumps(examples), encoding="utf-8")
        return str(path)

    return write


def options_of(run, model_path, data_path, output_dir="unused", **others):
    return TrainOptions(
        **training_data.SETTINGS,
        **run,
        model_path=str(model_path),
        data_path=data_path,
        output_dir=str(output_dir),
        per_device_train_batch_size=training_data.ROWS,
        model_max_length=4096,
        **others,
    )


def loaded(options, config, llava):
    """The recorded examples in their recorded order, a list for each step."""
    from llava_jax.training.data import load_example, load_examples
    from llava_jax.training.preprocess import training_tokenizer

    tokenizer, template = training_tokenizer(llava.tokenizer), options.version
    samples = [
        load_example(example, options.image_folder, config, tokenizer, template)
        for example in load_examples(options.data_path)
    ]
    return [samples[i : i + training_data.ROWS] for i in range(0, len(samples), training_data.ROWS)]


@pytest.mark.parametrize("name", training_data.RUNS)
def test_ten_steps_equal_the_references(name, recorded, model, converted, data):
    """Losses within 1e-4; every parameter within 1e-3 of its norm, on the values that are recorded."""
    variant, run = training_data.RUNS[name]
    options = options_of(run, converted(variant), data(run["version"] == "plain"))
    config, (llava, _) = training_config(options), model(variant)
    state, frozen = initial_state(options, config, None, training_data.STEPS)
    step = compiled_step(options, config, state, training_data.STEPS, None)
    losses, norms = [], []
    for samples in loaded(options, config, llava):
        batch = make_batch(samples, config, training_data.ROWS, 1, pad_id=0)
        state, metrics = step(state, frozen, *batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, recorded[f"{name}/loss"], atol=1e-4)
    if options.gradient_accumulation_steps == 1:
        np.testing.assert_allclose(norms, recorded[f"{name}/grad_norm"], rtol=2e-3)
    flat = flatten_dict(state.trained, sep="/")
    for path, x in flat.items():
        if path.endswith("k_proj/bias"):
            continue  # softmax takes no notice of it: its gradient is rounding, of which Adam makes whole steps
        published, transform = published_name(path, liuhaotian_rules(config))
        ours, theirs = invert_transform(transform, np.asarray(x)), f"{name}/{{}}/{published}"
        values = recorded[theirs.format("weight")]
        difference = np.linalg.norm(ours.ravel()[training_data.sampled(x.size)] - values)
        assert difference <= 1e-3 * np.linalg.norm(values), (path, difference / np.linalg.norm(values))
        np.testing.assert_allclose(np.linalg.norm(ours), recorded[theirs.format("norm")], rtol=1e-4, err_msg=path)


# ---- a whole run


def run_options(model_path, data_path, output_dir, **others):
    options = dict(
        stage="finetune", version="v1", max_steps=8, save_steps=2, dataloader_num_workers=0, learning_rate=1e-3
    )
    return TrainOptions(
        **options | others,
        model_path=str(model_path),
        data_path=data_path,
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, converted, data):
    """(options, output directory) of a run that nobody disturbed."""
    options = run_options(converted("llava15"), data(), tmp_path_factory.mktemp("runs") / "whole")
    return options, train(options)


def logged(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_checkpoint_that_answers_and_a_curve(finished, pictures):
    options, output = finished
    lines = logged(output)
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["loss"] < lines[0]["loss"] - 1
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    llava, params = llava_jax.load(output)
    assert llava.config.tokenizer_model_max_length == options.model_max_length
    assert isinstance(llava.generate(params, pictures["chelsea"], "Hello", max_new_tokens=4), str)
    before = load_params(options.model_path, load_config(options.model_path), dtype="float32")
    flat, old = flatten_dict(params, sep="/"), flatten_dict(before, sep="/")
    changed = {path.split("/")[0] for path in flat if not np.array_equal(flat[path], old[path])}
    assert changed == {"language_model", "mm_projector"}


def test_a_finished_run_is_not_trained_over(finished):
    with pytest.raises(FileExistsError, match="trained already"):
        train(finished[0])


SCRIPT = """
import json, sys
from llava_jax.inputs.batch import pack
from llava_jax.models.llava import LlavaLlamaForCausalLM
from llava_jax.training.lora import adapters, init_lora, merge_lora
from llava_jax.training.options import TrainOptions
from llava_jax.training.train import train
if __name__ == "__main__":
    train(TrainOptions(**json.loads(sys.argv[1])))
"""


def start(options, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    told = json.dumps(dataclasses.asdict(options))
    return subprocess.Popen([sys.executable, script, told], stderr=subprocess.PIPE, text=True)


def wait_for_lines(output, count, process):
    for _ in range(1200):
        if process.poll() is not None or ((output / "metrics.jsonl").exists() and len(logged(output)) >= count):
            return
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumed_gives_what_it_would_have_given(how, finished, tmp_path):
    """Killed somewhere after its third step, and started again: the same losses and the same weights, to the bit."""
    options, whole = finished
    output = tmp_path / "killed"
    options = dataclasses.replace(options, output_dir=str(output), dataloader_num_workers=1)
    process = start(options, tmp_path)
    wait_for_lines(output, 3, process)
    process.send_signal(how)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and not (output / "llava_jax.json").exists()
    if how == signal.SIGTERM:
        assert "saved after step" in errors
    train(options)
    assert [(x["step"], x["loss"]) for x in logged(output)] == [(x["step"], x["loss"]) for x in logged(whole)]
    ours, theirs = (flatten_dict(llava_jax.load(d)[1], sep="/") for d in (output, whole))
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_lora_trains_its_adapters_and_merges_them(converted, data, tmp_path, pictures):
    more = dict(stage="lora", lora_r=4, lora_alpha=8, lora_dropout=0.1, max_steps=3, warmup_ratio=0.0)
    output = train(run_options(converted("llava15"), data(count=2), tmp_path / "lora", **more))
    assert logged(output)[-1]["loss"] < logged(output)[0]["loss"]
    params = flatten_dict(llava_jax.load(output)[1], sep="/")
    before = flatten_dict(llava_jax.load(converted("llava15"))[1], sep="/")
    changed = {path for path in params if not np.array_equal(params[path], before[path])}
    assert {path.split("/")[-2] for path in changed if "layers_0" in path} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    kept = {path for path in changed if not path.startswith(("language_model/layers_", "mm_projector/"))}
    assert not kept and (output / "lora").is_dir()


def test_merged_adapters_give_what_adapters_beside_the_weights_gave(model):
    llava, params = model("llava15")
    lora = init_lora(params, 4, jax.random.key(0))
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.05, lora)
    batch = pack([np.arange(1, 9)], [np.arange(1, 9)], [], [], llava.config)
    hidden = partial(LlavaLlamaForCausalLM(llava.config, remat=True).apply, method="hidden")
    with adapters(lora, 2.0, 0.0, None):
        beside = hidden({"params": params}, batch)
    merged = hidden({"params": merge_lora(params, lora, 2.0)}, batch)
    np.testing.assert_allclose(beside[:, :8], merged[:, :8], atol=2e-5)
    assert np.abs(merged - hidden({"params": params}, batch))[:, :8].max() > 0.01


def test_pretrain_gives_a_projector_to_start_from(converted, data, tmp_path):
    first = train(
        run_options(converted("llava15"), data(True), tmp_path / "1", stage="pretrain", version="plain", max_steps=2)
    )
    options = run_options(converted("llava15"), data(), tmp_path / "2", pretrain_mm_mlp_adapter=str(first))
    state, _ = initial_state(options, training_config(options), None, 8)
    projector = flatten_dict(llava_jax.load(first)[1]["mm_projector"], sep="/")
    taken = flatten_dict(state.trained["mm_projector"], sep="/")
    assert all(np.array_equal(taken[path], projector[path]) for path in projector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stage="sft"), "--stage sft is none of pretrain, finetune, lora"),
        (dict(version="nobody"), "--version nobody"),
        (dict(learning_rate=0.0), "learning_rate 0.0 must be above 0"),
        (dict(mesh=(("model", 2),)), "model is none of data, fsdp, tensor"),
        (dict(max_steps=0), "max_steps 0"),
        (dict(warmup_ratio=1.5), "warmup_ratio 1.5"),
    ],
)
def test_wrong_options_are_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        run_options("somewhere", "data.json", "out", **change)


def test_another_run_in_the_same_place_is_refused(finished, tmp_path):
    options = dataclasses.replace(finished[0], output_dir=str(tmp_path / "run"), max_steps=100)
    from llava_jax.training.output import claim_output

    claim_output(options)
    claim_output(dataclasses.replace(options, save_steps=7))
    with pytest.raises(FileExistsError, match=r"learning_rate was 0\.001"):
        claim_output(dataclasses.replace(options, learning_rate=1.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="not a training run"):
        claim_output(dataclasses.replace(options, output_dir=str(tmp_path / "other")))


PARALLEL = """
import json, sys
import jax
from llava_jax.inputs.batch import pack
from llava_jax.models.llava import LlavaLlamaForCausalLM
from llava_jax.training.lora import adapters, init_lora, merge_lora
from llava_jax.training.options import TrainOptions
from llava_jax.training.train import train
if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    told["mesh"] = tuple(map(tuple, told["mesh"]))
    train(TrainOptions(**told))
    assert len(jax.devices()) == 8
"""


def test_eight_devices_train_as_one_does(converted, data, tmp_path):
    """Rows over data and fsdp, weights and moments over fsdp and tensor: losses within 1e-5 of one device's."""
    whole, divided = (
        run_options(converted("llava15"), data(), tmp_path / name, max_steps=4, learning_rate=1e-4)
        for name in ("one", "eight")
    )
    whole = dataclasses.replace(whole, per_device_train_batch_size=4)
    mesh = (("data", 2), ("fsdp", 2), ("tensor", 2))
    divided = dataclasses.replace(divided, per_device_train_batch_size=1, mesh=mesh)
    train(whole)
    script = tmp_path / "run.py"
    script.write_text(PARALLEL)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, script, json.dumps(dataclasses.asdict(divided))]
    subprocess.run(command, env={**os.environ, **flags}, check=True)
    ours, theirs = ([line["loss"] for line in logged(o.output_dir)] for o in (divided, whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
