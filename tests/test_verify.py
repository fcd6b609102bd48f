"""A conversion against transformers' own LLaVA of the published weights: good ones pass, a changed weight is found."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from make_7b import ROOT
from published import write_json

from llava_jax import checkpoint as stored
from llava_jax.cli import script
from llava_jax.conversion import verify
from llava_jax.conversion.from_hf import read_published
from llava_jax.inference.llava import load
from llava_jax.inputs.image import load_image

NAMES = ["pixels", "token ids", "token count", "tower features", "projector", "merged embeddings", "logits"]
NAMES.append("greedy tokens")


@pytest.fixture(scope="module", autouse=True)
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def reference(checkpoint, converted, pictures):
    """What transformers computes with vicuna's published weights, and with what: (llava, prompt, picture, record)."""
    llava, _ = load(converted("vicuna"), reading="llava-hf")
    text, picture = llava.conversation(verify.QUESTION, 1).get_prompt(), load_image(pictures["tiny_20x13"])
    published = read_published(checkpoint("vicuna")[0])
    return llava, text, picture, verify.record_llava_hf(published, text, [picture])[0]


def stages_of(reference, params):
    llava, text, picture, theirs = reference
    ours = verify.record_ours(llava, params, text, picture, theirs)
    return verify.compare([ours], [theirs], llava.config.vision.num_hidden_layers, llava.config.text.num_hidden_layers)


def first_bad(stages):
    return next((stage.stage for stage in stages if not stage.ok), None)


def changed_params(params, path, change):
    """The parameters, but for one that `change` has changed in place."""
    flat = flatten_dict(params, sep="/")
    array = np.array(flat[path])
    change(array)
    return unflatten_dict(flat | {path: jax.device_put(array, flat[path].sharding)}, sep="/")


def changed(directory, to, path, change):
    """A copy of a converted checkpoint with one parameter changed in Orbax."""
    shutil.copytree(directory, to, ignore=shutil.ignore_patterns("params"))
    params = stored.load_params(directory, stored.load_config(directory))
    stored.save_params(to / "params", changed_params(params, path, change))
    return to


def test_good_conversion(reference, model):
    stages = stages_of(reference, model("vicuna")[1])
    assert [stage.stage for stage in stages] == NAMES
    assert all(stage.ok for stage in stages), verify.table(stages)
    logits = stages[NAMES.index("logits")]
    assert 0 < logits.absolute < 1e-4 and stages[0].absolute == 0
    assert stages[-1].note == f"{verify.NEW_TOKENS} tokens"


def grow(array):
    array *= 1.01


def one_value(array):
    array[array.shape[0] // 2, 1] += 0.5


@pytest.mark.parametrize(
    "path, change, stage",
    [
        ("vision_tower/layers_1/mlp/fc2/kernel", grow, "tower features"),
        ("vision_tower/layers_0/self_attn/k_proj/kernel", one_value, "tower features"),
        ("mm_projector/linear_1/bias", grow, "projector"),
        ("mm_projector/linear_2/kernel", one_value, "projector"),
        ("image_newline", grow, "merged embeddings"),
        ("language_model/layers_2/mlp/up_proj/kernel", one_value, "logits"),
        ("language_model/norm/scale", grow, "logits"),
        ("language_model/lm_head/kernel", lambda array: array[:, [7, 8]].fill(0.0) or array[:, 7].fill(0.0), "logits"),
    ],
)
def test_changed_weight(reference, model, path, change, stage):
    stages = stages_of(reference, changed_params(model("vicuna")[1], path, change))
    assert first_bad(stages) == stage, verify.table(stages)


@pytest.mark.long  # test_changed_weight has one change for each stage
def test_changed_text_embedding_and_settings(reference, converted, tmp_path):
    """A word of the prompt; and a setting that moves pixels, which the weights know nothing of."""
    _, text, picture, theirs = reference
    word = int(theirs["ids"][5])

    def change(array):
        array[word] += 0.01

    bad = changed(converted("vicuna"), tmp_path / "bad", "language_model/embed_tokens/embedding", change)
    assert first_bad(stages_of(reference, stored.load_params(bad, stored.load_config(bad)))) == "merged embeddings"
    settings = json.loads((bad / "preprocessor_config.json").read_text())
    write_json(bad / "preprocessor_config.json", settings | {"image_std": [0.27, 0.26, 0.28]})
    other, params = load(bad, reading="llava-hf")
    ours = verify.record_ours(other, params, text, picture, theirs)
    assert first_bad(verify.compare([ours], [theirs], 3, 3)) == "pixels"


# ---- the comparison alone


def record(**changes):
    rng = np.random.default_rng(0)
    values = {"tower": rng.standard_normal((2, 5)), "embeds": rng.standard_normal((7, 3))}
    values |= {"logits": rng.standard_normal((7, 9)), "tokens": np.arange(4), "gaps": np.full(4, 0.5)}
    return values | {"ids": np.arange(6), "projector": np.ones((2, 3)), "pixels": np.ones((1, 3, 2, 2))} | changes


def test_bounds_grow_with_the_layers():
    theirs = record()
    for layers, bound in ((2, 5e-5), (30, 3e-4)):
        rms = np.sqrt(np.mean(theirs["tower"] ** 2))
        for factor, bad in ((0.9, None), (1.1, "tower features")):
            ours = record(tower=theirs["tower"] + factor * bound * rms)
            assert first_bad(verify.compare([ours], [theirs], layers, 0)) == bad


@pytest.mark.parametrize(
    "changes, bad, note",
    [
        (dict(ids=np.arange(5)), "token ids", "the first at 5"),
        (dict(ids=np.array([0, 1, 2, 9, 4, 5])), "token ids", "the first at 3"),
        (dict(embeds=np.zeros((6, 3))), "token count", "6 instead of 7"),
        (dict(logits=np.full((7, 9), np.nan)), "logits", ""),
        (dict(tokens=np.array([0, 1, 9, 9])), "greedy tokens", "number 2: 9 instead of 2, 0.5 ahead"),
        (dict(tokens=np.arange(2)), None, ""),  # an end-of-sequence token
    ],
)
def test_what_else_can_differ(changes, bad, note):
    stages = verify.compare([record(), record(**changes)], [record(), record()], 3, 3)
    assert first_bad(stages) == bad
    assert bad is None or note in next(stage.note for stage in stages if not stage.ok)
    json.dumps(verify.as_json(stages), allow_nan=False)


@pytest.mark.parametrize("padded", ["ours", "theirs"])
def test_logits_of_a_padded_vocabulary(padded):
    wide = np.pad(record()["logits"], ((0, 0), (0, 7)), constant_values=50.0)
    sides = {"ours": record(), "theirs": record()} | {padded: record(logits=wide)}
    stages = verify.compare([sides["ours"]], [sides["theirs"]], 3, 3)
    assert first_bad(stages) is None and stages[NAMES.index("logits")].note == "the first 9 of 16 rows"
    sides["ours"]["logits"][3, 8] += 1.0
    assert first_bad(verify.compare([sides["ours"]], [sides["theirs"]], 3, 3)) == "logits"


def test_near_ties_may_fall_either_way():
    theirs = record(gaps=np.array([0.5, 0.5, 1e-6, 0.5]))
    stages = verify.compare([record(tokens=np.array([0, 1, 9, 9]))], [theirs], 3, 3)
    assert first_bad(stages) is None and "number 2" in stages[-1].note


# ---- the command


def run(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    with pytest.raises(SystemExit) as raised:
        script("verify.py", "verify", list(map(str, arguments)))
    out, err = capsys.readouterr()
    return raised.value.code, out, err.removesuffix("\n")


@pytest.mark.long  # daily: the command on a 1.5 checkpoint
def test_command_on_a_changed_llava_hf_checkpoint(checkpoint, converted, tmp_path, capsys):
    path = "language_model/layers_0/self_attn/v_proj/kernel"
    bad = changed(converted("hf-next"), tmp_path / "llava-hf-next-jax", path, grow)
    status, out, _ = run(capsys, bad, "--reference", checkpoint("hf-next")[0])
    assert status == 1 and "first stage out of bounds: logits (against llava-hf)" in out
    rows = out[out.index("stage ") :].splitlines()[1:-1]
    assert [row.split("  ")[0].strip() for row in rows] == NAMES


@pytest.mark.parametrize("image", [["chelsea"], pytest.param([], marks=pytest.mark.long)])
def test_command_on_a_1_5_checkpoint(checkpoint, converted, pictures, capsys, image):
    """.bin shards, the tower beside them, and pictures that are padded; and text alone."""
    files = [pictures[name] for name in image]
    where = converted("llava15"), "--reference", checkpoint("llava15")[0], "--against", "llava-hf"
    capsys.readouterr()  # what the conversion says
    status, out, _ = run(capsys, *where, "--json", "--image", *files)
    told = json.loads(out)
    assert (status, told["ok"], told["against"], told["first_out_of_bounds"]) == (0, True, "llava-hf", None)
    seen = [name for name in NAMES if image or name not in ("pixels", "tower features", "projector")]
    assert [stage["stage"] for stage in told["stages"]] == seen
    assert all(stage["relative"] <= stage["bound"] for stage in told["stages"])


def test_what_cannot_be_compared(checkpoint, converted, capsys):
    def fails(message, variant, *arguments):
        directory = converted(variant)
        capsys.readouterr()  # what the conversion says
        status, out, err = run(capsys, directory, *arguments)
        assert status == 1 and not out and message in err and "\n" not in err, err

    fails("--reference (the published checkpoint) or --quick is needed", "vicuna")
    hf, spatial = ("--reference", checkpoint("hf-next")[0]), ("--reference", checkpoint("spatial")[0])
    fails("the original does not read the llava-hf layout; give --against llava-hf", "hf-next", *hf, "--against",
          "original")  # fmt: skip
    fails("the llava-hf layout cannot express mm_projector_type='linear'", "spatial", *spatial, "--against", "llava-hf")
    fails("--python /no/python: cannot be run", "spatial", *spatial, "--python", "/no/python")
    fails("no such file", "spatial", *spatial, "--image", "/no/picture.jpg")


def test_without_torch_or_the_original(checkpoint, converted, tmp_path, monkeypatch, capsys):
    """One line that names what is missing; --quick does without."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}"}
    script = [sys.executable, str(ROOT / "convert" / "verify.py"), converted("vicuna")]

    def called(*arguments):
        return subprocess.run([*script, *arguments], env=env, capture_output=True, text=True)

    done = called("--reference", checkpoint("vicuna")[0], "--against", "llava-hf")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "needs PyTorch and transformers 5" in done.stderr and "pip install torch" in done.stderr
    done = called("--reference", checkpoint("vicuna")[0], "--against", "original")
    assert done.returncode == 1 and "tests/golden/setup.sh" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert called("--quick").returncode == 0, called("--quick").stdout


def test_quick(converted, tmp_path, capsys):
    assert run(capsys, converted("vicuna"), "--quick")[0] == 0
    bad = changed(converted("vicuna"), tmp_path / "bad", "image_newline", grow)
    status, out, _ = run(capsys, bad, "--quick", "--json")
    told = json.loads(out)
    assert status == 1 and not told["ok"] and any("image_newline" in line for line in told["problems"])


def test_what_is_compared_with(monkeypatch):
    def installed(there):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)

    for there, layout, python, expected in (
        (True, "llava-hf", None, "llava-hf"),
        (True, "liuhaotian", None, "original"),
        (False, "liuhaotian", None, "llava-hf"),
        (False, "liuhaotian", "ENV/bin/python", "original"),
    ):
        installed(there)
        assert verify.default_against(layout, python) == expected
