"""What stops a run before its first step: options, samples, pictures' files, and samples that have nothing to learn."""

import json
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image
from test_train_data import CONFIG, TOKENIZER, sample

from llava_jax.training.checks import check_examples, check_labels
from llava_jax.training.data import load_example, load_examples
from llava_jax.training.preprocess import training_tokenizer
from llava_jax.training.train_options import TrainOptions

CHECKED = training_tokenizer(TOKENIZER)
PLACES = dict(model_path="model", data_path="data.json", output_dir="out")


# ---- options


@pytest.mark.parametrize("name", [field.name for field in fields(TrainOptions) if field.metadata["range"]])
def test_no_number_may_be_infinite_or_none(name):
    for value in (float("nan"), float("inf"), -float("inf"), np.float32("nan"), 10**400, -2, "1", True, [1]):
        with pytest.raises(ValueError, match=f"^--{name} .* must be") as error:
            TrainOptions(**PLACES, **{name: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rate=1e39), "finite"),  # not in float32
        (dict(seed=2**32), "at most 4,294,967,295"),
        (dict(lora_r=2.5), "of type int"),
        (dict(bf16="false"), "--bf16 'false' must be of type bool"),
        (dict(image_folder=3), "--image_folder 3 must be of type str"),
        (dict(mesh="data"), "--mesh 'data' is not like data=2"),
        (dict(mesh=(("data", 2), ("data", 4))), "is not like data=2"),
        (dict(mesh=(("data", 0),)), "is not like data=2"),
    ],
)
def test_values_of_another_kind_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**PLACES, **change)


def test_numpys_numbers_and_paths_are_taken(tmp_path):
    given = dict(seed=np.int64(3), learning_rate=np.float64(0.1), bf16=np.True_, mm_projector_lr=0, mesh=[["data", 2]])
    options = TrainOptions(**PLACES | given | dict(data_path=tmp_path))
    told = json.loads(json.dumps(vars(options)))
    assert told["seed"] == 3 and told["learning_rate"] == 0.1 and told["bf16"] is True
    assert options.mesh == (("data", 2),) and options.data_path == str(tmp_path)
    assert all(field.metadata["range"] for field in fields(TrainOptions) if str(field.type)[:3] in ("int", "flo"))


# ---- samples and their pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """whole.{png,jpg,gif,webp}, a JPEG with bytes after its end, and each way to be no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    for kind in ("png", "jpg", "gif", "webp", "bmp"):
        picture.save(folder / f"whole.{kind}")
        (folder / f"cut.{kind}").write_bytes((folder / f"whole.{kind}").read_bytes()[:-300])
    (folder / "longer.jpg").write_bytes((folder / "whole.jpg").read_bytes() + b"more")
    (folder / "folder.jpg").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture\n" * 9)
    return folder


def problems(examples, folder, template="v1"):
    with pytest.raises(ValueError) as error:
        check_examples(examples, folder, template)
    return str(error.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp"])
def test_a_file_that_is_cut_off_is_found_and_a_whole_one_passes(folder, kind):
    assert check_examples([sample("<image>", "B", image=f"whole.{kind}")], folder, "v1") == {f"whole.{kind}": (60, 40)}
    said = problems([sample("<image>", "B", image=f"cut.{kind}", id="x")], folder)
    assert f"or damaged: 1: id='x' (number 0) 'cut.{kind}'" in said


def test_files_that_are_no_pictures_are_found_together(folder):
    check_examples([sample("<image>", "B", image="longer.jpg")], folder, "v1")
    names = ["empty.jpg", "text.jpg", "folder.jpg", "none.jpg", "", "a\0b.jpg", "\ud83d.jpg", "../out.jpg"]
    said = problems([sample("<image>", "B", image=name) for name in names], folder)
    assert "no picture, or damaged: 2: id=None (number 0) 'empty.jpg', id=None (number 1) 'text.jpg'" in said
    assert "missing image file: 5: id=None (number 2) 'folder.jpg'" in said
    assert "out of the image folder, which only an absolute path may name: 1: id=None (number 7) '../out.jpg'" in said
    inside = [sample("<image>", "B", image=name) for name in (str(folder / "whole.png"), "folder.jpg/../whole.png")]
    check_examples(inside, folder, "v1")


def test_a_name_out_of_the_folder_is_not_loaded(folder):
    with pytest.raises(ValueError, match="leads out of the image folder"):
        load_example(sample("<image>", "B", image="../out.jpg"), folder, CONFIG, CHECKED, "v1")


def test_half_a_character_anywhere_is_named(folder):
    samples = [sample("A", "B", "C\ud83d", "D", id="x"), sample("A", "\udc80", id="y"), sample("👩‍👩‍👧", "B")]
    assert "half a character, which cannot be encoded: 2: id='x' (number 0), id='y' (number 1)\n" in (
        problems([*samples, sample("")], folder)
    )


def test_an_image_in_the_turn_that_is_left_out(folder):
    """The first turn is the model's, so no style but SINGLE shows it."""
    example = sample("<image>", "A", "B", first="gpt", image="whole.png", id="x")
    assert "an image but no <image>: 1: id='x'" in problems([example], folder)
    check_examples([example], folder, "v0")
    check_examples([sample("<image>", "A", "B", first="gpt", image=None)], folder, "v1")


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    good = json.dumps(sample("A", "B"))
    for line, said in (("{", "not JSON"), ("[" * 100_000, "nested too deep"), ('{"a": "\0"}', "not JSON")):
        (tmp_path / "a.jsonl").write_text(f"{good}\n\n{line}\n{good}")
        with pytest.raises(ValueError, match=f"a.jsonl', line 3: not JSON .*{said if 'deep' in said else ''}"):
            load_examples(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"a.json': not JSON"):
        load_examples(tmp_path / "a.json")


# ---- nothing to learn

GOOD = [sample("A", "B")] * 20


def check(examples, ratio=1.0, template="v1", sizes=(), **changes):
    config = CONFIG.replace(**changes)
    check_labels(examples, dict(sizes), config, CHECKED, template, max_unlabelled_ratio=ratio, seed=0)


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        (sample("A"), "one turn only"),
        (sample("A", first="gpt"), "one turn only"),
        (sample("A", "B", "C", ""), "no answer to the last question"),
        (sample("A", "B", "C"), "no answer to the last question"),
        (sample("A", "B</s>C"), "a separator of the template in a text"),
        (sample("A ASSISTANT: B", "C"), "a separator of the template in a text"),
        (sample("word " * 300, "B"), "cut off at model_max_length before the first answer"),
    ],
)
def test_samples_without_labels_are_named_by_kind(example, kind, capsys):
    text = load_example(example, "", CONFIG, CHECKED, "v1")
    assert not (text.labels >= 0).any()  # as in the reference
    check([*GOOD, {**example, "id": "x"}])
    assert f"{1 / 21:.1%} of the samples have nothing to learn:\n  {kind}: 1: id='x' (number 20)\n" == (
        capsys.readouterr().err
    )


def test_good_samples_are_passed_without_a_word(capsys):
    check([*GOOD, sample("A", "", "C", "D"), sample("A", " "), sample("B", "A", "B", first="gpt")], ratio=0.0)
    check([sample("A")], template="v0", ratio=0.0)  # which labels its separators
    assert not capsys.readouterr().err


def test_a_picture_may_leave_no_room_for_the_answer(capsys):
    example = sample("<image>\nA", "B", image="x.png", id="x")
    check([example], sizes={"x.png": (40, 40)}, ratio=0.0)
    with pytest.raises(
        ValueError, match=r"100.0% .*\n  cut off at model_max_length before the first answer: 1: id='x'"
    ):
        check([example], sizes={"x.png": (40, 40)}, ratio=0.5, tokenizer_model_max_length=40)


def test_a_share_above_the_flags_stops(monkeypatch):
    bad = sample("A", "", id="x")
    check([*GOOD, bad], ratio=0.05)
    with pytest.raises(ValueError, match=r"9.1% .*--max_unlabelled_ratio lets 5.0% pass;.*\n  no answer .*: 2: id='x'"):
        check([*GOOD, bad, bad], ratio=0.05)
    monkeypatch.setattr("llava_jax.training.checks.MAX_TOKENIZED", 5)  # what only tokens show is looked for in some
    with pytest.raises(ValueError, match=r"100.0% .*\n  cut off .*, among 5 drawn: 5: "):
        check([sample("word " * 300, "B")] * 20, ratio=0.05)
