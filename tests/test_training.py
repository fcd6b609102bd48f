"""Ten steps of training against the original's, in float32; and what a run promises about being killed and resumed."""

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import llava_jax
from llava_jax.checkpoint import fingerprint, load_config, load_params
from llava_jax.conversion import checksums
from llava_jax.conversion.key_table import invert_transform, liuhaotian_rules, published_name
from llava_jax.parallel import multihost
from llava_jax.training.optimizer import make_optimizer
from llava_jax.training.output import check_output, claim_output, read_projector
from llava_jax.training.step import LORA
from llava_jax.training.train import compiled_step, initial_state, make_batch, train, training_config
from llava_jax.training.train_options import TrainOptions

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import training_data  # noqa: E402


@pytest.fixture(scope="module")
def recorded():
    return np.load(GOLDEN / "training.npz")


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures):
    """The JSON file of the recorded examples."""
    folder = tmp_path_factory.mktemp("training")

    def write(plain=False):
        path = folder / f"{plain}.json"
        examples = training_data.examples(plain)
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


def reference_name(path, rules):
    """The original's name of a trained parameter, or peft's of an adapter's, and the transform to invert."""
    if not path.startswith(f"{LORA}/"):
        return published_name(path, rules)
    layer, matrix = path.removeprefix(f"{LORA}/").rsplit("/", 1)
    kernel, transform = published_name(f"{layer}/kernel", rules)
    return kernel.replace("weight", f"lora_{matrix.upper()}.weight"), transform


def with_recorded_adapters(state, recorded, rules):
    """The state with the first adapters that peft drew."""
    flat = flatten_dict(state.trained[LORA], sep="/")
    for path in [path for path in flat if path.endswith("/a")]:
        flat[path] = jnp.asarray(recorded[f"lora/start/{reference_name(f'{LORA}/{path}', rules)[0]}"].T)
    return state.replace(trained={**state.trained, LORA: unflatten_dict(flat, sep="/")})


DAILY = "tower"  # every parameter is trained


@pytest.mark.parametrize(
    "name", [name if name == DAILY else pytest.param(name, marks=pytest.mark.long) for name in training_data.RUNS]
)
def test_ten_steps_equal_the_references(name, recorded, model, converted, data, monkeypatch):
    """Losses within 1e-4; every parameter within 1e-3 of its norm, on the values that are recorded.

    A step compiles in 9 s for each shape of a batch, of which a run has two to four; but one where pictures are padded:
    every batch has room for the largest, as if another process had that one.
    """
    variant, run = training_data.RUNS[name]
    options = options_of(run, converted(variant), data(run["version"] == "plain"))
    config, (llava, _) = training_config(options), model(variant)
    optimizer = make_optimizer(options, training_data.STEPS // options.gradient_accumulation_steps)
    state, frozen = initial_state(options, config, None, optimizer)
    rules = liuhaotian_rules(config)
    if name == "lora":
        state = with_recorded_adapters(state, recorded, rules)
    step = compiled_step(options, config, state, optimizer, None)
    losses, norms, steps, rooms = [], [], loaded(options, config, llava), []
    if config.image_aspect_ratio == "pad":
        monkeypatch.setattr(multihost, "allgather_max", lambda room: rooms.append(room) or room)
        for samples in steps:
            make_batch(samples, config, training_data.ROWS, 1, pad_id=0)
        monkeypatch.setattr(multihost, "allgather_max", lambda room: np.max(rooms, 0).tolist())
    for samples in steps:
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
        published, transform = reference_name(path, rules)
        ours, theirs = invert_transform(transform, np.asarray(x)), f"{name}/{{}}/{published}"
        values = recorded[theirs.format("weight")]
        difference = np.linalg.norm(ours.ravel()[training_data.sampled(x.size)] - values)
        assert difference <= 1e-3 * np.linalg.norm(values), (path, difference / np.linalg.norm(values))
        np.testing.assert_allclose(np.linalg.norm(ours), recorded[theirs.format("norm")], rtol=1e-4, err_msg=path)


# ---- a whole run


def run_options(model_path, data_path, output_dir, **others):
    options = dict(
        stage="finetune", version="v1", max_steps=6, save_steps=2, dataloader_num_workers=0, learning_rate=1e-3
    )
    return TrainOptions(
        **options | others,
        model_path=str(model_path),
        data_path=str(data_path),
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
    )


@pytest.fixture(scope="module")
def small_options(small_training):
    """Of a run of the small model."""
    model, folder = small_training
    return functools.partial(run_options, model, folder / "data.json", image_folder=str(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_options):
    """(options, output directory) of a run that nobody disturbed."""
    options = small_options(tmp_path_factory.mktemp("runs") / "whole")
    return options, train(options)


def logged(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_checkpoint_that_answers_and_a_curve(finished, pictures):
    options, output = finished
    lines = logged(output)
    assert [line["step"] for line in lines] == list(range(1, 7)) and lines[-1]["loss"] < lines[0]["loss"] - 1
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    llava, params = llava_jax.load(output)
    assert llava.config.tokenizer_model_max_length == options.model_max_length
    assert load_config(options.model_path).conv_mode != llava.config.conv_mode == options.version
    assert isinstance(llava.generate(params, pictures["chelsea"], "Hello", max_new_tokens=4), str)
    before = load_params(options.model_path, load_config(options.model_path), dtype="float32")
    flat, old = flatten_dict(params, sep="/"), flatten_dict(before, sep="/")
    changed = {path.split("/")[0] for path in flat if not np.array_equal(flat[path], old[path])}
    assert changed == {"language_model", "mm_projector"}
    assert checksums.check(output) == []
    assert fingerprint(output) != fingerprint(options.model_path)


def test_a_finished_run_is_not_trained_over(finished):
    with pytest.raises(FileExistsError, match="trained already"):
        train(finished[0])


KILLED = """
import json, os, sys
if __name__ == "__main__":
    from llava_jax.training.train_options import TrainOptions
    from llava_jax.training.output import Metrics
    from llava_jax.training.train import train

    options, step, how = map(json.loads, sys.argv[1:])
    add = Metrics.add

    def add_and_die(metrics, number, values):
        add(metrics, number, values)
        if number == step:
            os.kill(os.getpid(), how)

    Metrics.add = add_and_die
    train(TrainOptions(**options))
"""


def killed(options, script, step, how):
    """What the run says that gets a signal once its step is made, and before its state is saved."""
    script.write_text(KILLED)
    told = map(json.dumps, (dataclasses.asdict(options), step, how))
    done = subprocess.run([sys.executable, script, *told], stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode != 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("how, step", [(signal.SIGKILL, 4), pytest.param(signal.SIGTERM, 3, marks=pytest.mark.long)])
def test_a_killed_run_resumed_gives_what_it_would_have_given(how, step, finished, tmp_path):
    """Killed, and started again: the same losses and the same weights, to the bit."""
    options, whole = finished
    output = tmp_path / "killed"
    options = dataclasses.replace(options, output_dir=str(output), dataloader_num_workers=1)
    errors = killed(options, tmp_path / "run.py", step, how)
    assert not (output / "llava_jax.json").exists()
    steps = [line["step"] for line in logged(output)]
    if how == signal.SIGTERM:
        assert "saved after step 3" in errors and steps == [1, 2, 3]
    else:
        assert steps == [1, 2, 3]  # of which two at most are in a saved state
    train(options)
    assert [(x["step"], x["loss"]) for x in logged(output)] == [(x["step"], x["loss"]) for x in logged(whole)]
    ours, theirs = (flatten_dict(llava_jax.load(d)[1], sep="/") for d in (output, whole))
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_lora_trains_its_adapters_and_merges_them(small_options, tmp_path):
    more = dict(stage="lora", lora_r=4, lora_alpha=8, lora_dropout=0.1, max_steps=3, warmup_ratio=0.0)
    options = small_options(tmp_path / "lora", **more)
    output = train(options)
    assert logged(output)[-1]["loss"] < logged(output)[0]["loss"]
    params = flatten_dict(llava_jax.load(output)[1], sep="/")
    before = flatten_dict(llava_jax.load(options.model_path)[1], sep="/")
    changed = {path for path in params if not np.array_equal(params[path], before[path])}
    assert {path.split("/")[-2] for path in changed if "layers_0" in path} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    kept = {path for path in changed if not path.startswith(("language_model/layers_", "mm_projector/"))}
    assert not kept and (output / "lora").is_dir()


def test_pretrain_gives_a_projector_to_start_from(small_options, tmp_path):
    first = train(small_options(tmp_path / "1", stage="pretrain", version="plain", max_steps=2))
    options = small_options(tmp_path / "2", pretrain_mm_mlp_adapter=str(first))
    state, _ = initial_state(options, training_config(options), None, make_optimizer(options, 8))
    projector = flatten_dict(llava_jax.load(first)[1]["mm_projector"], sep="/")
    taken = flatten_dict(state.trained["mm_projector"], sep="/")
    assert all(np.array_equal(taken[path], projector[path]) for path in projector)


def test_a_projector_is_read_from_the_originals_stage_1_file(model, tmp_path):
    import torch

    (llava, params), file = model("llava15"), tmp_path / "mm_projector.bin"
    rules, rng = liuhaotian_rules(llava.config), np.random.default_rng(0)
    drawn = {path: rng.random(x.shape, np.float32) for path, x in flatten_dict(params["mm_projector"], sep="/").items()}
    tensors = {}
    for path, x in drawn.items():
        name, transform = published_name(f"mm_projector/{path}", rules)
        tensors[name] = torch.tensor(np.ascontiguousarray(invert_transform(transform, x)))
    torch.save(tensors, file)
    taken = flatten_dict(read_projector(str(file), llava.config, params)["mm_projector"], sep="/")
    assert taken.keys() == drawn.keys() and all(np.array_equal(taken[path], drawn[path]) for path in drawn)
    torch.save({name: x for name, x in tensors.items() if "bias" not in name}, file)
    with pytest.raises(ValueError, match=r"mm_projector\.bin.*\n.*no key sets"):
        read_projector(str(file), llava.config, params)


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
    check_output(options)
    claim_output(options)
    check_output(dataclasses.replace(options, save_steps=7))
    with pytest.raises(FileExistsError, match=r"learning_rate was 0\.001"):
        check_output(dataclasses.replace(options, learning_rate=1.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="not a training run"):
        check_output(dataclasses.replace(options, output_dir=str(tmp_path / "other")))


PARALLEL = """
import json, sys
import jax
from llava_jax.training.train_options import TrainOptions
from llava_jax.training.train import train
if __name__ == "__main__":
    told, address, processes, number = map(json.loads, sys.argv[1:])
    if processes > 1:
        jax.distributed.initialize(address, processes, number)
    told["mesh"] = tuple(map(tuple, told["mesh"]))
    train(TrainOptions(**told))
    assert len(jax.devices()) == 8
"""


@pytest.fixture(scope="module")
def by_one_device(converted, data, small_options, tmp_path_factory):
    """The options of a short run of four rows a step, which has been made: of one shape, or of several."""

    @functools.cache
    def run(shapes):
        output, more = tmp_path_factory.mktemp("runs") / shapes, dict(max_steps=4, learning_rate=1e-4)
        if shapes == "several":
            # In this seed's order one step's first half has no picture: two processes must agree on the larger shapes.
            options = run_options(converted("llava15"), data(), output, seed=48, **more)
        else:
            options = small_options(output, **more)
        train(options := dataclasses.replace(options, per_device_train_batch_size=4))
        return options

    return run


@pytest.mark.long  # test_train_aot.py compiles a step for a mesh every day
@pytest.mark.parametrize("processes, shapes", [(1, "one"), (2, "several")])
def test_eight_devices_train_as_one_does(by_one_device, tmp_path, processes, shapes):
    """Rows over data and fsdp, weights and moments over fsdp and tensor: losses within 1e-5 of one device's. The
    devices are those of one process, or of two, each of which loads its own rows."""
    undivided = by_one_device(shapes)
    mesh = (("data", 2), ("fsdp", 2), ("tensor", 2))
    divided = dataclasses.replace(
        undivided, per_device_train_batch_size=1, mesh=mesh, output_dir=str(tmp_path / "eight")
    )
    script = tmp_path / "run.py"
    script.write_text(PARALLEL)
    flags = {"JAX_NUM_CPU_DEVICES": str(8 // processes), "JAX_PLATFORMS": "cpu"}
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    told = [json.dumps(value) for value in (dataclasses.asdict(divided), address, processes)]
    started = [
        subprocess.Popen([sys.executable, script, *told, str(number)], env={**os.environ, **flags})
        for number in range(processes)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
    assert checksums.check(divided.output_dir) == []  # one process read back what both wrote
    ours, theirs = ([line["loss"] for line in logged(o.output_dir)] for o in (divided, undivided))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    one, eight = (flatten_dict(llava_jax.load(o.output_dir)[1], sep="/") for o in (undivided, divided))
    differences = {path: np.linalg.norm(eight[path] - x) / np.linalg.norm(x) for path, x in one.items()}
    assert max(differences[path] for path in one if "k_proj/bias" not in path) < 1e-3
