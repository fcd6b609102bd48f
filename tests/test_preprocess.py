"""Ids and labels of training samples against the reference's `llava/train/train.py`, recorded."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_jax.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.tokenizer import LlamaTokenizer
from llava_jax.training.preprocess import preprocess, preprocess_multimodal, training_tokenizer

HERE = Path(__file__).parent / "golden"
GOLDEN = dict(np.load(HERE / "preprocess.npz"))
INPUTS = json.loads(str(GOLDEN["inputs"]))
SETTINGS, SAMPLES, TEMPLATES = (INPUTS[key] for key in ("settings", "samples", "templates"))
DISTINCT = list(dict.fromkeys(TEMPLATES.values()))


def tokenizer_of(model="llama", legacy=False, add_bos_token=True, chatml=False, mm_use_im_start_end=False, **_):
    proto = (HERE / "tokenizers" / model / "tokenizer.model").read_bytes()
    tokenizer = LlamaTokenizer(proto, legacy=legacy, add_bos_token=add_bos_token).add_tokens(["<s>", "</s>", "<unk>"])
    if mm_use_im_start_end:
        tokenizer = tokenizer.add_tokens(["<im_patch>"]).add_tokens(["<im_start>", "<im_end>"])
    if chatml:
        tokenizer = tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    return training_tokenizer(tokenizer)


def recorded(setting):
    """{template: [(ids, which are labelled, outcome) for each sample]}."""
    ids, ends = GOLDEN[f"{setting}/ids"], GOLDEN[f"{setting}/ends"]
    labelled = np.unpackbits(GOLDEN[f"{setting}/labelled"])[: len(ids)].astype(bool)
    outcomes = json.loads(str(GOLDEN[f"{setting}/outcome"]))
    rows = list(zip(np.split(ids, ends[:-1]), np.split(labelled, ends[:-1]), outcomes, strict=True))
    count = len(rows) // len(DISTINCT)
    return {name: rows[i * count : (i + 1) * count] for i, name in enumerate(DISTINCT)}


def run(sample, tokenizer, template, setting):
    conversations, template, image = sample["conversations"], conv_templates[template], "image" in sample
    if image:
        wrap = setting["mm_use_im_start_end"]
        conversations = preprocess_multimodal(conversations, template, mm_use_im_start_end=wrap)
    return preprocess(conversations, tokenizer, template, has_image=image, max_length=setting["max_length"])


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_labels_and_mismatches_of_every_template(name):
    setting, outcomes = SETTINGS[name], []
    tokenizer, samples = tokenizer_of(**setting), SAMPLES[:: setting["every"]]
    want = recorded(name)
    for template in TEMPLATES:
        for sample, (ids, labelled, outcome) in zip(samples, want[TEMPLATES[template]], strict=True):
            outcomes.append(outcome)
            if isinstance(outcome, str):
                with pytest.raises(ValueError, match="conversation"):
                    run(sample, tokenizer, template, setting)
                continue
            got, where = run(sample, tokenizer, template, setting), (template, sample)
            assert got.ids.dtype == got.labels.dtype == np.int64
            assert got.ids.tolist() == ids.tolist(), where
            assert got.labels.tolist() == np.where(labelled, ids, IGNORE_INDEX).tolist(), where
            assert got.mismatch == (outcome and tuple(outcome)), where
    assert {type(outcome) for outcome in outcomes} == {type(None), list, str}


def test_every_template_of_ours_is_recorded_but_two():
    assert set(TEMPLATES) == set(conv_templates) - {"llava_llama_3", "llava_v1_hf"}
    sample, setting = SAMPLES[0], SETTINGS["new"]
    with pytest.raises(ValueError, match="LLaVA does not train with the LLAMA_3 style"):
        run(sample, tokenizer_of(), "llava_llama_3", setting)


@pytest.mark.parametrize("name", SETTINGS)
def test_llava_hfs_template_labels_what_llava_v1_does(name):
    setting, compared = SETTINGS[name] | {"max_length": None}, 0
    tokenizer = tokenizer_of(**setting)
    for sample in SAMPLES[:: setting["every"]]:
        try:
            wanted = run(sample, tokenizer, "llava_v1", setting)
        except ValueError:
            continue
        got = run(sample, tokenizer, "llava_v1_hf", setting)
        assert got.labels[got.labels != IGNORE_INDEX].tolist() == wanted.labels[wanted.labels != IGNORE_INDEX].tolist()
        assert len(got.ids) < len(wanted.ids)  # by the system prompt
        compared += 1
    assert compared > 3


def test_images_move_to_the_front():
    recorded_values = json.loads(str(GOLDEN["multimodal"]))
    assert set(recorded_values) == {"v1", "v1_mmtag"}
    for template, values in recorded_values.items():
        for sample in SAMPLES:
            if "image" in sample:
                turns = preprocess_multimodal(sample["conversations"], conv_templates[template])
                assert [turn["value"] for turn in turns] == values[sample["id"]]
                assert [turn["from"] for turn in turns] == [turn["from"] for turn in sample["conversations"]]


def test_several_images_stay_where_they_are_written():
    said = [{"from": "human", "value": "<image>\nA, <image> B?"}, {"from": "gpt", "value": "See <image>"}]
    both = preprocess_multimodal(said, conv_templates["v1_mmtag"], mm_use_im_start_end=True, num_images=3)
    wrapped = "<Image><im_start><image><im_end></Image>"
    assert both[0]["value"] == f"{wrapped}\nA, {wrapped} B?" and both[1]["value"] == f"{wrapped}\nSee"
    one = preprocess_multimodal(said, conv_templates["v1"])
    assert one[0]["value"] == "<image>\nA,  B?" and said[0]["value"] == "<image>\nA, <image> B?"
    ids = preprocess(both, tokenizer_of(), conv_templates["v1"], has_image=True, max_length=None).ids
    assert np.sum(ids == IMAGE_TOKEN_INDEX) == 3


def test_only_the_answers_have_labels():
    """What the masks come to, said without the reference."""
    tokenizer = tokenizer_of()
    texts = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]
    said = [{"from": role, "value": text} for role, text in texts]
    for template, want in (("v1", "A cat.</s>Yes.</s>"), ("mistral_instruct", "A cat. </s>Yes. </s>")):
        out = preprocess(said, tokenizer, conv_templates[template], has_image=True, max_length=None)
        kept = out.labels[out.labels != IGNORE_INDEX]
        assert tokenizer.decode(kept, skip_special_tokens=False).replace("</s> ", "</s>") == want
        assert np.array_equal(kept, out.ids[out.labels != IGNORE_INDEX]) and out.mismatch is None
    plain = preprocess(said[:2], tokenizer, conv_templates["plain"], has_image=True, max_length=None)
    assert plain.labels[:2].tolist() == [IGNORE_INDEX] * 2 and plain.ids[:2].tolist() == [1, IMAGE_TOKEN_INDEX]
    assert tokenizer.decode(plain.labels[2:]) == "A cat.\n"


def test_long_text_is_cut_off_but_not_with_an_image():
    tokenizer, template = tokenizer_of(), conv_templates["v1"]
    said = [{"from": "human", "value": "Count."}, {"from": "gpt", "value": "one two " * 100}]
    text = preprocess(said, tokenizer, template, has_image=False, max_length=64)
    assert len(text.ids) == 64 and text.mismatch is None and text.labels[-1] == text.ids[-1]
    assert len(preprocess(said, tokenizer, template, has_image=True, max_length=64).ids) > 200
    assert len(preprocess(said, tokenizer, template, has_image=False, max_length=None).ids) > 200


def test_training_takes_the_slow_tokenizer_padded_with_unk():
    """A `<unk>` in the text then counts as padding, as in the reference."""
    fast = replace(
        tokenizer_of(), fast=True, special_tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    )
    tokenizer = training_tokenizer(fast)
    assert fast.pad_token_id is None and tokenizer.pad_token_id == 0 and not tokenizer.fast
    with pytest.raises(ValueError, match=r"tokenizer.model \(SentencePiece\), not str"):
        training_tokenizer("Llama 3")
    said = [{"from": "human", "value": "<unk>"}, {"from": "gpt", "value": "b"}]
    out = preprocess(said, tokenizer, conv_templates["v1"], has_image=False, max_length=None)
    assert out.mismatch == (len(out.ids), len(out.ids) - 1) and np.all(out.labels == IGNORE_INDEX)


@pytest.mark.parametrize(
    ("template", "said", "message"),
    [
        ("v1", [], "conversations: it is empty"),
        ("plain", [("human", "a"), ("gpt", "b")], "plain template takes two turns, the first with <image>; got 2"),
        ("plain", [("human", "<image>")], "plain template takes two turns, .* got 1, the first '<image>'"),
        ("v1", [("human", "a"), ("bot", "b")], "unknown role 'bot'; known: human, gpt"),
        ("mpt", [("system", "a"), ("human", "b")], "unknown role 'system'"),
        ("v1", [("human", "a"), ("human", "b")], r"human and gpt do not alternate: \['human', 'human'\]"),
        ("llama_2", [("human", ""), ("gpt", "b")], "the first turn must be a non-empty message of 'USER'"),
    ],
)
def test_what_cannot_be_trained_on_is_named(template, said, message):
    turns = [{"from": role, "value": text} for role, text in said]
    with pytest.raises(ValueError, match=message):
        preprocess(turns, tokenizer_of(), conv_templates[template], has_image=False, max_length=None)


def test_the_host_side_imports_neither_jax_nor_torch():
    code = (
        "import sys, llava_jax.training.loader; assert not {'jax', 'torch', 'flax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
