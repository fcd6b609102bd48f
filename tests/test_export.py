"""Converted checkpoints back into the layout that they came in: the same tensors, the same config, byte for byte."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from golden.checkpoints import VARIANTS
from make_7b import ROOT
from published import (
    BARE,
    FIVE,
    NEW,
    OLD,
    PREPROCESSOR,
    TOWER,
    Checkpoint,
    check_values,
    hf_checkpoint,
    write_json,
)
from safetensors.numpy import load_file, save_file

from llava_jax.cli import script
from llava_jax.conversion import orbax_reader, published_files
from llava_jax.conversion.atomic_directory import new_directory
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.to_hf import export


def read_tensors(directory):
    """Every tensor of a published directory, by name."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_tensors(directory, expected):
    tensors = read_tensors(directory)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert tensor.tobytes() == expected[name].tobytes(), name


def there_and_back(source, tmp_path, convert_with=None, **export_with):
    """The export of the conversion of a published directory, and the conversion."""
    converted = convert(source, tmp_path / "converted", progress=False, **(convert_with or {}))
    return export(converted, tmp_path / "back", progress=False, **export_with), converted


def assert_round_trip(source, tmp_path, expected, **convert_with):
    back, _ = there_and_back(source, tmp_path, convert_with)
    assert_same_tensors(back, expected)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    return back


# ---- the layout that it came in


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_variants_come_back(checkpoint, converted, tmp_path, variant):
    source = Path(checkpoint(variant)[0])
    back = export(converted(variant), tmp_path / "back", max_shard_bytes=2_000_000, progress=False)
    assert len(list(back.glob("*.safetensors"))) > 1
    published = published_files.open_checkpoint(published_files.locate(str(source)))
    assert_same_tensors(back, {name: tensor.read() for name, tensor in published.items()})
    for file in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (back / file).read_bytes() == (source / file).read_bytes()


def test_files_of_a_liuhaotian_checkpoint(tiny, tmp_path):
    back = assert_round_trip(tiny.path, tmp_path, tiny.tensors)
    files = {"config.json", "generation_config.json", "tokenizer.model", "preprocessor_config.json"}
    assert {p.name for p in back.iterdir()} == files | {"model.safetensors"}
    assert json.loads((back / "preprocessor_config.json").read_text()) == PREPROCESSOR
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu", "identity"])
def test_projectors(tmp_path, kind):
    wide = {"hidden_size": 8} if kind == "identity" else {}
    tiny = Checkpoint(tmp_path, mm_projector_type=kind, attention_bias=True, **wide)
    assert_round_trip(tiny.path, tmp_path, tiny.tensors)


@pytest.mark.parametrize("inside", [False, True])
def test_tower_beside_stays_beside(tmp_path, inside):
    tiny = Checkpoint(tmp_path, tower=inside, unfreeze_mm_vision_tower=False)
    expected = {name: t for name, t in tiny.tensors.items() if not name.startswith(TOWER)}
    assert_round_trip(tiny.path, tmp_path, expected)  # one that the original does not read is not kept


def test_tower_that_was_tuned_since_goes_inside(tmp_path):
    """As a training run leaves it: the manifest of what it started from, and a config that says so."""
    tiny = Checkpoint(tmp_path, tower=False, unfreeze_mm_vision_tower=False)
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    write_json(converted / "config.json", {**tiny.published, "unfreeze_mm_vision_tower": True})
    tensors = read_tensors(export(converted, tmp_path / "back", progress=False))
    tower = {name: t for name, t in tensors.items() if name.startswith(TOWER)}
    assert tower and {name.replace(TOWER, "vision_model.") for name in tower} < set(tiny.clip_tensors)
    for name, tensor in tower.items():
        assert np.array_equal(tensor, tiny.clip_tensors[name.replace(TOWER, "vision_model.")])


def test_known_tower_inside_though_not_tuned(tmp_path, monkeypatch):
    import llava_jax.conversion.from_hf as from_hf

    monkeypatch.setitem(from_hf.KNOWN_TOWERS, "openai/known", Checkpoint(tmp_path).config.vision)
    shutil.rmtree(tmp_path / "clip")
    shutil.rmtree(tmp_path / "llava-v1.6-tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny = Checkpoint(tmp_path, unfreeze_mm_vision_tower=False, mm_vision_tower="openai/known")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert_round_trip(tiny.path, tmp_path, tiny.tensors)


def offline(*_, **__):
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline")


@pytest.mark.parametrize("copied", [False, True])
def test_tied_embeddings(tmp_path, copied):
    tiny = Checkpoint(tmp_path, tie_word_embeddings=True)
    if copied:
        tiny.tensors["lm_head.weight"] = tiny.tensors["model.embed_tokens.weight"].copy()
        tiny.save()
    assert_round_trip(tiny.path, tmp_path, tiny.tensors)


def test_buffers_and_mixed_dtypes_come_back(tiny, tmp_path):
    tiny.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tiny.tensors[f"{TOWER}embeddings.position_ids"] = np.arange(5)[None]
    tiny.tensors["model.norm.weight"] = tiny.tensors["model.norm.weight"].astype(np.float32)
    tiny.tensors["model.image_newline"] = tiny.tensors["model.image_newline"].astype(np.float16)
    tiny.save()
    assert_round_trip(tiny.path, tmp_path, tiny.tensors)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("prefixes", [OLD, NEW, FIVE, BARE], ids=["old", "new", "five", "bare"])
def test_llava_hf_names_of_every_generation(tmp_path, prefixes, kind):
    path, _ = hf_checkpoint(tmp_path, *prefixes, kind=kind)
    write_json(path / "processor_config.json", {"patch_size": 14})
    (path / "chat_template.jinja").write_text("{{ messages }}")
    back = assert_round_trip(path, tmp_path, load_file(path / "model.safetensors"))
    assert json.loads((back / "preprocessor_config.json").read_text()) == PREPROCESSOR
    for file in ("processor_config.json", "chat_template.jinja", "tokenizer.model"):
        assert (back / file).read_bytes() == (path / file).read_bytes()


def test_stage_1_projector_and_base_become_one_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    tiny = Checkpoint(tmp_path, tower=False, unfreeze_mm_vision_tower=False, mm_patch_merge_type="flat")
    base = tmp_path / "base"
    base.mkdir()
    projector = {n: t.astype(np.float32) for n, t in tiny.tensors.items() if "mm_projector" in n}
    torch.save({n: torch.from_numpy(t) for n, t in projector.items()}, tiny.path / "mm_projector.bin")
    (tiny.path / "model.safetensors").unlink()
    shutil.move(tiny.path / "tokenizer.model", base)
    language_model = {n: t for n, t in tiny.tensors.items() if n not in projector}
    save_file(language_model, base / "model.safetensors")
    assert_round_trip(tiny.path, tmp_path, language_model | projector, model_base=str(base))


def test_there_and_back_and_there(tiny, tmp_path):
    """The other way round: converting the export gives the same directory."""
    back, converted = there_and_back(tiny.path, tmp_path)
    again = convert(back, tmp_path / "again", conv_mode="llava_v1", progress=False)  # its folder's name picks none
    assert check_values(again, tiny.tensors) == set(tiny.tensors)
    first, second = (json.loads((d / "llava_jax.json").read_text()) for d in (converted, again))
    changed = ("name", "source")
    assert {k: v for k, v in first.items() if k not in changed} == {k: v for k, v in second.items() if k not in changed}


def test_directory_without_the_record(tiny, tmp_path):
    """A directory that is older than the manifest's `published`."""
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    manifest = json.loads((converted / "llava_jax.json").read_text())
    del manifest["published"]
    write_json(converted / "llava_jax.json", manifest)
    back = export(converted, tmp_path / "back", progress=False)
    assert_same_tensors(back, tiny.tensors)
    assert json.loads((back / "config.json").read_text()) == tiny.published


# ---- dtypes and shards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny, tmp_path, dtype):
    tiny.published["torch_dtype"] = "bfloat16"
    write_json(tiny.path / "config.json", tiny.published)
    back, _ = there_and_back(tiny.path, tmp_path, dtype=dtype)
    assert_same_tensors(back, {name: t.astype(np.dtype(dtype)) for name, t in tiny.tensors.items()})
    assert json.loads((back / "config.json").read_text()) == {**tiny.published, "torch_dtype": dtype}


def test_dtype_of_the_conversion_is_said(tmp_path):
    """Tensors that the conversion cast stay cast, and the config says so, in every place that says a dtype."""
    path, _ = hf_checkpoint(tmp_path, *OLD)
    config = json.loads((path / "config.json").read_text()) | {"dtype": "float16"}
    config["text_config"]["torch_dtype"] = "float16"
    write_json(path / "config.json", config)
    back, _ = there_and_back(path, tmp_path, {"dtype": "float32"})
    config["dtype"] = config["text_config"]["torch_dtype"] = "float32"
    assert json.loads((back / "config.json").read_text()) == config


def test_shards_and_their_index(tiny, tmp_path):
    back, _ = there_and_back(tiny.path, tmp_path, max_shard_bytes=4000)
    shards = sorted(p.name for p in back.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    total = 0
    for shard in shards:
        held = load_file(back / shard)
        size = sum(t.nbytes for t in held.values())
        assert size <= 4000 or len(held) == 1
        assert set(held) == {name for name, file in index["weight_map"].items() if file == shard}
        total += size
    assert index["metadata"]["total_size"] == total
    assert_same_tensors(back, tiny.tensors)


def test_tensors_are_aligned(tiny, tmp_path):
    """A float32 after an odd number of bfloat16s would stand at an address that no reader can map."""
    tiny.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, ml_dtypes.bfloat16)
    tiny.tensors["model.norm.weight"] = tiny.tensors["model.norm.weight"].astype(np.float32)
    tiny.save()
    back, _ = there_and_back(tiny.path, tmp_path)
    content = (back / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for entry in header.values()} == set(sizes)
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_streams_in_batches(tiny, tmp_path, monkeypatch):
    """No more parameters are held than a batch has room for, however many there are."""
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    loaded, load = [], orbax_reader.load
    monkeypatch.setattr(orbax_reader.checkpoint, "BATCH_BYTES", 4000)
    monkeypatch.setattr(orbax_reader, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    back = export(converted, tmp_path / "back", progress=False)
    sizes = [[array.nbytes for array in batch.values()] for batch in loaded]
    assert len(sizes) > 3 and all(sum(batch) <= 4000 or len(batch) == 1 for batch in sizes)
    assert_same_tensors(back, tiny.tensors)


# ---- what cannot be exported


def test_bad_arguments(tiny, tmp_path):
    converted = convert(tiny.path, tmp_path / "converted", progress=False)

    def fails(kind, message, directory=converted, output=tmp_path / "back", **arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind, match=message):
            export(directory, output, progress=False, **arguments)
        assert sorted(tmp_path.rglob("*")) == before

    fails(FileNotFoundError, "nowhere: no such directory", directory=tmp_path / "nowhere")
    fails(ValueError, "a published checkpoint, not converted yet", directory=tiny.path)
    fails(ValueError, "--layout mpt is not supported; supported: liuhaotian, llava-hf", layout="mpt")
    fails(ValueError, "--dtype int8 is not supported", dtype="int8")
    fails(ValueError, "--vision-tower is for the liuhaotian layout", layout="llava-hf", vision_tower="x")
    fails(FileExistsError, "exists and is not empty; give another directory with --output", output=tiny.path)
    fails(FileExistsError, "converted already", output=converted)


def test_float16_overflow_leaves_nothing(tiny, tmp_path):
    tiny.tensors["model.norm.weight"][3] = 1e30
    tiny.save()
    with pytest.raises(ValueError, match="language_model/norm/scale has values beyond float16's range; use bfloat16"):
        there_and_back(tiny.path, tmp_path, dtype="float16")
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".*"))


def test_damaged_parameters_leave_nothing(tiny, tmp_path):
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    data = max((p for p in (converted / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(ValueError, match=r"params: half-written or damaged .*; make .*converted again"):
        export(converted, tmp_path / "back", progress=False)
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".*"))


def test_parameters_that_do_not_match_the_config(tiny, tmp_path):
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    write_json(converted / "config.json", {**tiny.published, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"its parameters do not match its config.json"):
        export(converted, tmp_path / "back", progress=False)


def test_disk_space(tiny, tmp_path, monkeypatch):
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough disk space: \d+ bytes .* are needed, 1000 "):
        export(converted, tmp_path / "back", progress=False)
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".*"))


def test_two_at_once(tiny, tmp_path):
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    with new_directory(tmp_path / "back", 0) as temporary:
        with pytest.raises(FileExistsError, match="another conversion is writing it"):
            export(converted, tmp_path / "back", progress=False)
        (temporary / "file").touch()
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["file"]


# ---- the command


def test_script(tiny, tmp_path):
    """The whole command, a bar and all, without torch."""
    converted = convert(tiny.path, tmp_path / "converted", progress=False)
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not for this')")
    command = [sys.executable, str(ROOT / "convert" / "to_hf.py"), "converted", "--output"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, "back"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "B/s" in done.stderr and "wrote" in done.stdout
    assert_same_tensors(tmp_path / "back", tiny.tensors)
    failed = subprocess.run([*command, "back"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert converted.is_dir()


def test_help_names_every_option_and_gives_an_example(capsys):
    with pytest.raises(SystemExit):
        script("to_hf.py", "export", ["--help"])
    text = capsys.readouterr().out
    assert all(
        option in text for option in ("--output", "--layout", "--dtype", "--vision-tower", "--adapter", "example: ")
    )
