"""Converted checkpoints in the layout that they did not come in: same answers there, or one clear error."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from published import OLD, Checkpoint, hf_checkpoint, read_params, write_json
from test_export import read_tensors, there_and_back

from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.to_hf import export
from llava_jax.inputs.image import load_image


@pytest.mark.parametrize(
    "variant", ["mistral", *(pytest.param(name, marks=pytest.mark.long) for name in ("vicuna", "llava15"))]
)
def test_transformers_answers_the_same(converted, model, pictures, tmp_path, variant):
    """Exported from the original's layout: every key is known, and the greedy tokens are ours."""
    torch = pytest.importorskip("torch")
    import transformers as tf

    next_ = variant != "llava15"
    kind = tf.LlavaNextForConditionalGeneration if next_ else tf.LlavaForConditionalGeneration
    directory = export(converted(variant), tmp_path / f"llava-{variant}-hf", layout="llava-hf", progress=False)
    options = dict(dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
    theirs, info = kind.from_pretrained(directory, **options)
    assert not any(info.values()), info
    assert getattr(theirs.config.text_config, "sliding_window", None) is None
    processor = tf.AutoProcessor.from_pretrained(directory, backend="pil")
    llava, params = model(variant)
    ids = llava.prompt_ids("What is shown in this image?", [(1, 1)])
    image = load_image(pictures["chelsea"])
    inputs = processor.image_processor(images=[image], return_tensors="pt")
    features = theirs.get_image_features(**inputs, return_dict=True).pooler_output
    count, at = sum(len(one) for one in features), ids.index(-200)
    token = theirs.config.image_token_id
    assert processor.image_token_id == token == 32000
    prompt = processor(images=[image], text="a <image>", return_tensors="pt")["input_ids"][0].tolist()
    assert prompt.count(token) == count
    full = torch.tensor([ids[:at] + [token] * count + ids[at + 1 :]])
    out = theirs.generate(input_ids=full, **inputs, do_sample=False, max_new_tokens=16, eos_token_id=2, pad_token_id=0)
    ours = llava.generate_tokens(params, [ids], [image], max_new_tokens=16)[0].tolist()
    assert out[0, full.shape[1] :].tolist() == ours


def test_llava_hf_to_the_original_and_back(checkpoint, converted, tmp_path):
    """vicuna's weights came as llava-hf: as liuhaotian they are vicuna's again, but for the 64 words more."""
    clip = checkpoint("vicuna")[0] + "-clip"
    arguments = dict(layout="liuhaotian", vision_tower=clip, dtype="bfloat16", progress=False)
    back = export(converted("hf-next"), tmp_path / "llava-back", **arguments)
    tensors, config = read_tensors(back), json.loads((back / "config.json").read_text())
    vicuna = Path(checkpoint("vicuna")[0])
    expected = read_tensors(vicuna)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:32000]
    assert set(tensors) == set(expected)
    assert all(np.array_equal(tensors[name], expected[name]) for name in tensors)
    original = json.loads((vicuna / "config.json").read_text())
    different = {key for key in config.keys() & original.keys() if config[key] != original[key]}
    assert different == {"vocab_size"}
    params = read_params(convert(back, tmp_path / "again", dtype="float16", progress=False))
    before = read_params(converted("hf-next"))
    assert all(np.array_equal(params[path], before[path]) for path in before) and set(params) == set(before)


def test_grown_words_never_win(converted, tmp_path):
    """The rows that `<image>` needs are the mean of the others, so their logit is never above the largest."""
    tensors = read_tensors(export(converted("vicuna"), tmp_path / "back", layout="llava-hf", progress=False))
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        table = tensors[name]
        assert table.shape == (32064, 96) and table.dtype == ml_dtypes.bfloat16
        mean = table[:32000].astype(np.float64).mean(0)
        assert (table[32000:] == table[32000]).all()
        np.testing.assert_allclose(table[32000].astype(np.float64), mean, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("words, token, rows", [(30, 30, 64), (28, 28, 30)])
def test_image_token_of_a_fast_tokenizer(tiny, tmp_path, words, token, rows):
    """As Llama 3 has it, tokenizer.json alone: `<image>` is the next id, in a row that is there or in new ones."""
    tokenizers = pytest.importorskip("tokenizers")
    import transformers as tf

    (tiny.path / "tokenizer.model").unlink()
    vocabulary = {f"word{n}": n for n in range(words)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "word0")).save(str(tiny.path / "tokenizer.json"))
    write_json(tiny.path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    back, _ = there_and_back(tiny.path, tmp_path, layout="llava-hf")
    config = json.loads((back / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (token, rows)
    assert read_tensors(back)["language_model.lm_head.weight"].shape == (rows, 16)
    tokenizer = tf.AutoTokenizer.from_pretrained(back)
    assert tokenizer.convert_tokens_to_ids("<image>") == token and len(tokenizer) == words + 1
    again = convert(back, tmp_path / "again", progress=False)  # now it is listed
    assert export(again, tmp_path / "twice", progress=False).is_dir()


@pytest.mark.parametrize(
    "variant, told",
    [
        ("s2", "s2=True"),
        ("clspatch", "mm_projector_type='linear', mm_patch_merge_type='flat'"),
        ("spatial", "mm_projector_type='linear', mm_patch_merge_type='spatial'"),
    ],
)
def test_what_llava_hf_cannot_express(converted, tmp_path, variant, told):
    with pytest.raises(ValueError, match="the llava-hf layout cannot express .*" + told):
        export(converted(variant), tmp_path / "back", layout="llava-hf", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_original_names_a_tower(tmp_path, kind):
    """The tower's weights are inside, and the config makes the original read them, frozen or not."""
    path, _ = hf_checkpoint(tmp_path, *OLD, kind=kind)
    converted = convert(path, tmp_path / "converted", progress=False)
    with pytest.raises(ValueError, match=r"names a vision tower, and this one has the shape of none .* --vision-tower"):
        export(converted, tmp_path / "back", layout="liuhaotian", progress=False)
    export(converted, tmp_path / "back", layout="liuhaotian", vision_tower="openai/this", progress=False)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["mm_vision_tower"], config["unfreeze_mm_vision_tower"]) == ("openai/this", True)
    assert (config["torch_dtype"], config["model_type"]) == ("float16", "llava")


def test_vision_tower_renames(tmp_path):
    tiny = Checkpoint(tmp_path, tower=False, unfreeze_mm_vision_tower=False)
    back, _ = there_and_back(tiny.path, tmp_path, vision_tower="/elsewhere")
    assert json.loads((back / "config.json").read_text()) == {**tiny.published, "mm_vision_tower": "/elsewhere"}
