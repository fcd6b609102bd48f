"""What a run makes of damage: to its saved states, to its data while it is stopped, to a picture that only decoding
shows, and of numbers that are not finite."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import llava_jax
from llava_jax.training.data import sample_order
from llava_jax.training.output import Metrics, write_result
from llava_jax.training.states import States, survey
from llava_jax.training.train import train, training_config
from llava_jax.training.train_options import TrainOptions

# ---- states on the disk

STATE = {
    "a": jnp.arange(50_000.0),
    "b": {"c": jnp.ones((70, 30), jnp.bfloat16), "step": jnp.int32(3)},
    "d": jnp.ones(()),
}


def state_of(step):
    return STATE | {"d": jnp.float32(step)}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A directory with the states of three steps."""
    directory = tmp_path_factory.mktemp("states") / "checkpoints"
    with States(directory, keep=3) as states:
        for step in (1, 2, 3):
            states.save(step, state_of(step))
    return directory


@pytest.fixture
def saved(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "run" / "checkpoints"))


def newest(directory):
    with States(directory, keep=3) as states:
        return float(states.newest(state_of(0))["d"])


def largest(step):
    return max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


def cut(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])


DAMAGES = {
    "the largest file is removed": lambda step: largest(step).unlink(),
    "emptied": lambda step: cut(largest(step), 0),
    "halved": lambda step: cut(largest(step), 0.5),
    "a flipped bit": lambda step: flip(largest(step)),
    "no metadata": lambda step: (step / "state" / "_METADATA").unlink(),
    "damaged metadata": lambda step: (step / "state" / "_METADATA").write_text("{"),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "a stranger in its place": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_state_is_gone_on_from(saved, damage, capfd):
    DAMAGES[damage](saved / "3")
    assert newest(saved) == 2
    said = capfd.readouterr().err.strip()
    assert said.startswith("the state of step 3 c") and said.endswith("damaged-3, going on from step 2"), said
    assert said.count("\n") == 0 and "Traceback" not in said
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"] and (saved.parent / "damaged-3").is_dir()
    with States(saved, keep=2) as states:  # the run goes on, over the same steps
        states.newest(state_of(0))
        states.save(3, state_of(3.5))
    assert newest(saved) == 3.5


def test_strangers_among_the_states_are_left_alone(saved, capfd):
    (saved / "notes.txt").write_text("mine")
    (saved / "old").mkdir()
    (saved / "9").write_text("no directory")
    assert newest(saved) == 3 and (saved / "notes.txt").exists() and (saved / "old").is_dir()
    (saved / "9").unlink()
    (saved / "9").mkdir()
    assert newest(saved) == 3 and (saved.parent / "damaged-9").is_dir()


def test_without_a_whole_state_there_is_one_line(saved, capfd):
    for step in "123":
        flip(largest(saved / step))
    with pytest.raises(
        ValueError, match=r"checkpoints: no saved state is whole \(that of step 3: .*to start anew$"
    ) as e:
        newest(saved)
    assert "\n" not in str(e.value) and all((saved / step).is_dir() for step in "123")  # nothing is thrown away
    shutil.rmtree(saved)
    assert newest(saved) == 0


def test_what_is_not_finite_is_not_saved(tmp_path):
    with States(tmp_path / "checkpoints", keep=1) as states:
        states.save(1, state_of(1))
        for bad in (jnp.nan, jnp.inf):
            with pytest.raises(ValueError, match="parameters after step 2 are not finite, and are not saved"):
                states.save(2, STATE | {"d": bad * jnp.ones(3)})
    assert newest(tmp_path / "checkpoints") == 1


def test_every_bit_is_in_the_checksum():
    array = np.random.default_rng(0).random((5, 7), np.float32)
    want = survey([array]).checksums
    for place in np.ndindex(5, 7):
        for bit in (0, 13, 31):
            other = array.copy()
            other.view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert survey([other]).checksums != want
    swapped = array[::-1]
    assert survey([swapped]).checksums != want and survey([array.copy()]).checksums == want


# ---- whole runs, of a model so small that it compiles in seconds


@pytest.fixture(scope="module")
def start(small_training, tmp_path_factory):
    """(the checkpoint, a folder with eight pictures and data.json), to change."""
    model, folder = small_training
    root = shutil.copytree(folder, tmp_path_factory.mktemp("small") / "training")
    return root / model.relative_to(folder), root


def options_of(start, output, **changes):
    model, root = start
    options = dict(learning_rate=1e-3, max_steps=5, save_steps=2, save_total_limit=2, dataloader_num_workers=0, seed=1)
    places = dict(model_path=model, data_path=root / "data.json", image_folder=root, output_dir=output)
    return TrainOptions(**options | places | changes, per_device_train_batch_size=2)


def losses(output):
    return [(line["step"], line["loss"]) for line in map(json.loads, (output / "metrics.jsonl").open())]


def test_a_damaged_picture_stops_after_saving_and_the_run_goes_on_once_it_is_mended(start, tmp_path):
    """Three runs; some 20 seconds."""
    model, root = start
    whole = train(options_of(start, tmp_path / "whole"))
    damaged = f"{sample_order(8, seed=1, epoch=0)[7]}.png"
    folder = Path(shutil.copytree(root, tmp_path / "pictures", ignore=shutil.ignore_patterns("m", "published")))
    data = bytearray((root / damaged).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)  # its header and its end are as they were
    (folder / damaged).write_bytes(data)
    options = options_of((model, folder), tmp_path / "run", dataloader_num_workers=1)
    with pytest.raises(ValueError, match=rf"^sample id='\d' .*{damaged}' is damaged.*; saved after step 3, "):
        train(options)
    assert len(losses(tmp_path / "run")) == 3 and (tmp_path / "run" / "checkpoints" / "3").is_dir()

    # While it is stopped, nothing that it depends on may change, but for the pictures.
    changes = {"data_path": folder / "data.json", "model_path/config.json": model / "config.json"}
    for name, file in changes.items():
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        with pytest.raises(FileExistsError, match=f"began with other contents of {name}; restore what was there"):
            train(options)
        file.write_bytes(before)

    (folder / damaged).write_bytes((root / damaged).read_bytes())
    train(dataclasses.replace(options, dataloader_num_workers=0))
    assert losses(tmp_path / "run") == losses(whole)
    ours, theirs = (flatten_dict(llava_jax.load(output)[1], sep="/") for output in (tmp_path / "run", whole))
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_a_run_that_diverges_leaves_its_last_finite_state(start, tmp_path):
    """Whatever is logged. Some 8 seconds."""
    options = options_of(
        start, tmp_path / "run", learning_rate=1e38, warmup_ratio=0.0, logging_steps=1000, save_steps=1
    )
    with pytest.raises(ValueError, match=r"(after|of) step \d (is|are) (nan|inf|not finite)"):
        train(options)
    assert not (tmp_path / "run" / "llava_jax.json").exists()


def test_every_step_is_watched_whether_it_is_logged_or_not(start, tmp_path):
    options = options_of(start, tmp_path / "run", logging_steps=1000)
    (tmp_path / "run").mkdir()
    for name, values in (("loss", dict(loss=np.nan, grad_norm=1.0)), ("grad_norm", dict(loss=1.0, grad_norm=np.inf))):
        with pytest.raises(ValueError, match=f"the {name} of step 2 is"):
            with Metrics(options, 0) as metrics:
                metrics.add(1, dict(loss=1.0, grad_norm=1.0))
                metrics.add(2, values)
                metrics.add(3, dict(loss=1.0, grad_norm=1.0))


def test_a_result_that_is_not_finite_is_not_written(start, tmp_path):
    options = options_of(start, tmp_path / "run")
    with pytest.raises(ValueError, match="trained parameters are not finite"):
        write_result(options, training_config(options), {"a": jnp.array([1.0, jnp.nan])}, {"b": jnp.ones(2)})
    assert not (tmp_path / "run").exists()


def test_a_torn_or_odd_line_of_metrics_is_dropped(start, tmp_path):
    options = options_of(start, tmp_path / "run")
    (tmp_path / "run").mkdir()
    odd = ['{"step": 1, "loss": 2.0}', "[1]", '{"loss": 1.0}', '{"step": "2", "loss": 1.0}', '{"step": 3, "lo']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(odd))
    with Metrics(options, 9):
        pass
    assert losses(tmp_path / "run") == [(1, 2.0)]


def test_a_run_that_cannot_count_its_steps_is_refused(start, tmp_path):
    with pytest.raises(ValueError, match=r"steps are too many; lower --num_train_epochs"):
        train(options_of(start, tmp_path / "run", max_steps=-1, num_train_epochs=1e30))
    assert not (tmp_path / "run").exists()


def test_too_many_samples_without_labels_stop_before_anything_is_written(start, tmp_path):
    _, root = start
    examples = json.loads((root / "data.json").read_text())
    examples[3]["conversations"][1]["value"] = ""
    (tmp_path / "data.json").write_text(json.dumps(examples))
    with pytest.raises(ValueError, match=r"12.5% .*--max_unlabelled_ratio lets 1.0% pass; .*\n.*: 1: id='3'"):
        train(options_of(start, tmp_path / "run", data_path=tmp_path / "data.json"))
    assert not (tmp_path / "run").exists()
