"""A plain Llama and a CLIP tower as a LLaVA to be trained: what comes from where, and the random part's sizes."""

import json

import numpy as np
import pytest
from published import PREPROCESSOR, TEXT, TOWER, VISION, Checkpoint, check_values, read_params, write_json

from llava_jax.checkpoint import load_config, load_params
from llava_jax.config import LlavaConfig
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.to_hf import export


@pytest.fixture
def base(tmp_path):
    """A plain Llama, beside its CLIP tower."""
    tiny = Checkpoint(tmp_path, tower=False)
    tiny.tensors = {name: t for name, t in tiny.tensors.items() if "mm_projector" not in name and "newline" not in name}
    tiny.save()
    tiny.published = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500.0, **TEXT}
    write_json(tiny.path / "config.json", tiny.published)
    tiny.path = tiny.path.rename(tmp_path / "vicuna-tiny-v1.5")
    return tiny


def make(base, output, kind="mlp2x_gelu", **arguments):
    return convert(base.path, output, vision_tower=str(base.clip), new_projector=kind, progress=False, **arguments)


def is_new(path):
    return path.startswith("mm_projector/") or path == "image_newline"


def test_parameters(base, tmp_path):
    output = make(base, tmp_path / "out", anyres=True)
    params = read_params(output)
    new = {path: array for path, array in params.items() if is_new(path)}
    tower = {name.replace("vision_model.", TOWER): t for name, t in base.clip_tensors.items()}
    known = {"model.image_newline": new["image_newline"]}
    for n in (1, 2):
        known[f"model.mm_projector.{2 * n - 2}.weight"] = new[f"mm_projector/linear_{n}/kernel"].T
        known[f"model.mm_projector.{2 * n - 2}.bias"] = new[f"mm_projector/linear_{n}/bias"]
    assert check_values(output, {**base.tensors, **tower, **known}) > set(base.tensors)
    assert {array.dtype for array in new.values()} == {np.dtype("float32")}
    assert params["mm_projector/linear_1/kernel"].shape == (8, 16) and new["image_newline"].shape == (16,)


def test_draws_are_torchs(tmp_path):
    """As wide as torch.nn.Linear's own, and normal for image_newline, seen on larger shapes."""
    torch = pytest.importorskip("torch")
    from llava_jax.conversion.new_projector import new_tensors

    config = LlavaConfig.preset("1.6-vicuna-7b")
    small = dict(hidden_size=1024, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, vocab_size=8)
    config = LlavaConfig.from_hf({**config.to_hf(), **small})
    tensors = {name: tensor.read() for name, tensor in new_tensors(config).items()}
    assert len(tensors) == 5 and tensors["model.mm_projector.0.weight"].shape == (1024, 1024)
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 1024)
    for name in ("weight", "bias"):
        theirs = getattr(linear, name).detach().numpy()
        for ours in (tensors[f"model.mm_projector.{n}.{name}"] for n in (0, 2)):
            assert abs(ours).max() <= 1 / 32 and abs(ours).max() == pytest.approx(abs(theirs).max(), rel=0.02)
            assert ours.std() == pytest.approx(theirs.std(), rel=0.06) and abs(ours.mean()) < 2e-3
    assert tensors["model.image_newline"].std() == pytest.approx(1 / 32, rel=0.1)
    assert abs(tensors["model.image_newline"]).max() > 2 / 32  # normal, not uniform
    assert not np.array_equal(tensors["model.mm_projector.0.weight"], tensors["model.mm_projector.2.weight"])


@pytest.mark.parametrize("anyres", [True, False])
def test_config(base, tmp_path, anyres):
    output = make(base, tmp_path / "out", anyres=anyres)
    config = load_config(output)
    assert (config.mm_projector_type, config.mm_hidden_size, config.text.rope_theta) == ("mlp2x_gelu", 8, 500.0)
    assert (config.mm_vision_tower, config.unfreeze_mm_vision_tower) == (str(base.clip), False)
    assert (config.vision.image_size, config.vision.image_mean) == (28, (0.5, 0.4, 0.3))
    seen = config.image_aspect_ratio, config.mm_patch_merge_type, config.image_grid_pinpoints
    canvases = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    assert seen == (("anyres", "spatial_unpad", canvases) if anyres else ("pad", "flat", ()))
    assert ("image_newline" in load_params(output, config)) == anyres
    assert config.name == "vicuna-tiny-v1.5"
    written = json.loads((output / "config.json").read_text())
    assert written.items() >= {key: base.published[key] for key in (*TEXT, "rope_theta")}.items()
    assert (written["model_type"], written["architectures"]) == ("llava", ["LlavaLlamaForCausalLM"])
    assert json.loads((output / "preprocessor_config.json").read_text()) == PREPROCESSOR
    assert json.loads((output / "vision_config.json").read_text()) == VISION


def test_the_same_each_time_and_in_a_dtype(base, tmp_path):
    first, second = (read_params(make(base, tmp_path / name, anyres=True)) for name in ("one", "two"))
    assert all(np.array_equal(first[path], second[path]) for path in first)
    cast = read_params(make(base, tmp_path / "three", anyres=True, dtype="bfloat16"))
    assert {array.dtype for array in cast.values()} == {np.dtype("bfloat16")}


def test_exports_as_a_checkpoint_like_any_other(base, tmp_path):
    output = make(base, tmp_path / "out", "linear", anyres=True)
    again = convert(export(output, tmp_path / "back", progress=False), tmp_path / "again", progress=False)
    first, second = read_params(output), read_params(again)
    assert set(first) == set(second) and all(np.array_equal(first[path], second[path]) for path in first)
    assert (again / "config.json").read_bytes() == (output / "config.json").read_bytes()


def test_mistral(base, tmp_path):
    write_json(base.path / "config.json", {**base.published, "model_type": "mistral", "sliding_window": None})
    written = json.loads((make(base, tmp_path / "out") / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llava_mistral", ["LlavaMistralForCausalLM"])


def test_bad_arguments(base, tmp_path):
    def fails(message, **arguments):
        with pytest.raises(ValueError, match=message):
            convert(base.path, tmp_path / "out", progress=False, **arguments)
        assert not list(tmp_path.glob("*out*"))

    clip = str(base.clip)
    fails("--anyres is for --new-projector", anyres=True, vision_tower=clip)
    fails("--new-projector needs --vision-tower", new_projector="mlp2x_gelu")
    fails("takes no --model-base", new_projector="mlp2x_gelu", vision_tower=clip, model_base=clip)
    fails("mm_projector_type='qformer' is not supported", new_projector="qformer", vision_tower=clip)
    write_json(base.path / "config.json", {**base.published, "model_type": "qwen2"})
    fails("model_type='qwen2' is not supported; supported: llama, mistral", new_projector="linear", vision_tower=clip)
    write_json(base.path / "config.json", {**base.published, "model_type": "llava", "mm_projector_type": "linear"})
    fails("for a plain language model, and this has a projector", new_projector="linear", vision_tower=clip)
