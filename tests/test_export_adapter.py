"""What a LoRA run trained, as peft and the original's loader have it."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from published import OLD, TOWER, hf_checkpoint, write_json
from safetensors.numpy import load_file
from test_export import read_tensors

from llava_jax import checkpoint
from llava_jax.cli import script
from llava_jax.conversion.adapter import export_adapter
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.to_hf import export
from llava_jax.training.lora import init_lora, merge_lora


def lora_run(converted, directory, **options):
    """What a run of stage lora leaves: its adapters beside the merged parameters."""
    config = checkpoint.load_config(converted)
    params = checkpoint.load_params(converted, config)
    rng = np.random.default_rng(5)
    lora = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), init_lora(params, 3, jax.random.key(0)))
    shutil.copytree(converted, directory, ignore=shutil.ignore_patterns("params"))
    checkpoint.save_params(directory / "params", merge_lora(params, lora, 2.0))
    checkpoint.save_params(directory / "lora", lora)
    options = {"unfreeze_mm_vision_tower": False, "model_path": str(converted), **options}
    write_json(directory / "train_options.json", {"lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.05, **options})
    return directory


def test_adapter_has_pefts_names_and_merges_to_the_run(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    run = lora_run(convert(tiny.path, tmp_path / "converted", progress=False), tmp_path / "run")
    adapter = export_adapter(run, tmp_path / "llava-lora", progress=False)
    merged = read_tensors(export(run, tmp_path / "merged", progress=False))
    tensors = load_file(adapter / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
    assert len(tensors) == 2 * len(adapted) == 2 * 7 * 2  # seven linear layers in each of two blocks
    for layer in adapted:
        a, b = (tensors[f"base_model.model.{layer}.lora_{m}.weight"] for m in "AB")
        assert a.shape[0] == b.shape[1] == 3
        expected = tiny.tensors[f"{layer}.weight"].astype(np.float32) + b @ a * 2
        np.testing.assert_allclose(merged[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["base_model_name_or_path"] == str(tiny.path)
    assert set(config["target_modules"]) == {layer.rsplit(".", 1)[1] for layer in adapted}
    others = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    prefix = "base_model.model.model."
    assert {n for n in others if "mm_projector" not in n} == {f"{prefix}image_newline"} and len(others) == 5
    for name, tensor in others.items():
        assert np.array_equal(tensor.numpy(), tiny.tensors[name.removeprefix("base_model.model.")].astype(np.float32))
    assert json.loads((adapter / "config.json").read_text()) == tiny.published


def test_adapter_of_a_tuned_tower_and_dtype(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    run = lora_run(converted, tmp_path / "run", unfreeze_mm_vision_tower=True)
    adapter = export_adapter(run, tmp_path / "llava-lora", dtype="bfloat16", progress=False)
    others = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    name = f"{TOWER}embeddings.patch_embedding.weight"
    tensor = others[f"base_model.model.{name}"]
    assert tensor.dtype == torch.bfloat16
    assert tensor.view(torch.uint16).numpy().tobytes() == tiny.tensors[name].tobytes()
    assert {t.dtype for t in load_file(adapter / "adapter_model.safetensors").values()} == {np.dtype("bfloat16")}


def test_adapters_that_cannot_be_written(tiny, tmp_path, monkeypatch, capsys):
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    with pytest.raises(ValueError, match=r"no adapters .lora, train_options.json.; --adapter is for what --stage lora"):
        export_adapter(converted, tmp_path / "back", progress=False)
    for flags in (["--layout", "llava-hf"], ["--vision-tower", "x"]):
        with pytest.raises(SystemExit, match="1"):
            script("to_hf.py", "export", [str(converted), "--output", str(tmp_path / "back"), "--adapter", *flags])
        assert capsys.readouterr().err.startswith("error: --adapter goes with neither")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"--adapter: .* needs PyTorch; run `pip install torch`"):
        export_adapter(converted, tmp_path / "back", progress=False)
    path, _ = hf_checkpoint(tmp_path, *OLD)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--adapter is for the liuhaotian layout, and this came as llava-hf"):
        export_adapter(convert(path, tmp_path / "hf", progress=False), tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))
