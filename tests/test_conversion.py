"""Published checkpoints, of every layout, into llava_jax directories: exact values, whatever their files."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from make_7b import ROOT, write_shards
from published import (
    BARE,
    FIVE,
    NEW,
    OLD,
    PREPROCESSOR,
    TEXT,
    TOWER,
    VISION,
    Checkpoint,
    check_values,
    config_dict,
    hf_checkpoint,
    original_name,
    read_params,
    tokenizer_model,
    write_clip,
    write_json,
)
from safetensors.numpy import load_file, save_file

import llava_jax.conversion.from_hf as from_hf
from llava_jax.config import LlavaConfig
from llava_jax.conversion import key_table
from llava_jax.conversion.checksums import fingerprint
from llava_jax.conversion.from_hf import checkpoint_name, convert
from llava_jax.models.llava_llama import flat_param_shapes

# ---- the layouts


def test_liuhaotian_values_and_files(tiny, tmp_path):
    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert check_values(output, tiny.tensors) == set(tiny.tensors)
    assert (output / "config.json").read_bytes() == (tiny.path / "config.json").read_bytes()
    assert json.loads((output / "vision_config.json").read_text()) == VISION
    assert json.loads((output / "preprocessor_config.json").read_text()) == PREPROCESSOR
    assert json.loads((output / "llava_jax.json").read_text()) == {
        "version": 1,
        "name": "llava-v1.6-tiny",
        "conv_mode": "llava_v1",
        "reading": "original",
        "layout": "liuhaotian",
        "source": str(tiny.path),
        "dtype": "bfloat16",
        "fingerprint": fingerprint(json.loads((output / "checksums.json").read_text())["parameters"]),
        "published": {"dtype": "bfloat16", "vision_tower": "inside"},
    }
    files = {"config.json", "generation_config.json", "tokenizer.model", "vision_config.json", "llava_jax.json"}
    assert {p.name for p in output.iterdir()} == files | {"preprocessor_config.json", "checksums.json", "params"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "llava-v1.6-tiny", "out"]


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_projectors(tmp_path, kind):
    tiny = Checkpoint(tmp_path, mm_projector_type=kind, mm_patch_merge_type="flat", attention_bias=True)

    def name_of(path):
        linear = kind == "linear" and path.startswith("mm_projector")
        return original_name(path).replace("mm_projector.0", "mm_projector") if linear else original_name(path)

    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert check_values(output, tiny.tensors, name_of) == set(tiny.tensors)


def test_identity_projector(tmp_path):
    wide = dict(mm_projector_type="identity", hidden_size=8)
    tiny = Checkpoint(tmp_path, **wide)
    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert check_values(output, tiny.tensors) == set(tiny.tensors)


@pytest.mark.parametrize("extra", [False, True])
def test_tied_embeddings_have_no_head(tmp_path, extra):
    tiny = Checkpoint(tmp_path, tie_word_embeddings=True)
    used = set(tiny.tensors)
    if extra:  # .bin files of tied models often hold it a second time
        tiny.tensors["lm_head.weight"] = tiny.tensors["model.embed_tokens.weight"].copy()
        tiny.save()
    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert check_values(output, tiny.tensors) == used


def test_buffers_are_ignored(tiny, tmp_path):
    used = set(tiny.tensors)
    tiny.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tiny.tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tiny.tensors[f"{TOWER}embeddings.position_ids"] = np.arange(5)[None]
    tiny.save()
    assert check_values(convert(tiny.path, tmp_path / "out", progress=False), tiny.tensors) == used


@pytest.mark.parametrize("prefixes", [OLD, NEW, FIVE, BARE], ids=["old", "new", "five", "bare"])
def test_llava_hf_names_of_every_generation(tmp_path, prefixes):
    path, tensors = hf_checkpoint(tmp_path, *prefixes)
    output = convert(path, tmp_path / "out", progress=False)
    assert check_values(output, tensors) == set(tensors)
    manifest = json.loads((output / "llava_jax.json").read_text())
    assert (manifest["layout"], manifest["reading"], manifest["dtype"]) == ("llava-hf", "original", "float16")
    assert json.loads((output / "preprocessor_config.json").read_text()) == PREPROCESSOR
    assert json.loads((output / "vision_config.json").read_text()) == VISION


def test_llava_hf_15_has_no_newline_and_preprocessor_of_transformers_5(tmp_path):
    path, tensors = hf_checkpoint(tmp_path, *OLD, kind="llava")
    (path / "preprocessor_config.json").unlink()
    write_json(path / "processor_config.json", {"image_processor": PREPROCESSOR})
    output = convert(path, tmp_path / "out", progress=False)
    assert check_values(output, tensors) == set(tensors)
    assert json.loads((output / "preprocessor_config.json").read_text()) == PREPROCESSOR


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("anyres", [False, True])
def test_what_transformers_saves(tmp_path, anyres, tied):
    """Live: a transformers model, saved, converted, equal to its own state dict."""
    torch = pytest.importorskip("torch")
    import transformers as tf

    torch.manual_seed(0)
    parts = dict(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), tie_word_embeddings=tied
    )
    parts["text_config"].tie_word_embeddings = tied
    if anyres:
        config = tf.LlavaNextConfig(**parts, image_grid_pinpoints=[[28, 56]])
        model = tf.LlavaNextForConditionalGeneration(config)
    else:
        model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**parts))
    path = tmp_path / "live"
    model.save_pretrained(path)
    (path / "tokenizer.model").write_bytes(tokenizer_model())

    def name_of(name):
        name = original_name(name).replace(TOWER, "model.vision_tower.")
        for n in (1, 2):
            name = name.replace(f"model.mm_projector.{2 * n - 2}", f"model.multi_modal_projector.linear_{n}")
        for part in ("layers", "embed_tokens", "norm"):
            name = (
                name.replace(f"model.{part}.", f"model.language_model.{part}.") if name[6:].startswith(part) else name
            )
        return name

    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    used = check_values(convert(path, tmp_path / "out", progress=False), tensors, name_of)
    assert used == set(tensors) - ({"lm_head.weight"} if tied else set())


# ---- the table


@pytest.mark.parametrize("layout", ["liuhaotian", "llava-hf"])
def test_table_is_reversible_and_unambiguous(layout):
    """Every parameter has a published name, which the same table takes back to it by exactly one rule."""
    config = LlavaConfig.from_hf(config_dict("unused", attention_bias=True), VISION)
    rules = key_table.RULES[layout](config)
    for path in flat_param_shapes(config):
        name, transform = key_table.published_name(path, rules)
        hits = [rule for rule in rules if rule.matches(name)]
        assert [(rule.path_of(name), rule.transform) for rule in hits] == [(path, transform)]
    with pytest.raises(ValueError, match="nothing/kernel: no rule"):
        key_table.published_name("nothing/kernel", rules)


@pytest.mark.parametrize("transform", key_table.TRANSFORMS)
def test_transforms_are_undone(transform):
    axes = key_table.TRANSFORMS[transform] or (0, 1)
    array = np.arange(np.prod(range(2, 2 + len(axes)))).reshape(*range(2, 2 + len(axes)))
    turned = key_table.apply_transform(transform, array)
    assert turned.shape == key_table.transformed_shape(transform, array.shape)
    assert np.array_equal(key_table.invert_transform(transform, turned), array)


# ---- the tower, the base, the files


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_tower_beside(tmp_path, prefix):
    tiny = Checkpoint(tmp_path, tower=False, unfreeze_mm_vision_tower=False)
    shutil.rmtree(tiny.clip)
    clip = write_clip(tiny.clip, prefix=prefix)
    output = convert(tiny.path, tmp_path / "out", progress=False)

    def name_of(path):
        return original_name(path).replace(TOWER, prefix)

    used = check_values(output, {**tiny.tensors, **clip}, name_of)
    assert used > set(tiny.tensors)
    assert json.loads((output / "llava_jax.json").read_text())["dtype"] == "mixed"


def test_tower_inside_wins_over_the_one_beside(tiny, tmp_path):
    kernel = read_params(convert(tiny.path, tmp_path / "out", progress=False))["vision_tower/layers_1/mlp/fc1/kernel"]
    inside = tiny.tensors[f"{TOWER}encoder.layers.1.mlp.fc1.weight"]
    assert np.array_equal(kernel, inside.T)
    assert not np.array_equal(kernel, tiny.clip_tensors["vision_model.encoder.layers.1.mlp.fc1.weight"].T)


def test_vision_tower_argument(tmp_path):
    tiny = Checkpoint(tmp_path, tower=False)
    moved = tiny.clip.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"vision tower .*clip.* cannot be had .* --vision-tower"):
        convert(tiny.path, tmp_path / "out", progress=False)
    output = convert(tiny.path, tmp_path / "out", vision_tower=str(moved), progress=False)
    assert "vision_tower/pre_layrnorm/scale" in read_params(output)


def test_known_tower_need_not_be_there(tmp_path, monkeypatch):
    """A tuned tower of a known name: its settings are known, and its weights stand in the checkpoint."""
    known = "openai/clip-vit-large-patch14-336"
    parsed = LlavaConfig.from_hf(config_dict("unused"), VISION).vision
    monkeypatch.setitem(from_hf.KNOWN_TOWERS, known, parsed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    tiny = Checkpoint(tmp_path, mm_vision_tower=known)
    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert check_values(output, tiny.tensors) == set(tiny.tensors)
    vision = json.loads((output / "vision_config.json").read_text())
    preprocessor = json.loads((output / "preprocessor_config.json").read_text())
    assert LlavaConfig.from_hf(config_dict("unused"), vision, preprocessor).vision == parsed
    for name in [n for n in tiny.tensors if n.startswith(TOWER)]:
        del tiny.tensors[name]
    tiny.save()
    with pytest.raises(FileNotFoundError, match=r"holds no vision tower, and .* --vision-tower"):
        convert(tiny.path, tmp_path / "out2", progress=False)


def offline(*_, **__):
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline")


def test_sharded_with_index(tiny, tmp_path):
    (tiny.path / "model.safetensors").unlink()
    write_shards(tiny.path, {name: t.shape for name, t in tiny.tensors.items()}, 2000)
    shards = sorted(tiny.path.glob("*.safetensors"))
    assert len(shards) > 3
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert check_values(convert(tiny.path, tmp_path / "out", progress=False), tensors) == set(tensors)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bin_files(tiny, tmp_path, sharded, dtype):
    torch = pytest.importorskip("torch")
    (tiny.path / "model.safetensors").unlink()
    state = {k: torch.from_numpy(t.astype(np.float32)).to(getattr(torch, dtype)) for k, t in tiny.tensors.items()}
    if sharded:
        names = sorted(state)
        weight_map = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({name: state[name] for name in names if weight_map[name] == file}, tiny.path / file)
        write_json(tiny.path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    else:
        torch.save(state, tiny.path / "pytorch_model.bin", _use_new_zipfile_serialization=dtype != "float16")
    tensors = {k: t.astype(np.dtype(dtype)) for k, t in tiny.tensors.items()}
    assert check_values(convert(tiny.path, tmp_path / "out", progress=False), tensors) == set(tensors)


def test_torch_is_not_imported_for_safetensors(tiny, tmp_path):
    code = (
        "import sys; from llava_jax.cli import main; assert main(['convert', *sys.argv[1:]]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tiny.path), "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model."])
def test_stage_1_projector_over_a_base(tmp_path, prefix):
    torch = pytest.importorskip("torch")
    tiny = Checkpoint(tmp_path, tower=False, mm_patch_merge_type="flat", image_aspect_ratio="square")
    base, stage_1 = tmp_path / "base", {}
    base.mkdir()
    for file in ("model.safetensors", "tokenizer.model", "generation_config.json"):
        shutil.move(tiny.path / file, base / file)
    for name in [n for n in tiny.tensors if "mm_projector" in n]:
        stage_1[name.replace("model.", prefix, 1)] = torch.from_numpy(tiny.tensors[name].astype(np.float32))
    torch.save(stage_1, tiny.path / "mm_projector.bin")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer"):
        convert(tiny.path, tmp_path / "out", progress=False)
    (tiny.path / "tokenizer.model").write_bytes(tokenizer_model(stem="another"))
    with pytest.raises(FileNotFoundError, match="stage-1 projector: give its language model with --model-base"):
        convert(tiny.path, tmp_path / "out", progress=False)
    base_tensors = {n: t for n, t in tiny.tensors.items() if "mm_projector" not in n}
    save_file(base_tensors, base / "model.safetensors")
    output = convert(tiny.path, tmp_path / "out", model_base=str(base), progress=False)
    tensors = {n: t.astype(np.float32) if "mm_projector" in n else t for n, t in tiny.tensors.items()}
    clip = {n.replace("vision_model.", TOWER): t for n, t in tiny.clip_tensors.items()}
    assert check_values(output, tensors | clip) > set(tensors)
    assert (output / "tokenizer.model").read_bytes() == tokenizer_model()
    with pytest.raises(FileNotFoundError, match=r"no mm_projector\.bin; --model-base is for"):
        convert(with_config(tmp_path, tiny), tmp_path / "out2", model_base=str(base), progress=False)


def with_config(tmp_path, tiny):
    path = tmp_path / "only-config"
    path.mkdir()
    shutil.copy(tiny.path / "config.json", path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny, tmp_path, dtype):
    output = convert(tiny.path, tmp_path / "out", dtype=dtype, progress=False)
    check_values(output, {name: t.astype(np.dtype(dtype)) for name, t in tiny.tensors.items()})
    assert json.loads((output / "llava_jax.json").read_text())["dtype"] == dtype


def test_config_round_trips_through_the_output(tiny, tmp_path):
    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert tiny.config.to_hf() == json.loads((output / "config.json").read_text())


def test_name():
    assert checkpoint_name("liuhaotian/llava-v1.6-vicuna-7b") == "llava-v1.6-vicuna-7b"
    assert checkpoint_name("/x/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert checkpoint_name("/x/llava-run/checkpoint-500") == "llava-run_checkpoint-500"


def test_a_snapshot_in_the_hubs_cache_has_its_repositorys_name(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--liuhaotian--llava-v1.6-34b" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert checkpoint_name(str(snapshot)) == checkpoint_name(f"{snapshot}/") == "llava-v1.6-34b"
    monkeypatch.chdir(snapshot)
    assert checkpoint_name(".") == "llava-v1.6-34b" and checkpoint_name("../..") == "models--liuhaotian--llava-v1.6-34b"
