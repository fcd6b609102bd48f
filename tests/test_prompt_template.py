"""Which template a checkpoint is asked with: decided once, at its conversion, and kept."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest

import llava_jax
from llava_jax.checkpoint import load_config
from llava_jax.cli import main
from llava_jax.conversion.prompt_template import choose_template
from llava_jax.demo.model import BUNDLED
from llava_jax.inputs.conversation import pick_conv_mode

# In the manner of what stands beside published checkpoints: llava-hf's take parts, a language model's a text.
_IMAGES = "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
_TEXTS = "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
VICUNA = (
    "{% for message in messages %}{{ message.role.upper() + ': ' }}" + _IMAGES + "{% if message.role == 'assistant' %}"
    "{% generation %}" + _TEXTS + "{% endgeneration %}{% else %}" + _TEXTS + "{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    + _IMAGES
    + _TEXTS
    + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "{{ '<|im_start|>system\nAnswer the questions.<|im_end|>' }}"
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + "
    "message.content | trim + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def directory(tmp_path, chat_template=None, file="chat_template.json"):
    if file.endswith(".jinja"):
        (tmp_path / file).write_text(chat_template)
    elif chat_template is not None:
        (tmp_path / file).write_text(json.dumps({"chat_template": chat_template}))
    return tmp_path


@pytest.mark.parametrize(
    ("chat_template", "mode"),
    [(VICUNA, "llava_v1_hf"), (MISTRAL, "mistral_instruct"), (SYSTEM + CHATML, "chatml_direct")],
    ids=["vicuna", "mistral", "chatml"],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_is_recognised(tmp_path, chat_template, mode, file):
    choice = choose_template(directory(tmp_path, chat_template, file), "mine")
    assert (choice.conv_mode, choice.reason, choice.doubt) == (mode, f"recognised by its {file}", None)


def test_several_named_chat_templates_are_the_default_one(tmp_path):
    named = [{"name": "tool_use", "template": CHATML}, {"name": "default", "template": VICUNA}]
    assert choose_template(directory(tmp_path, named), "mine").conv_mode == "llava_v1_hf"


@pytest.mark.parametrize(
    ("chat_template", "mode"), [(CHATML, "chatml_direct"), (LLAMA_3, "llava_llama_3")], ids=["chatml", "llama3"]
)
def test_one_without_a_system_prompt_is_a_guess(tmp_path, chat_template, mode):
    choice = choose_template(directory(tmp_path, chat_template), "mine")
    assert choice.conv_mode == mode and "without the system prompt" in choice.doubt


def test_a_published_name_needs_no_chat_template_and_another_name_yields_to_it(tmp_path):
    folder = directory(tmp_path, VICUNA)
    card = choose_template(folder, "llava-v1.6-vicuna-7b-hf")
    assert card.conv_mode == "llava_v1" and card.doubt is None and "model card" in card.reason
    other = choose_template(folder, "my-llava-v1.5")
    assert other.conv_mode == "llava_v1_hf" and "its name suggests llava_v1" in other.doubt
    asked = choose_template(folder, "my-llava-v1.5", "mpt")
    assert asked.conv_mode == "mpt" and asked.doubt is None
    with pytest.raises(ValueError, match="conv_mode='x' is not known"):
        choose_template(folder, "my-llava-v1.5", "x")


@pytest.mark.parametrize(
    ("chat_template", "why"),
    [
        ("{{ messages }}", "is written like none of the templates here"),
        ("{{ messages", r"cannot be rendered \("),
        ("{{ raise_exception('no') }}", r"cannot be rendered \(TemplateError: no\)"),
        ("nothing", r"cannot be rendered \(it leaves out what is said\)"),
    ],
)
def test_one_that_is_not_recognised_leaves_it_to_the_name(tmp_path, chat_template, why):
    folder = directory(tmp_path, chat_template)
    by_name = choose_template(folder, "llava-v1.5-mine")
    assert by_name.conv_mode == "llava_v1" and re.search(f"{why}.*, so the name decides", by_name.doubt)
    nothing = choose_template(folder, "mine")
    assert nothing.conv_mode == "llava_v0" and "nor does the name 'mine'" in nothing.doubt


def test_a_name_alone(tmp_path):
    known = choose_template(tmp_path, "llava-v1.5-mine")
    assert (known.conv_mode, known.doubt) == ("llava_v1", None)
    unknown = choose_template(tmp_path, "mine")
    assert unknown.conv_mode == "llava_v0" and "nothing in the name 'mine'" in unknown.doubt


def convert_demo(tmp_path, name, *flags):
    """What `llava-jax convert` writes of the bundled model under another name."""
    shutil.copytree(BUNDLED, tmp_path / name)
    output = tmp_path / f"{name}-jax"
    tower = str(tmp_path / name / "tower")
    assert main(["convert", str(tmp_path / name), "--vision-tower", tower, "--output", str(output), *flags]) == 0
    return output


def test_the_choice_is_printed_written_and_used(tmp_path, capsys):
    output = convert_demo(tmp_path, "llava-1.5-7b-hf")
    assert "prompt template: llava_v1_hf (as the model card of llava-1.5-7b-hf has it)" in capsys.readouterr().out
    assert json.loads((output / "llava_jax.json").read_text())["conv_mode"] == "llava_v1_hf"
    llava, _ = llava_jax.load(output)
    assert llava.conversation("Hi", 1).get_prompt() == "USER: <image>\nHi ASSISTANT:"
    assert "conv_mode" not in llava.config.to_hf()


def test_a_guess_is_warned_about_and_a_flag_settles_it(tmp_path):
    with pytest.warns(UserWarning, match="nothing in the name 'mine' .* name it with --conv-mode"):
        output = convert_demo(tmp_path, "mine")
    assert load_config(output).conv_mode == "llava_v0"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = convert_demo(tmp_path, "others", "--conv-mode", "llava_v1")
    assert load_config(output).conv_mode == "llava_v1"


def test_a_directory_of_an_older_llava_jax_goes_by_its_name(converted, tmp_path):
    folder = shutil.copytree(converted("vicuna"), tmp_path / "old")
    manifest = json.loads((folder / "llava_jax.json").read_text())
    assert manifest.pop("conv_mode")
    for conv_mode, name, mode in (
        (None, "llava-v1.6-34b", "chatml_direct"),
        (None, "x", "llava_v0"),
        ("mpt", "x", "mpt"),
    ):
        told = manifest | {"name": name} | ({"conv_mode": conv_mode} if conv_mode else {})
        Path(folder / "llava_jax.json").write_text(json.dumps(told))
        assert pick_conv_mode(load_config(folder)) == mode
    for conv_mode, problem in (
        ("vicuna", "is not known; use one of"),
        (5, "must be a text"),
        (["mpt"], "must be a text"),
    ):
        Path(folder / "llava_jax.json").write_text(json.dumps(manifest | {"conv_mode": conv_mode}))
        with pytest.raises(ValueError, match=f"llava_jax.json: conv_mode=.* {problem}"):
            load_config(folder)
