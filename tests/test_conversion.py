"""Published checkpoints, of every layout, into llava_jax directories: exact values, and clear errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from make_7b import ROOT, decoder_shapes, projector_shapes, tower_shapes, write_shards
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import llava_jax.conversion.from_hf as from_hf
from llava_jax.config import LlavaConfig
from llava_jax.conversion import key_table, sources
from llava_jax.conversion.from_hf import checkpoint_name, convert
from llava_jax.conversion.key_table import Rule, TensorInfo

TOWER = "model.vision_tower.vision_tower.vision_model."
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
}
PREPROCESSOR = {"crop_size": 28, "size": 28, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def write_json(path, value):
    path.write_text(json.dumps(value))


def random_tensors(shapes, dtype=ml_dtypes.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_clip(directory, seed=7, prefix="vision_model.", dtype=np.float32):
    """A CLIP directory, text model and all, and its tensors."""
    directory.mkdir()
    write_json(directory / "config.json", {"model_type": "clip", "vision_config": VISION, "text_config": {}})
    write_json(directory / "preprocessor_config.json", PREPROCESSOR)
    vision = LlavaConfig.from_hf(config_dict("unused"), VISION).vision
    tensors = random_tensors(tower_shapes(vision, prefix), dtype, seed)
    others = {
        "logit_scale": (),
        "visual_projection.weight": (4, 8),
        "text_projection.weight": (4, 8),
        "text_model.final_layer_norm.bias": (8,),
        "text_model.embeddings.token_embedding.weight": (9, 8),
    }
    tensors |= {name: np.ones(shape, np.float32) for name, shape in others.items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(5)[None]
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, directory / "model.safetensors")
    return tensors


def config_dict(tower, **changes):
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **TEXT,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 8,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 56], [56, 28]],
        "unfreeze_mm_vision_tower": True,
    }
    return {**config, **changes}


def liuhaotian_shapes(config, tower=True):
    names = {"linear": ("model.mm_projector",), "identity": ()}.get(
        config.mm_projector_type, tuple(f"model.mm_projector.{2 * n}" for n in range(config.projector_depth))
    )
    shapes = decoder_shapes(config.text, head=None if config.text.tie_word_embeddings else "")
    shapes |= projector_shapes(config, names) | (tower_shapes(config.vision, TOWER) if tower else {})
    return shapes | ({"model.image_newline": (config.text.hidden_size,)} if config.has_image_newline else {})


class Checkpoint:
    """A tiny published checkpoint under `tmp_path`: `path`, `clip`, its parsed `config` and its `tensors`."""

    def __init__(self, tmp_path, tower=True, dtype=ml_dtypes.bfloat16, **changes):
        self.clip = tmp_path / "clip"
        self.clip_tensors = write_clip(self.clip)
        self.path = tmp_path / "llava-v1.6-tiny"
        self.path.mkdir()
        self.published = config_dict(self.clip, **changes)
        self.config = LlavaConfig.from_hf(self.published, VISION)
        self.tensors = random_tensors(liuhaotian_shapes(self.config, tower), dtype)
        write_json(self.path / "config.json", self.published)
        write_json(self.path / "generation_config.json", {"eos_token_id": 2})
        (self.path / "tokenizer.model").write_bytes(b"tokens")
        self.save()

    def save(self):
        save_file(self.tensors, self.path / "model.safetensors")


@pytest.fixture
def tiny(tmp_path):
    return Checkpoint(tmp_path)


def read_params(output):
    return flatten_dict(ocp.load(Path(output).absolute() / "params"), sep="/")


def original_name(path):
    """A parameter's liuhaotian name, worked out the other way round than the table does."""
    name = path.replace("/", ".").replace("layers_", "layers.")
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("kernel", "scale", "embedding", "position_embedding"):
        name = name if leaf == "position_embedding" else name.rsplit(".", 1)[0]
        name += ".weight"
    if name.startswith("vision_tower."):
        return TOWER + name.removeprefix("vision_tower.").replace("layers.", "encoder.layers.", 1)
    for n in range(1, 5):
        name = name.replace(f"mm_projector.linear_{n}", f"model.mm_projector.{2 * n - 2}")
    if "lm_head" in name:
        return "lm_head.weight"
    return "model.image_newline" if name == "image_newline" else name.replace("language_model.", "model.")


def check_values(output, tensors, name_of=original_name):
    """Bit for bit: every parameter is its tensor, turned where the layout says; every tensor is used."""
    params, used = read_params(output), set()
    for path, value in params.items():
        name = name_of(path)
        expected = tensors[name]
        if path.endswith("kernel"):
            expected = expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected.T
        assert value.dtype == expected.dtype, path
        assert value.shape == expected.shape, path
        assert np.asarray(value).tobytes() == np.ascontiguousarray(expected).tobytes(), path
        used.add(name)
    return used


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
        "reading": "original",
        "layout": "liuhaotian",
        "source": str(tiny.path),
        "dtype": "bfloat16",
    }
    files = {"config.json", "generation_config.json", "tokenizer.model", "vision_config.json", "llava_jax.json"}
    assert {p.name for p in output.iterdir()} == files | {"preprocessor_config.json", "params"}
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


def hf_checkpoint(tmp_path, decoder, head, tower, projector, newline, kind="llava_next"):
    """A tiny llava-hf checkpoint under the given prefixes, and the original name of each of its tensors."""
    path = tmp_path / "llava-hf-tiny"
    path.mkdir()
    config = {
        "model_type": kind,
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": VISION,
        "image_grid_pinpoints": [[28, 56], [56, 28]],
    }
    write_json(path / "config.json", config)
    write_json(path / "preprocessor_config.json", PREPROCESSOR)
    (path / "tokenizer.json").write_text("{}")
    parsed = LlavaConfig.from_hf(config)
    linears = tuple(f"{projector}linear_{n}" for n in (1, 2))
    shapes = decoder_shapes(parsed.text, decoder, head) | tower_shapes(parsed.vision, tower)
    shapes |= projector_shapes(parsed, linears) | ({newline: (16,)} if kind == "llava_next" else {})
    originals = decoder_shapes(parsed.text) | tower_shapes(parsed.vision, TOWER)
    originals |= projector_shapes(parsed, ("model.mm_projector.0", "model.mm_projector.2"))
    originals |= {"model.image_newline": (16,)} if kind == "llava_next" else {}
    tensors = random_tensors(shapes, np.float16)
    save_file(tensors, path / "model.safetensors")
    return path, dict(zip(originals, tensors.values(), strict=True))


OLD = (
    "language_model.model.",
    "language_model.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "image_newline",
)
NEW = (
    "model.language_model.",
    "",
    "model.vision_tower.vision_model.",
    "model.multi_modal_projector.",
    "model.image_newline",
)
FIVE = (*OLD[:2], "vision_tower.", *OLD[3:])  # as transformers 5 saves
BARE = (*NEW[:2], "model.vision_tower.", *NEW[3:])


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
    (path / "tokenizer.json").write_text("{}")

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
    monkeypatch.setattr(sources, "_snapshot", offline)
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


def offline(repo, revision, patterns):
    raise FileNotFoundError(f"{repo}: offline")


def test_config_without_tower(tmp_path):
    tiny = Checkpoint(tmp_path)
    tiny.published["mm_vision_tower"] = None
    write_json(tiny.path / "config.json", tiny.published)
    with pytest.raises(ValueError, match=r"names no mm_vision_tower; .* --vision-tower"):
        convert(tiny.path, tmp_path / "out", progress=False)


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
    (tiny.path / "tokenizer.model").write_bytes(b"not this one")
    with pytest.raises(FileNotFoundError, match="stage-1 projector: give its language model with --model-base"):
        convert(tiny.path, tmp_path / "out", progress=False)
    base_tensors = {n: t for n, t in tiny.tensors.items() if "mm_projector" not in n}
    save_file(base_tensors, base / "model.safetensors")
    output = convert(tiny.path, tmp_path / "out", model_base=str(base), progress=False)
    tensors = {n: t.astype(np.float32) if "mm_projector" in n else t for n, t in tiny.tensors.items()}
    clip = {n.replace("vision_model.", TOWER): t for n, t in tiny.clip_tensors.items()}
    assert check_values(output, tensors | clip) > set(tensors)
    assert (output / "tokenizer.model").read_bytes() == b"tokens"
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


def test_float16_overflow(tiny, tmp_path):
    tiny.tensors["model.norm.weight"][3] = 1e30
    tiny.save()
    with pytest.raises(ValueError, match="language_model/norm/scale has values beyond float16's range; use bfloat16"):
        convert(tiny.path, tmp_path / "out", dtype="float16", progress=False)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_name():
    assert checkpoint_name("liuhaotian/llava-v1.6-vicuna-7b") == "llava-v1.6-vicuna-7b"
    assert checkpoint_name("/x/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert checkpoint_name("/x/llava-run/checkpoint-500") == "llava-run_checkpoint-500"


# ---- the hub


def test_hub_cache_offline(tiny, tmp_path):
    """A hub id out of huggingface_hub's cache, at a revision, through the script; and one that is not there."""
    repo = tmp_path / "hub" / "models--somebody--llava-v1.6-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    (repo / "snapshots").mkdir()
    tiny.path.rename(repo / "snapshots" / commit)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "JAX_PLATFORMS": "cpu"}

    def run(*args):
        command = [sys.executable, str(ROOT / "convert" / "from_hf.py"), *args]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    done = run("somebody/llava-v1.6-tiny", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert "bytes" in done.stderr or "B/s" in done.stderr  # the bar
    assert check_values(tmp_path / "llava-v1.6-tiny", tiny.tensors) == set(tiny.tensors)
    failed = run("somebody/else")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: somebody/else: no such directory here, not in the hub's local cache")
    assert "Traceback" not in failed.stderr


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
            sources.locate("somebody/model", "r")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a b", ""])
def test_no_such_directory(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory, and not a hub id"):
        convert(source, tmp_path / "out", progress=False)


def test_revision_is_for_the_hub(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"--revision v1: .* is a local directory"):
        convert(tiny.path, tmp_path / "out", revision="v1", progress=False)


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
    assert "10 keys left over: no rule knows them" in message and "… and 5 more" in message
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


@pytest.mark.parametrize("layout", ["liuhaotian", "llava-hf"])
def test_table_is_reversible_and_unambiguous(layout):
    """Every parameter has a published name, which the same table takes back to it by exactly one rule."""
    config = LlavaConfig.from_hf(config_dict("unused", attention_bias=True), VISION)
    rules = key_table.RULES[layout](config)
    for path in flatten_dict(from_hf.param_shapes(config), sep="/"):
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


def test_config_is_checked_before_any_tensor(tiny, tmp_path):
    (tiny.path / "model.safetensors").write_bytes(b"nonsense")
    write_json(tiny.path / "config.json", {**tiny.published, "mm_projector_type": "qformer"})
    with pytest.raises(ValueError, match="mm_projector_type='qformer' is not supported"):
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
    fails(ValueError, r"config.json: not valid JSON \(.*\); get the file again")
    (tiny.path / "config.json").write_text("[]")
    fails(ValueError, "config.json: a JSON object was expected, not list")
    (tiny.path / "config.json").unlink()
    fails(FileNotFoundError, "there is no config.json")


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


def test_torch_is_not_imported_for_safetensors(tiny, tmp_path):
    code = (
        "import sys; from llava_jax.conversion.from_hf import main; main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tiny.path), "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


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
    fails(ValueError, "has no weight_map", {"metadata": {}})
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


def test_default_output_is_the_name(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert convert(tiny.path, progress=False) == tmp_path / "here" / "llava-v1.6-tiny"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="--output"):  # the source itself
        convert("llava-v1.6-tiny", progress=False)


def test_disk_space(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough disk space: \d+ bytes .* are needed, 1000 "):
        convert(tiny.path, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


# Converts, saying "half" when half the tensors are written, and then waits to be killed (or for its input to end).
STOP_HALFWAY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
from llava_jax import checkpoint
from llava_jax.conversion import from_hf
checkpoint.BATCH_BYTES = 2000
leaves = from_hf._leaves
def halfway(plan, bar):
    for n, leaf in enumerate(leaves(plan, bar)):
        if n == len(plan.tensors) // 2:
            print("half", flush=True)
            sys.stdin.read()
        yield leaf
from_hf._leaves = halfway
from_hf.main(sys.argv[1:])
"""


def start_and_stop_halfway(tiny, output):
    command = [sys.executable, "-c", STOP_HALFWAY, str(tiny.path), "--output", str(output)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    while (line := process.stdout.readline()) != "half\n":
        assert line or process.poll() is None, process.stderr.read()
    return process


def test_killed_and_run_again(tiny, tmp_path):
    output = tmp_path / "out"
    process = start_and_stop_halfway(tiny, output)
    with pytest.raises(FileExistsError, match="another conversion is writing it"):
        convert(tiny.path, output, progress=False)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    left = list(tmp_path.glob(".*"))
    assert len(left) == 1 and not (left[0] / "llava_jax.json").exists() and not (left[0] / "params").exists()
    (left[0] / "stale").write_text("x")
    assert check_values(convert(tiny.path, output, progress=False), tiny.tensors) == set(tiny.tensors)
    assert not (output / "stale").exists() and not list(tmp_path.glob(".*"))


def test_two_at_once(tiny, tmp_path):
    output = tmp_path / "out"
    process = start_and_stop_halfway(tiny, output)
    with pytest.raises(FileExistsError, match="another conversion is writing it"):
        convert(tiny.path, output, progress=False)
    _, errors = process.communicate("")
    assert process.returncode == 0, errors
    assert check_values(output, tiny.tensors) == set(tiny.tensors)


def test_interrupted_by_ctrl_c_leaves_nothing(tiny, tmp_path):
    process = start_and_stop_halfway(tiny, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while list(tmp_path.glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_streams_in_batches(tiny, tmp_path, monkeypatch):
    """No more tensors are held than a batch has room for, however many there are."""
    written = []
    save = ocp.partial.save
    monkeypatch.setattr(from_hf.checkpoint, "BATCH_BYTES", 4000)
    monkeypatch.setattr(ocp.partial, "save", lambda path, tree: (written.append(tree), save(path, tree)))
    output = convert(tiny.path, tmp_path / "out", progress=False)
    sizes = [[leaf.nbytes for leaf in flatten_dict(tree).values()] for tree in written]
    assert len(sizes) > 3 and all(sum(batch) < 4000 + max(batch) for batch in sizes)
    assert check_values(output, tiny.tensors) == set(tiny.tensors)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        from_hf.main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--output", "--revision", "--dtype", "--vision-tower", "--model-base"))


def test_config_round_trips_through_the_output(tiny, tmp_path):
    output = convert(tiny.path, tmp_path / "out", progress=False)
    assert tiny.config.to_hf() == json.loads((output / "config.json").read_text())
