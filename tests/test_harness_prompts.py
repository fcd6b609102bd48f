"""What lmms-eval's `llava` is asked, as `golden/record_harness.py` recorded it from its source, and what we are."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.evaluation.harness_prompts import conv_template, from_context, from_messages, options_of
from llava_jax.inference.sampling import Greedy, Sample
from llava_jax.inputs.conversation import conv_templates

CASES = json.loads((Path(__file__).parent / "golden/data/harness_prompts.json").read_text("utf-8"))
PICTURES = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(16)]
CONFIG = LlavaConfig.preset("1.6-vicuna-7b")


def messages_of(case):
    """With pictures in their places, as lmms-eval has them."""

    def part(recorded):
        shows = recorded["type"] == "image"
        return {"type": "image", "url": PICTURES[recorded["picture"]]} if shows else recorded

    return [message | {"content": list(map(part, message["content"]))} for message in case["messages"]]


def prompt_of(case, turns):
    return conv_templates[case["conv_template"]].with_turns(turns.texts, turns.system).get_prompt()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['task']}-{case['doc']}")
def test_prompts_are_those_of_llava_to_the_letter(case):
    shown = from_context(case["ctx"], PICTURES[: case["pictures"]])
    assert prompt_of(case, shown) == case["prompt"]
    chat = from_messages(messages_of(case), case["ctx"])
    if case["messages"][0]["role"] == "system":  # which `llava` never sees
        assert chat.system == case["messages"][0]["content"][0]["text"] and prompt_of(case, chat) != case["prompt"]
    else:
        assert chat == shown
    places = shown.texts[0].count("<image>")
    assert len(shown.pictures) == min(places, case["pictures"])
    for continuation, whole in case.get("continuations", ()):
        asked = conv_templates[case["conv_template"]].with_turns(shown.texts, shown.system)
        assert asked.replace_last(asked.roles[1], continuation).get_prompt() == whole


def image(number):
    return {"type": "image", "url": PICTURES[number]}


def text(words):
    return {"type": "text", "text": words}


def test_messages_that_say_more_than_the_context_are_asked_themselves():
    """Turns, a system prompt, and pictures among the words."""
    content = [text("Compare"), image(1), image(0), text("with"), image(2), text("please.")]
    turns = from_messages([{"role": "user", "content": content}], "Compare the pictures.")
    assert turns.texts == ("Compare\n<image> <image>\nwith\n<image>\nplease.",)
    assert turns.pictures == (PICTURES[1], PICTURES[0], PICTURES[2]) and turns.system is None
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(0), text("What is it?")]},
        {"role": "assistant", "content": [text("A cat, <image> or not.")]},
        {"role": "user", "content": "And this?"},
    ]
    turns = from_messages(asked, "What is it?")
    assert turns.texts == ("<image>\nWhat is it?", "A cat, <image> or not.", "And this?")
    assert turns.pictures == (PICTURES[0],) and turns.system == "Be brief."
    placed = [{"role": "user", "content": [image(0), image(1), text("Is <image> like that?")]}]
    assert from_messages(placed, "other words") == (("Is <image> like that?",), (PICTURES[0],), None)


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([], "their roles are"),
        ([{"role": "assistant", "content": "Hi"}], "user and assistant alternate"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "user and assistant alternate"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "not 'video'"),
        ([{"role": "system", "content": [image(0)]}, {"role": "user", "content": "a"}], "LLaVA takes text here"),
        ([{"role": "user", "content": 3}], "content is int"),
        ([{"role": "user", "content": [text(None)]}], "NoneType for its text"),
        ([{"role": "user", "content": [{"type": "image", "url": 3}]}], "and this is int"),
    ],
)
def test_messages_that_cannot_be_asked_are_named(messages, problem):
    with pytest.raises(ValueError, match=problem):
        from_messages(messages, "context")


def test_pictures_come_in_any_form_and_in_their_own_mode(tmp_path):
    path = tmp_path / "gray.png"
    Image.new("L", (4, 3), 7).save(path)
    forms = [str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, np.full((3, 4), 7, np.uint8)]
    pictures = from_context("?", forms).pictures
    assert [picture.size for picture in pictures] == [(4, 3)] * 4
    assert [picture.mode for picture in pictures] == ["L", "L", "L", "RGB"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        from_context("?", ["missing.png"])


def test_options_are_read_as_llava_reads_them():
    """It samples if the temperature is over 0, whatever do_sample says; and `until`, which it drops, is a stop."""
    nothing = options_of(CONFIG, {}, 0)
    assert (nothing.max_new_tokens, nothing.sampling, nothing.stop) == (1024, Greedy(), ())
    greedy = options_of(CONFIG, dict(max_new_tokens=16, temperature=0, top_p=0, num_beams=1, until="\n\n"), 0)
    assert (greedy.max_new_tokens, greedy.sampling, greedy.stop) == (16, Greedy(), ("\n\n",))
    said = [options_of(CONFIG, dict(until=until), 0).stop for until in (["\n\n"], ["\n\n", "Q:"], [], None)]
    assert said == [(), ("\n\n", "Q:"), (), ()]  # the first is what lmms-eval puts where a task says nothing
    drawn = options_of(CONFIG, dict(temperature=0.2, do_sample=False, top_p=None, until=["a", None, ""]), 7)
    assert drawn.stop == ("a",) and isinstance(drawn.sampling, Sample)
    assert (drawn.sampling.top_p, drawn.sampling.top_k, drawn.sampling.seed) == (1, 50, 7)
    assert options_of(CONFIG, dict(temperature=1, top_p=0.5, top_k=3), 0).sampling.top_k == 3
    with pytest.raises(ValueError, match="num_beams=3: there is no beam search here"):
        options_of(CONFIG, dict(num_beams=3), 0)
    with pytest.raises(ValueError, match="max_new_tokens='many'"):
        options_of(CONFIG, dict(max_new_tokens="many"), 0)


def test_the_template_is_that_which_is_given_to_llava():
    names = {
        "llava-v1.6-vicuna-7b": "vicuna_v1",
        "llava-v1.5-13b": "vicuna_v1",
        "llava-v1.6-mistral-7b": "mistral_instruct",
        "llava-v1.6-34b": "chatml_direct",
        "my-llava-v1-tuned": "llava_v1",
    }
    assert {name: conv_template(CONFIG.replace(name=name, conv_mode=None), None) for name in names} == names
    assert conv_template(CONFIG.replace(name="llava-v1.5-7b", conv_mode=None), "llava_v1") == "llava_v1"
