"""Types and ranges of every JSON file of a checkpoint: wrong keys are named together, published ones go on loading."""

import json
import warnings

import pytest
from published import OLD, PREPROCESSOR, VISION, Checkpoint, hf_checkpoint, tokenizer_model, write_json
from test_config import HF_OLD, VICUNA, refused

from llava_jax.checkpoint import load_config, load_params
from llava_jax.config import GenerationDefaults, LlavaConfig, TextConfig
from llava_jax.config_schema import read_checked
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.published_files import Location, open_checkpoint
from llava_jax.conversion.to_hf import export
from llava_jax.inputs.tokenizer import load_tokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("vocab_size", "365", "a whole number from 1 to"),
        ("hidden_size", "128", "a whole number"),
        ("hidden_size", True, "a whole number"),
        ("hidden_size", 4096.0, "a whole number"),
        ("hidden_size", None, "a whole number"),
        ("hidden_size", [4096], "a whole number"),
        ("hidden_size", 10**30, "a whole number"),
        ("num_hidden_layers", 10**9, "a whole number from 1 to 512"),
        ("rope_scaling", "linear", "an object"),
        ("rope_theta", -1, "a number from 1 to"),
        ("rms_norm_eps", -1, "a number from"),
        ("rms_norm_eps", float("nan"), "a number from"),
        ("rope_theta", float("inf"), "a number from"),
        ("attention_dropout", "0.0", "a number from 0 to 1"),
        ("tie_word_embeddings", "x", "true or false"),
        ("mm_use_im_start_end", "false", "true or false"),
        ("mm_use_im_start_end", 0, "true or false"),
        ("unfreeze_mm_vision_tower", "no", "true or false"),
        ("tokenizer_model_max_length", "4096", "a whole number"),
        ("mm_projector_type", "mlp99999999999x_gelu", "mlpNx_gelu"),
        ("image_grid_pinpoints", [[336, "672"]], "[width, height]"),
        ("image_grid_pinpoints", [[336.0, 672]], "[width, height]"),
        ("image_grid_pinpoints", "[" * 100_000, "[width, height]"),
        ("image_grid_pinpoints", [[336 * 10**6, 336]], "[width, height]"),
        ("mm_vision_tower", 7, "a text"),
        ("mm_vision_tower", "\ud800", "a text"),
        ("architectures", "Llava", "a list"),
        ("bos_token_id", -1, "a whole number"),
        ("bos_token_id", 32000, "no row in the embedding table of vocab_size=32000"),
        ("eos_token_id", [32000, 32001], "no row in the embedding table"),
        ("eos_token_id", "2", "a whole number"),
    ],
)
def test_wrong_keys_of_the_config(key, value, expected):
    refused({**VICUNA, key: value}, "config: ", key, expected)


def test_all_wrong_keys_are_named_together_in_one_line():
    wrong = {"vocab_size": "365", "s2": 1, "rope_scaling": {"type": "linear", "factor": "2"}, "head_dim": 3.5}
    others = {"image_std": [0, 0, 0], "image_mean": "0.5"}
    with pytest.raises(ValueError) as error:
        LlavaConfig.from_hf({**VICUNA, **wrong}, {**VISION, "image_size": 0})
    told = str(error.value)
    assert "vocab_size='365' must be a whole number from 1 to 16777216" in told
    named = ("s2=1", "rope_scaling.factor='2'", "head_dim=3.5", "vision_config.image_size=0")
    assert all(name in told for name in named)
    assert "\n" not in told
    with pytest.raises(ValueError) as error:
        LlavaConfig.from_hf(VICUNA, None, others, {"top_p": 5, "top_k": -1})
    told = str(error.value)
    assert "preprocessor_config.image_std[0]=0 must be a number" in told and "image_mean='0.5' must be a list" in told
    assert "; and 1 more" in told  # five are told


def test_llava_hf_files_of_the_tower_and_generation():
    refused(
        {**HF_OLD, "text_config": {**HF_OLD["text_config"], "hidden_size": "4096"}}, "text_config.hidden_size='4096'"
    )
    refused({**HF_OLD, "vision_config": {**HF_OLD["vision_config"], "patch_size": 0}}, "vision_config.patch_size=0")
    refused({**HF_OLD, "vision_config": "clip"}, "vision_config='clip' must be an object")
    refused({**HF_OLD, "text_config": None}, "text_config=None must be an object")
    refused(VICUNA, "vision_config.patch_size=14 is above image_size=7", vision_config={**VISION, "image_size": 7})
    refused(VICUNA, "generation_config.top_p=5", "a number from 0 to 1", generation_config={"top_p": 5})
    refused(VICUNA, "generation_config.eos_token_id=", generation_config={"eos_token_id": "2"})
    refused(VICUNA, "pad_token_id=32001 has no row", generation_config={"eos_token_id": 2, "pad_token_id": 32001})


def test_configs_made_in_python_are_checked_by_the_same_tables():
    for wrong in (dict(hidden_size="128"), dict(rms_norm_eps=-1), dict(head_dim=3), dict(tie_word_embeddings="x")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TextConfig(**wrong)
    with pytest.raises(ValueError, match=r"generation_config\.top_p=5"):
        GenerationDefaults(top_p=5)


def test_what_published_files_have_is_read():
    """Null where transformers writes it, whole numbers where floats are meant, Llama's old pad_token_id of -1."""
    nulls = ("head_dim", "rope_scaling", "num_key_value_heads", "pad_token_id", "tokenizer_model_max_length", "s2")
    config = LlavaConfig.from_hf({**VICUNA, **dict.fromkeys(nulls), "rope_theta": 10000, "mm_use_im_start_end": None})
    assert (config.text.head_dim, config.text.rope_theta, config.mm_use_im_start_end) == (128, 10000.0, False)
    old = {**VICUNA, "pad_token_id": -1}
    assert LlavaConfig.from_hf(old).text.pad_token_id is None and LlavaConfig.from_hf(old).to_hf() == old
    given = {"eos_token_id": [2, 32000], "pad_token_id": None, "top_p": 1, "top_k": None, "temperature": None}
    assert LlavaConfig.from_hf(VICUNA, generation_config=given).generation.eos_token_ids == (2, 32000)


# ---- before anything is written


def fails(source, tmp_path, *mentioned, kind=ValueError, **options):
    with pytest.raises(kind) as error:
        convert(source, tmp_path / "place" / "out", progress=False, **options)
    assert all(text in str(error.value) for text in mentioned), str(error.value)
    assert "\n" not in str(error.value) and not list((tmp_path / "place").glob("*"))


@pytest.fixture(autouse=True)
def place(tmp_path):
    (tmp_path / "place").mkdir()


def test_the_small_files_are_read_before_the_weights(tiny, tmp_path):
    (tiny.path / "model.safetensors").write_bytes(b"nonsense")
    tokenizer = tiny.path / "tokenizer.model"
    write_json(tiny.path / "generation_config.json", {"top_p": 5})
    fails(tiny.path, tmp_path, str(tiny.path), "generation_config.top_p=5 must be a number from 0 to 1")
    write_json(tiny.path / "generation_config.json", {})
    tokenizer.write_bytes(tokenizer_model()[:40])
    fails(tiny.path, tmp_path, "tokenizer.model (40 bytes) is not a SentencePiece model; download it again")
    tokenizer.write_bytes(LFS)
    fails(tiny.path, tmp_path, "tokenizer.model", "is a git-LFS pointer, not a SentencePiece model; download it again")
    tokenizer.write_bytes(tokenizer_model())
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.json", "config.json"):
        (tiny.path / name).write_bytes(LFS)
        fails(tiny.path, tmp_path, f"{name}: not JSON (a git-LFS pointer); get the file again")
        (tiny.path / name).unlink()


def test_every_id_of_the_tokenizer_has_a_row(tiny, tmp_path):
    for name, content, token in (
        ("added_tokens.json", {"<pad>": 30, "<image>": 29}, "'<pad>' is 30"),
        ("tokenizer.json", {"added_tokens": [{"id": 31, "content": "<x>"}]}, "'<x>' is 31"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"77": {"content": "<y>"}}}, "'<y>' is 77"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<z>"]}, "'<z>' is 30"),
    ):
        write_json(tiny.path / name, content)
        fails(tiny.path, tmp_path, str(tiny.path), token, "no row in the embedding table of vocab_size=30")
        (tiny.path / name).unlink()
    (tiny.path / "tokenizer.model").write_bytes(tokenizer_model(32))
    fails(tiny.path, tmp_path, "'word30' is 30, 'word31' is 31")


def test_rows_that_are_more_and_tokens_that_loading_adds_are_fine(tmp_path):
    tiny = Checkpoint(tmp_path, mm_use_im_start_end=True, mm_use_im_patch_token=True)  # loading adds them, and rows
    convert(tiny.path, tmp_path / "out", progress=False)
    (tiny.path / "tokenizer.model").write_bytes(tokenizer_model(20))  # the table is padded
    write_json(tiny.path / "added_tokens.json", {"<image>": 20, "<pad>": 29})
    convert(tiny.path, tmp_path / "padded", progress=False)


def test_weight_map_that_leads_outside(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for wrong in ("/etc/passwd", "../x.safetensors", "a/../../x.safetensors", "a\0b", 7, None):
        write_json(index, {"weight_map": {"a.weight": wrong}})
        with pytest.raises(ValueError, match=r"index\.json: weight_map\['a\.weight'\]=.* must be a file in the .* own"):
            open_checkpoint(Location("c", tmp_path))
    for wrong in ({}, {"weight_map": "x"}, {"weight_map": []}):
        write_json(index, wrong)
        with pytest.raises(ValueError, match=r"index\.json: .*weight_map"):
            open_checkpoint(Location("c", tmp_path))


def test_names_that_are_no_text(tiny, tmp_path):
    fails(f"{tiny.path}\udcff", tmp_path, "source: ", "not UTF-8")
    with pytest.raises(ValueError, match=r"--output: .* not UTF-8"):
        convert(tiny.path, f"{tmp_path}/\udcff", progress=False)
    fails("~nobody-of-this-name/llava", tmp_path, "no such directory", kind=FileNotFoundError)


# ---- what was converted


@pytest.fixture
def converted(tiny, tmp_path):
    return convert(tiny.path, tmp_path / "converted", progress=False)


def test_a_converted_directory_is_checked_as_a_published_one(converted):
    changes = {
        "config.json": ({"rope_theta": -1}, "rope_theta=-1 must be"),
        "vision_config.json": ({"image_size": 0}, "vision_config.image_size=0 must be"),
        "preprocessor_config.json": ({"image_std": [0, 0, 0]}, r"preprocessor_config.image_std\[0\]=0 must be"),
        "generation_config.json": ({"top_p": "1"}, "generation_config.top_p='1' must be"),
        "llava_jax.json": ({"name": 5, "layout": "x"}, "layout='x' is not supported; .*; name=5 must be a text"),
    }
    for name, (change, message) in changes.items():
        file = converted / name
        before = file.read_text()
        write_json(file, json.loads(before) | change)
        with pytest.raises(ValueError, match=message) as error:
            load_config(converted)
        assert str(converted) in str(error.value)
        with pytest.raises(ValueError, match=message):
            export(converted, converted.parent / "back", progress=False)
        file.write_text(before)
    assert not (converted.parent / "back").exists()
    write_json(converted / "tokenizer_config.json", {"add_bos_token": "no", "bos_token": 3})
    with pytest.raises(ValueError, match=r"tokenizer_config.json: bos_token=3 must be .*; add_bos_token='no' must be"):
        load_tokenizer(converted)


def test_training_options_are_checked_when_they_are_read(tmp_path):
    write_json(tmp_path / "train_options.json", {"model_path": "m", "lora_r": "64", "lora_alpha": 16})
    with pytest.raises(ValueError, match=r"has no 'lora_dropout', 'unfreeze_mm_vision_tower'; lora_r='64' must be"):
        read_checked(tmp_path / "train_options.json")


def test_loading_notices_a_small_file_that_has_changed(converted):
    config = load_config(converted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_params(converted, config)
    edited = json.loads((converted / "config.json").read_text()) | {"rope_theta": 500000.0}
    write_json(converted / "config.json", edited)
    with pytest.warns(UserWarning, match=r"config.json: not what the conversion wrote .* if nobody edited it, convert"):
        load_params(converted, config)
    data = bytearray((converted / "tokenizer.model").read_bytes())
    data[-3] ^= 1
    (converted / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer.model: not what the conversion wrote .*; convert the checkpoint"):
        load_params(converted, config)


def test_llava_hf_directories_go_through_the_same(tmp_path):
    path, _ = hf_checkpoint(tmp_path, *OLD)
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", config | {"vision_config": {**VISION, "num_hidden_layers": 10**9}})
    fails(path, tmp_path, "vision_config.num_hidden_layers=1000000000 must be a whole number from 1 to 512")
    write_json(path / "config.json", config)
    write_json(path / "preprocessor_config.json", {**PREPROCESSOR, "image_std": [1, 1, float("nan")]})
    fails(path, tmp_path, "preprocessor_config.image_std[2]=nan must be a number")
    write_json(path / "preprocessor_config.json", [])
    fails(path, tmp_path, "preprocessor_config.json: a JSON object was expected, not list")
