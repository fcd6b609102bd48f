"""What cannot be converted: one clear message each, and nothing left behind."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from make_7b import write_shards
from published import OLD, TOWER, Checkpoint, hf_checkpoint, write_json
from safetensors.numpy import load_file, save_file

from llava_jax.conversion import key_table, published_files
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.key_table import Rule, TensorInfo

# ---- the source


def test_hub_errors(monkeypatch):
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    for error, message in (
        (errors.GatedRepoError("x", response=response), "HF_TOKEN"),
        (errors.RepositoryNotFoundError("x", response=response), "no such model on the hub"),
        (errors.RevisionNotFoundError("x", response=response), "no revision 'r'"),
        (errors.HfHubHTTPError("boom", response=response), "boom"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (errors.HTTPError("connection lost"), "connection lost"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(FileNotFoundError, match=message):
            published_files.locate("somebody/model", "r")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a b", ""])
def test_no_such_directory(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory, and not a hub id"):
        convert(source, tmp_path / "out", progress=False)


def test_revision_is_for_the_hub(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"--revision v1: .* is a local directory"):
        convert(tiny.path, tmp_path / "out", revision="v1", progress=False)


def test_config_is_checked_before_any_tensor(tiny, tmp_path):
    (tiny.path / "model.safetensors").write_bytes(b"nonsense")
    write_json(tiny.path / "config.json", {**tiny.published, "mm_projector_type": "qformer"})
    with pytest.raises(ValueError, match="mm_projector_type='qformer' is not supported"):
        convert(tiny.path, tmp_path / "out", progress=False)


def test_config_without_tower(tmp_path):
    tiny = Checkpoint(tmp_path)
    tiny.published["mm_vision_tower"] = None
    write_json(tiny.path / "config.json", tiny.published)
    with pytest.raises(ValueError, match=r"names no mm_vision_tower; .* --vision-tower"):
        convert(tiny.path, tmp_path / "out", progress=False)


def test_bad_directories(tiny, tmp_path):
    def fails(kind, message, **arguments):
        with pytest.raises(kind, match=message):
            convert(tiny.path, tmp_path / "out", progress=False, **arguments)

    fails(ValueError, "--dtype int8 is not supported; supported: float32, bfloat16, float16", dtype="int8")
    (tiny.path / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    fails(FileNotFoundError, "no tokenizer")
    (tmp_path / "tokenizer.model").rename(tiny.path / "tokenizer.model")
    (tiny.path / "model.safetensors").unlink()
    fails(FileNotFoundError, r"llava-v1.6-tiny: no weights \(model.safetensors, ")
    write_json(tiny.path / "adapter_config.json", {})
    fails(FileNotFoundError, "LoRA adapter: merge it")
    (tiny.path / "config.json").write_text('{"model_type": "llava",')
    fails(ValueError, r"config.json: not JSON \(.*\); get the file again")
    (tiny.path / "config.json").write_text("[]")
    fails(ValueError, "config.json: a JSON object was expected, not list")
    (tiny.path / "config.json").unlink()
    fails(FileNotFoundError, "there is no config.json")


# ---- what does not fit


def test_all_problems_are_reported_together(tiny, tmp_path):
    layer = "model.layers.1.self_attn"
    for name in ("q", "k", "v"):
        del tiny.tensors[f"{layer}.{name}_proj.weight"]
    tiny.tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tiny.tensors["model.mm_projector.2.bias"] = np.zeros(16, np.int8)
    tiny.tensors["model.vision_resampler.weight"] = np.zeros(1, np.float32)
    tiny.tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((20, 16), np.float32)
    tiny.tensors |= {f"model.strange.{n}": np.zeros(1, np.float32) for n in range(9)}
    tiny.save()
    with pytest.raises(ValueError) as error:
        convert(tiny.path, tmp_path / "out", progress=False)
    message = str(error.value)
    assert f"{tiny.path} does not fit its config.json" in message
    assert "3 parameters that no key sets" in message
    assert "language_model/layers_1/self_attn/q_proj/kernel" in message
    assert "10 keys left over: no rule knows them" in message and "and 5 more" in message
    assert "model.layers.7.mlp.up_proj.weight (language_model/layers_7/mlp/up_proj/kernel)" in message
    assert "model.norm.weight [17] instead of [16]" in message
    assert "model.mm_projector.2.bias I8" in message
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_transposed_shape_is_shown_as_published(tiny, tmp_path):
    tiny.tensors["lm_head.weight"] = np.zeros((31, 16), np.float32)
    tiny.tensors[f"{TOWER}embeddings.patch_embedding.weight"] = np.zeros((8, 3, 7, 14), np.float32)
    tiny.tensors["model.mm_projector.0.weight"] = np.zeros(16, np.float32)
    tiny.save()
    with pytest.raises(ValueError) as error:
        convert(tiny.path, tmp_path / "out", progress=False)
    assert "lm_head.weight [31, 16] instead of [30, 16]" in str(error.value)
    assert "patch_embedding.weight [8, 3, 7, 14] instead of [8, 3, 14, 14]" in str(error.value)
    assert "model.mm_projector.0.weight [16] instead of [16, 8]" in str(error.value)


def test_one_parameter_from_two_keys(tmp_path):
    path, _ = hf_checkpoint(tmp_path, *OLD)
    tensors = load_file(path / "model.safetensors")
    tensors["model.image_newline"] = tensors["image_newline"] + 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)1 parameters given by more than one key.*image_newline"):
        convert(path, tmp_path / "out", progress=False)


def test_key_matched_by_two_rules():
    rules = (Rule("a.{i}.weight", "a_{i}/scale"), Rule("a.0.weight", "b/scale"))
    tensors = {"a.0.weight": TensorInfo((2,), "float32"), "c": TensorInfo((2,), "float32")}
    with pytest.raises(ValueError) as error:
        key_table.match({"b/scale": (2,)}, [(tensors, rules)], "CKPT")
    assert "1 keys matched by more than one rule" in str(error.value)
    assert "a.0.weight (a.{i}.weight, a.0.weight)" in str(error.value)
    assert "no rule knows them:\n    c" in str(error.value)


def test_float16_overflow(tiny, tmp_path):
    tiny.tensors["model.norm.weight"][3] = 1e30
    tiny.save()
    with pytest.raises(ValueError, match="language_model/norm/scale has values beyond float16's range; use bfloat16"):
        convert(tiny.path, tmp_path / "out", dtype="float16", progress=False)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


# ---- damage


def test_damaged_safetensors(tiny, tmp_path):
    file = tiny.path / "model.safetensors"
    whole = file.read_bytes()

    def fails(content, message):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            convert(tiny.path, tmp_path / "out", progress=False)
        assert str(file) in str(error.value)

    fails(whole[:-1], rf"truncated: {len(whole) - 1} bytes of {len(whole)}; download it again")
    fails(whole[:100], "truncated, or not a safetensors file")
    fails(b"", "truncated, or not a safetensors file")
    fails(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer")
    fails(whole[:8] + b"!" + whole[9:], "header is damaged")


def test_damaged_bin(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    (tiny.path / "model.safetensors").unlink()
    file = tiny.path / "pytorch_model.bin"

    def fails(message):
        with pytest.raises(ValueError, match=message) as error:
            convert(tiny.path, tmp_path / "out", progress=False)
        assert str(file) in str(error.value)

    torch.save({"a": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-200])
    fails("truncated, or not a file of tensors")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    fails("truncated, or not a file of tensors")
    torch.save([1, 2], file)
    fails("not a dictionary of tensors")


def test_bin_without_torch(tiny, tmp_path, monkeypatch):
    (tiny.path / "model.safetensors").rename(tiny.path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: reading a .bin file needs PyTorch; run `pip install torch`"
    ):
        convert(tiny.path, tmp_path / "out", progress=False)


def test_index_and_shards_that_disagree(tiny, tmp_path):
    (tiny.path / "model.safetensors").unlink()
    write_shards(tiny.path, {name: t.shape for name, t in tiny.tensors.items()}, 4000)
    index = tiny.path / "model.safetensors.index.json"
    honest = json.loads(index.read_text())

    def fails(kind, message, content):
        write_json(index, content)
        with pytest.raises(kind, match=message):
            convert(tiny.path, tmp_path / "out", progress=False)

    wrong = {**honest["weight_map"], "model.norm.weight": honest["weight_map"]["model.image_newline"]}
    assert wrong != honest["weight_map"]
    fails(ValueError, r"lists tensors that their files do not hold: model.norm.weight \(model-", {"weight_map": wrong})
    fails(ValueError, "has no 'weight_map'", {"metadata": {}})
    first = sorted(tiny.path.glob("*.safetensors"))[0]
    first.unlink()
    fails(FileNotFoundError, rf"index.json lists {first.name}, absent; download it again", honest)


# ---- the output


def test_output_that_exists(tiny, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty one is fine
    convert(tiny.path, output, progress=False)
    before = sorted(p.stat().st_mtime_ns for p in output.rglob("*"))
    with pytest.raises(FileExistsError, match="converted already; delete it, or give another directory with --output"):
        convert(tiny.path, output, progress=False)
    assert before == sorted(p.stat().st_mtime_ns for p in output.rglob("*"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty; give another directory with --output"):
        convert(tiny.path, foreign, progress=False)
    with pytest.raises(FileExistsError, match="--output"):
        convert(tiny.path, foreign / "thesis.tex", progress=False)


def test_disk_space(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough disk space: \d+ bytes .* are needed, 1000 "):
        convert(tiny.path, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
