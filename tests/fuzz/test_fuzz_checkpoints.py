"""Checkpoints with something wrong in them: converted or loaded, or refused with one clear line and nothing left."""

import json
import shutil
from pathlib import Path

import pytest
from fuzz import odd
from make_7b import write_shards
from published import PREPROCESSOR, TEXT, VISION, Checkpoint, tokenizer_model, write_json

from llava_jax.checkpoint import load_config
from llava_jax.conversion import checksums, published_files
from llava_jax.conversion.from_hf import convert, make_plan, read_published
from llava_jax.conversion.to_hf import export
from llava_jax.inputs.tokenizer import load_tokenizer

TOKEN = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
SMALL = {  # whatever is read, as published files have it
    "generation_config.json": {"eos_token_id": [2, 3], "pad_token_id": 0, "top_p": 0.6, "top_k": 50},
    "tokenizer_config.json": {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {"2": TOKEN, "29": {**TOKEN, "content": "<image>"}},
        "additional_special_tokens": ["<image>", {**TOKEN, "content": "word5"}],
        "eos_token": TOKEN,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "legacy": False,
        "pad_token": None,
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": TOKEN, "unk_token": "<unk>"},
    "added_tokens.json": {"<image>": 29},
    "tokenizer.json": {"added_tokens": [{"id": 29, **TOKEN, "content": "<image>"}], "model": {}},
    "processor_config.json": {"image_processor": {"image_mean": [0.5, 0.5, 0.5]}, "patch_size": 14},
}
MORE_TEXT = {
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 64, "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 10000,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False,
}  # fmt: skip
MORE_LLAVA = {
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "s2": False, "s2_scales": "28,56", "tokenizer_model_max_length": 64,
    "tokenizer_padding_side": "right",
}  # fmt: skip
HF = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[28, 56], [56, 28]],
    "model_type": "llava_next",
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama", **TEXT, **MORE_TEXT},
    "vision_config": VISION,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def refusal(function, *arguments, **keywords):
    """As `odd.refusal_of`; a table of all the tensors that do not fit has lines of its own."""

    def run():
        try:
            function(*arguments, **keywords)
        except ValueError as error:
            if " does not fit its config.json:\n" not in str(error):
                raise

    return odd.refusal_of(run)


def wrong_json(rng, valid) -> bytes:
    """A JSON file with one or two wrong values, or damaged."""
    if rng.random() < 0.1:
        return odd.damaged(rng, json.dumps(valid).encode())
    for _ in range(rng.choice((1, 1, 2))):
        valid = odd.changed(rng, valid)
    return odd.dump(valid).encode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tiny = Checkpoint(tmp_path_factory.mktemp("fuzz"), **MORE_TEXT, **MORE_LLAVA)
    for name, content in SMALL.items():
        write_json(tiny.path / name, content)
    read_all(tiny.path, tiny.clip)  # all is well
    return tiny


def read_all(path, tower):
    return read_published(str(path), vision_tower=str(tower))


def each(numbers, name):
    """(what a failure calls the case, its generator) of each number."""
    return ((f"{name} {number}", odd.generator(name, number)) for number in numbers)


@odd.cases(120, 4000)
def test_published_json(tiny, numbers, tmp_path):
    """0.9 s. A tensor's header is not looked at: see below."""
    shutil.copytree(tiny.path, tmp_path / "c")
    shutil.copytree(tiny.clip, tmp_path / "tower")
    contents = {tmp_path / "c" / name: content for name, content in SMALL.items()}
    contents[tmp_path / "c" / "config.json"] = tiny.published
    contents[tmp_path / "tower" / "config.json"] = {"vision_config": VISION}
    contents[tmp_path / "tower" / "preprocessor_config.json"] = PREPROCESSOR
    refused = 0
    for case, rng in each(numbers, "published"):
        file = rng.choice([*contents, tmp_path / "c" / "config.json", tmp_path / "c" / "tokenizer_config.json"])
        before = file.read_bytes()
        odd.write(file, wrong_json(rng, contents[file]))
        if rng.random() < 0.5:
            (tmp_path / "c" / "tokenizer_config.json").rename(tmp_path / "kept")  # then the older files are read
        try:
            refused += refusal(read_all, tmp_path / "c", tmp_path / "tower") is not None
        except BaseException as error:
            error.add_note(f"{case}: {file.name} {file.read_bytes()[:1000]!r}")
            raise
        if (tmp_path / "kept").exists():
            (tmp_path / "kept").rename(tmp_path / "c" / "tokenizer_config.json")
        file.write_bytes(before)
    assert refused > len(numbers) / 4


@odd.cases(60, 2000)
def test_llava_hf_json(tiny, numbers, tmp_path):
    shutil.copytree(tiny.path, tmp_path / "c")
    for case, rng in each(numbers, "hf"):
        odd.write(tmp_path / "c" / "config.json", wrong_json(rng, HF))
        odd.write(tmp_path / "c" / "preprocessor_config.json", wrong_json(rng, PREPROCESSOR))
        try:
            refusal(read_published, str(tmp_path / "c"))
        except BaseException as error:
            error.add_note(case)
            raise


@odd.cases(60, 1500)
def test_weights_index_and_tokenizer(tiny, numbers, tmp_path):
    """Damaged bytes, and an index and headers that say something else; nothing is converted."""
    shutil.copytree(tiny.path, tmp_path / "c")
    weights, tokenizer = tmp_path / "c" / "model.safetensors", tmp_path / "c" / "tokenizer.model"
    whole, proto = weights.read_bytes(), tokenizer_model()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    write_shards(sharded, {name: t.shape for name, t in tiny.tensors.items()}, 4000)
    index = sharded / "model.safetensors.index.json"
    honest = json.loads(index.read_bytes())
    for case, rng in each(numbers, "weights"):
        kind = rng.randrange(5)
        try:
            if kind == 0:
                weights.write_bytes(odd.damaged(rng, whole[:end]) + whole[end:])
            elif kind == 1:
                text = wrong_json(rng, header)
                weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
            elif kind == 2:
                text = json.dumps({"__metadata__": {}, **rng.choice(({}, {"x": header["lm_head.weight"]}))}).encode()
                weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
            if kind < 3:
                refusal(published_files.open_checkpoint, published_files.Location("c", tmp_path / "c"))
                if number_of(case) % 10 == 0:  # it takes the time of ten
                    refusal(make_plan, read_all(tmp_path / "c", tiny.clip), None)
            elif kind == 3:
                odd.write(index, wrong_json(rng, honest))
                refusal(published_files.open_checkpoint, published_files.Location("sharded", sharded))
            else:
                tokenizer.write_bytes(odd.damaged(rng, proto))
                refusal(read_all, tmp_path / "c", tiny.clip)
                tokenizer.write_bytes(proto)
        except BaseException as error:
            error.add_note(case)
            raise


def number_of(case: str) -> int:
    return int(case.split()[-1])


@odd.cases(4, 150)
def test_whole_conversions(tiny, numbers, tmp_path):
    """0.3 s each. What is refused leaves nothing in the place of the output; what is converted can be loaded."""
    for case, rng in each(numbers, "conversion"):
        source, output = tmp_path / "c", tmp_path / "place" / "out"
        shutil.copytree(tiny.path, source)
        output.parent.mkdir()
        file = rng.choice(sorted(source.iterdir()))
        data = file.read_bytes()
        odd.write(
            file,
            odd.damaged(rng, data)
            if rng.random() < 0.5 or file.suffix != ".json"
            else wrong_json(rng, json.loads(data)),
        )
        try:
            if refusal(convert, str(source), str(output), vision_tower=str(tiny.clip), progress=False):
                assert not list(output.parent.iterdir())
            else:
                assert load_config(output) and not checksums.check(output)
        except BaseException as error:
            error.add_note(f"{case} {file.name}")
            raise
        shutil.rmtree(source)
        shutil.rmtree(output.parent)


# ---- what was converted


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "llava-v1.6-tiny"
    return convert(str(tiny.path), str(output), vision_tower=str(tiny.clip), progress=False)


@odd.cases(60, 2000)
def test_loading_a_converted_directory(converted, numbers, tmp_path):
    directory = Path(shutil.copytree(converted, tmp_path / "d"))
    files = sorted(p for p in directory.iterdir() if p.suffix == ".json" and p.name != "checksums.json")
    for case, rng in each(numbers, "converted"):
        file = rng.choice(files)
        before = file.read_bytes()
        odd.write(file, wrong_json(rng, json.loads(before)))
        try:
            if refusal(load_config, directory) is None:
                config = load_config(directory)
                refusal(load_tokenizer, directory, config.name, config.reading)
        except BaseException as error:
            error.add_note(f"{case} {file.name} {file.read_bytes()[:1000]!r}")
            raise
        file.write_bytes(before)


@odd.cases(4, 150)
def test_checking_and_exporting_a_damaged_directory(converted, numbers, tmp_path):
    """0.3 s each."""
    for case, rng in each(numbers, "damaged"):
        directory = Path(shutil.copytree(converted, tmp_path / "d"))
        file = rng.choice([p for p in sorted(directory.rglob("*")) if p.is_file()])
        data = file.read_bytes()
        json_file = file.suffix == ".json" and rng.random() < 0.5
        odd.write(file, wrong_json(rng, json.loads(data)) if json_file else odd.damaged(rng, data))
        try:
            changed = file.read_bytes() != data
            lines = checksums.check(directory)
            assert all("\n" not in line and len(line) < 2000 for line in lines)
            assert lines or not changed or "params" in str(file)
            if refusal(export, directory, tmp_path / "out", progress=False):
                assert not (tmp_path / "out").exists()
        except BaseException as error:
            error.add_note(f"{case} {file.relative_to(directory)}")
            raise
        shutil.rmtree(directory)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
