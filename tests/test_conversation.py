import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from llava_jax.config import LlavaConfig
from llava_jax.inputs.conversation import (
    SeparatorStyle,
    conv_templates,
    infer_conv_mode,
    pick_conv_mode,
    user_message,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "tokens.npz")
CASES = json.loads(str(GOLDEN["inputs"]))["cases"]
PROMPTS = json.loads(str(GOLDEN["prompts"]))


def conversation(template, case):
    conv = conv_templates[template]
    offset = len(conv.messages)
    if case != "built_in":
        conv, offset = type(conv)(**{**vars(conv), "messages": ()}), 0
    for i, message in enumerate(CASES[case]):
        message = (message[0], None, "Default") if isinstance(message, list) else message
        conv = conv.append_message(conv.roles[(i + offset) % 2], message)
    return conv


@pytest.mark.parametrize("template", PROMPTS)
def test_prompts_equal_the_references(template):
    for case, want in PROMPTS[template].items():
        conv = conversation(template, case)
        if want.startswith("error: "):
            with pytest.raises(ValueError, match="conversation: "):
                conv.get_prompt()
        else:
            assert conv.get_prompt() == want, case


def test_every_template_of_the_reference_is_there_and_two_more():
    assert set(conv_templates) == set(PROMPTS) | {"llava_llama_3", "llava_v1_hf"}


def test_the_prompt_of_llava_hfs_model_card():
    conv = conv_templates["llava_v1_hf"]
    conv = conv.append_message("USER", "<image>\nWhat are these?").append_message("ASSISTANT", None)
    assert conv.get_prompt() == "USER: <image>\nWhat are these? ASSISTANT:"
    conv = conv.replace_last("ASSISTANT", "Cats.").append_message("USER", "Two?").append_message("ASSISTANT", None)
    assert conv.get_prompt() == "USER: <image>\nWhat are these? ASSISTANT: Cats.</s>USER: Two? ASSISTANT:"
    assert conv.stop_str == "</s>"


def test_llama_3_prompt():
    conv = conv_templates["llava_llama_3"]
    conv = conv.append_message("user", "<image>\nHi ").append_message("assistant", "Hello.")
    conv = conv.append_message("user", "Bye").append_message("assistant", None)
    assert conv.get_prompt() == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert conv.stop_str == "<|eot_id|>"


def test_append_message_leaves_the_template_alone():
    conv = conv_templates["llava_v1"]
    longer = conv.append_message(conv.roles[0], "Hello")
    assert conv.messages == () and longer.messages == (("USER", "Hello"),)


def test_llama_2_lstrip_takes_a_set_of_characters():
    conv = conv_templates["llama_2"]
    conv = type(conv)(**{**vars(conv), "sep": "[<INS"}).append_message("USER", "Hello")
    assert conv.get_prompt().startswith("T] <<SYS>>")


@pytest.mark.parametrize("messages", [[("USER", None)], [("ASSISTANT", "Hi")]])
def test_llama_2_needs_a_first_turn_from_the_user(messages):
    conv = conv_templates["llava_llama_2"]
    for role, message in messages:
        conv = conv.append_message(role, message)
    with pytest.raises(ValueError, match=r"first turn must be a non-empty message of 'USER'.*LLAMA_2"):
        conv.get_prompt()


def test_plain_has_no_separator_for_the_models_turn():
    conv = conv_templates["plain"].append_message("", "<image>").append_message("", "A cat.")
    with pytest.raises(ValueError, match=r"turn 1 \(PLAIN style\) has no separator.*set sep2"):
        conv.get_prompt()


def test_stop_str():
    stops = {name: conv.stop_str for name, conv in conv_templates.items()}
    assert stops["llava_v1"] == "</s>" and conv_templates["llava_v1"].sep_style is SeparatorStyle.TWO
    assert stops["llava_v0"] == "###" and stops["chatml_direct"] == "<|im_end|>"
    assert stops["llava_llama_2"] == "<s>" and stops["mistral_instruct"] == "" and stops["plain"] == "\n"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.6-vicuna-7b", "llava_v1"),
        ("llava-v1.5-13b", "llava_v1"),
        ("LLaVA-v1.6-Mistral-7B", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-v1.6-34b-hf", "chatml_direct"),
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("llava-mpt-7b", "mpt"),
        ("llava-13b-v0", "llava_v0"),
        ("llama3-llava-next-8b", "llava_llama_3"),
        ("Meta-Llama-3-llava-v1", "llava_llama_3"),
        ("llava-1.5-7b-hf", "llava_v1_hf"),
        ("llava-1.5-13b-hf", "llava_v1_hf"),
        ("bakLlava-v1-hf", "llava_v1_hf"),
        ("llava-v1.6-mistral-7b-hf", "mistral_instruct"),
        ("llava-v1.6-vicuna-7b-hf", "llava_v1"),
        ("llava-v1.6-vicuna-13b-hf", "llava_v1"),
        ("llama3-llava-next-8b-hf", "llava_llama_3"),
        ("", "llava_v0"),
    ],
)
def test_template_picked_from_the_name(name, mode):
    assert infer_conv_mode(name) == mode == pick_conv_mode(LlavaConfig(name=name))


def test_conv_mode_overrides_and_a_mismatch_warns():
    config = LlavaConfig(name="llava-v1.5-7b")
    with pytest.warns(UserWarning, match="'llava-v1.5-7b' has conv_mode='llava_v1', using 'plain'") as record:
        assert pick_conv_mode(config, "plain") == "plain"
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_conv_mode(config, "llava_v1") == "llava_v1"
        assert pick_conv_mode(config.replace(conv_mode="mpt")) == "mpt"  # what the conversion chose
    with pytest.raises(ValueError, match=r"conv_mode='vicuna' is not known; use one of default, .*llava_llama_3"):
        pick_conv_mode(config, "vicuna")


@pytest.mark.parametrize(
    ("query", "num_images", "wrap", "want"),
    [
        ("What is it?", 1, False, "<image>\nWhat is it?"),
        ("What is it?", 1, True, "<im_start><image><im_end>\nWhat is it?"),
        ("Compare.", 2, False, "<image>\n<image>\nCompare."),
        ("Hello!", 0, True, "Hello!"),
        ("Look at <image> now", 1, True, "Look at <image> now"),
        ("A <image-placeholder> b", 1, False, "A <image> b"),
        ("<image-placeholder>, <image-placeholder>", 2, True, "<im_start><image><im_end>, <im_start><image><im_end>"),
    ],
)
def test_user_message(query, num_images, wrap, want):
    assert user_message(query, num_images, wrap) == want


@pytest.mark.parametrize(
    ("query", "num_images", "placed"), [("<image>", 2, 1), ("<image><image>", 1, 2), ("<image-placeholder>", 0, 1)]
)
def test_user_message_counts_its_images(query, num_images, placed):
    with pytest.raises(ValueError, match=f"has {placed} <image> but there are {num_images} images; write one"):
        user_message(query, num_images)
