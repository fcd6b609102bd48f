"""The command line, as a user types it."""

import argparse
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import llava_jax
from llava_jax.cli import COMMANDS, add_command, main
from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.scenes import draw
from llava_jax.errors import shortened
from llava_jax.inference.chat import Chat
from llava_jax.training.train_options import TrainOptions

pytestmark = pytest.mark.usefixtures("load_once")


@pytest.fixture(scope="module")
def folder(small_training):
    return str(small_training[0])


def test_ask_prints_what_generate_returns(folder, pictures, capsys):
    image = pictures["chelsea"]
    llava, params = llava_jax.load(folder)
    wanted = llava.generate(params, image, "What is it?", max_new_tokens=8)
    command = ["ask", "--model-path", folder, "--image-file", image, "--query", "What is it?", "--max_new_tokens", "8"]
    capsys.readouterr()  # the fixtures' own
    assert main(command) == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert main([*command, "--temperature", "1", "--top_p", "0.9", "--seed", "3", "--conv-mode", "llava_v0"]) == 0
    assert capsys.readouterr().out != wanted + "\n"


def test_several_images_and_none(folder, pictures, capsys):
    ask = ["ask", "--model-path", folder, "--query", "Compare", "--max_new_tokens", "4"]
    assert main([*ask, "--image-file", f"{pictures['chelsea']},{pictures['chelsea']}"]) == 0
    assert main(ask) == 0
    assert main([*ask, "--image-file", f"{pictures['chelsea']};{pictures['chelsea']}", "--sep", ";"]) == 0
    outs = capsys.readouterr().out.splitlines()
    assert len(outs) >= 3


def test_many_files_are_asked_about_one_by_one(folder, pictures, tmp_path, capsys):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(Path(pictures["chelsea"]).read_bytes()[:2000])
    files = [pictures["chelsea"], str(damaged), f"{pictures['chelsea']},{pictures['coffee']}", "/nowhere.jpg"]
    ask = ["ask", "--model-path", folder, "--query", "What?", "--max_new_tokens", "8", "--image-file", *files]
    capsys.readouterr()
    assert main([*ask, "--json"]) == 3
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    llava, params = llava_jax.load(folder)
    for line, images in zip(lines, (files[0], files[2].split(",")), strict=True):
        wanted = llava.generate(params, images, "What?", max_new_tokens=8)
        image_file = images if isinstance(images, str) else ",".join(images)
        assert line == {"image_file": image_file, "query": "What?", "answer": wanted}
    assert f"llava-jax: error: {damaged}: " in err and "is damaged" in err
    assert "llava-jax: error: /nowhere.jpg: image '/nowhere.jpg': no such file" in err
    uri = "data:image/jpeg;base64," + base64.b64encode(Path(files[0]).read_bytes()).decode()
    assert main([*ask[: -len(files)], files[0], uri, "\udc80.jpg", uri[:-9000]]) == 3
    out, err = capsys.readouterr()
    assert out == f"{files[0]}: {lines[0]['answer']}\n{shortened(uri)}: {lines[0]['answer']}\n"
    assert r"error: \udc80.jpg: " in err and "is damaged" in err and max(map(len, err.splitlines())) < 600


def test_files_that_are_all_missing_are_named_before_the_model_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr(llava_jax, "load", lambda *args, **options: pytest.fail("loaded"))
    command = ["ask", "--model-path", folder, "--query", "What?", "--image-file"]
    capsys.readouterr()  # the fixture's own
    assert main([*command, "/nowhere.jpg", "data:,no picture", "foo://a.jpg,/nowhere.jpg", __file__]) == 3
    assert [line.startswith("llava-jax: error: ") for line in capsys.readouterr().err.splitlines()] == [True] * 4


def typed(monkeypatch, *lines):
    """Standard input for `llava-jax chat`."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_says_what_the_conversation_gives(folder, pictures, monkeypatch, capsys):
    options = dict(max_new_tokens=8)
    llava, params = llava_jax.load(folder)
    talk = llava.chat(params, pictures["chelsea"], **options)
    wanted = [talk.send("What is it?"), talk.send("And behind it?"), llava.chat(params, [], **options).send("Hi")]
    typed(
        monkeypatch, "What is it?", "And behind it?", "/reset", "What is it?", "/image nowhere.jpg",
        "/image http://127.0.0.1:1/a.jpg", "/image foo://a.jpg", "/image data:,a", "", "/image",
        "Hi", f"/image '{pictures['chelsea']}'", "What is it?", "/help", "What? " * 2000, "And behind it?",
    )  # fmt: skip
    capsys.readouterr()
    command = ["chat", "--model-path", folder, "--image-file", pictures["chelsea"], "--max_new_tokens", "8"]
    assert main(command) == 0
    out = capsys.readouterr().out
    answers = [line.split("ASSISTANT: ")[1] for line in out.splitlines() if "ASSISTANT: " in line]
    first, second, alone = wanted
    assert [a.strip() for a in answers[:4]] == [first, second, first, alone]
    assert answers[4].strip() == first and answers[-1].strip() == second  # what was too long was not said
    assert "Connection refused" in out and "'foo' is not known" in out and "'data:,a' is not a picture" in out
    assert "image 'nowhere.jpg': no such file" in out and "more than this model's tokenizer_model_max_length" in out
    assert out.count("/quit or Ctrl-D ends") == 2


def test_bytes_that_are_no_text_cost_their_question(folder, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"Hi \xff\nHi\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    capsys.readouterr()
    assert main(["chat", "--model-path", folder, "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "prompt: has '\\udcff', half of a surrogate pair or a byte that is not UTF-8, at 3" in out
    assert out.count("ASSISTANT: ") == 1
    assert main(["ask", "--model-path", "/nowhere", "--query", "\udcff"]) == 1  # before the model is looked at
    assert "--query: has '\\udcff'" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(folder, monkeypatch, capsys):
    stream, given = Chat.stream, []

    def pressed(talk, question, **options):
        for number, piece in enumerate(stream(talk, question, **options)):
            given.append((question, piece))
            yield piece
            if question == "Go on" and number == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Chat, "stream", pressed)
    typed(monkeypatch, "Go on", "Hi", "/quit", "Never")
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", "--model-path", folder, "--max_new_tokens", "40"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    out = capsys.readouterr().out
    assert out.count("(stopped)") == 1 and out.count("ASSISTANT: ") == 2
    assert len([1 for question, _ in given if question == "Go on"]) == 4 and ("Hi", given[-1][1]) == given[-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model-path": "/nowhere"}, "/nowhere: no such directory"),
        ({"--image-file": "/nowhere.jpg"}, "'/nowhere.jpg': no such file"),
        ({"--image-file": __file__}, "is not a picture that Pillow can read"),
        ({"--temperature": "-1"}, "temperature=-1.0 must be more than 0; 0 is greedy"),
    ],
)
def test_errors_are_one_line(folder, pictures, capsys, change, message):
    flags = {"--model-path": folder, "--image-file": pictures["chelsea"], "--query": "Hi", **change}
    capsys.readouterr()  # the fixtures' own
    assert main(["ask", *(word for pair in flags.items() for word in pair)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llava-jax: error: ") and message in error and error.count("\n") == 1


def test_an_unconverted_checkpoint_says_how_to_convert_it(checkpoint, capsys):
    folder, _ = checkpoint("vicuna")
    assert main(["ask", "--model-path", folder, "--query", "Hi"]) == 1
    assert f"python convert/from_hf.py {folder}" in capsys.readouterr().err


def test_convert_and_the_conv_mode_flag(checkpoint, tmp_path, capsys):
    folder, _ = checkpoint("vicuna")
    assert main(["convert", folder, "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "out" / "llava_jax.json").is_file()
    assert main(["convert", folder, "--output", str(tmp_path / "out")]) == 1
    assert "converted already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["ask", "--model-path", folder, "--query", "Hi", "--conv-mode", "nobody"])
    assert stopped.value.code == 2


def test_the_demo_runs_from_anywhere_and_keeps_what_it_is_asked_to(tmp_path):
    command = [sys.executable, "-m", "llava_jax", "demo", "--output", "model", "--scenes", "2", "--seed", "3"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Image.open(tmp_path / "llava-jax-demo.png").width == 2 * 380 + 3 * 20
    llava, params = llava_jax.load(tmp_path / "model")
    scene = held_out_scene(3, 1)
    question = questions_about(scene, 3, 1)[-1]
    assert f"{question.text} {llava.generate(params, draw(scene), question.text)}" in said


@pytest.mark.parametrize("scenes", ["8", pytest.param("40", marks=pytest.mark.long)])
def test_the_score_is_one_line_of_json(capsys, scenes):
    assert main(["demo", "--score", "--scenes", scenes, "--seed", "5", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert {"colour", "count", "yes_no", "position", "reading", "description"} <= score.keys()
    assert score["colour"] > 0.95 and score["yes_no"] > 0.9 and score["position"] > 0.9


def test_help_of_every_command_has_an_example_and_imports_no_jax_and_no_other_command():
    code = """
import sys
from llava_jax.cli import COMMANDS, main
asked = {"score"}  # which evaluate runs, too
for command in COMMANDS:
    asked.add(command)
    try:
        main([command, "--help"])
    except SystemExit:
        assert not {"jax", "transformers", "matplotlib", "gradio"} & sys.modules.keys()
        assert not [name for name in COMMANDS if f"llava_jax.cli.{name}" in sys.modules and name not in asked]
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    examples = re.findall(r"^example: llava-jax (\w+) ", said, re.MULTILINE)
    assert examples == list(COMMANDS)


def test_an_alias_is_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["ahead", "--help"])
    assert "example: llava-jax capacity --topology" in capsys.readouterr().out


def test_train_has_a_flag_for_each_option():
    parser = argparse.ArgumentParser()
    add_command(parser, "train")
    defaults = {field.name: field.default for field in fields(TrainOptions)}
    assert defaults.items() <= vars(parser.parse_args([])).items()
    wanted = "--learning_rate 1 --learning-rate 2 --bf16 --group-by-modality-length True --gradient_checkpointing false"
    args = parser.parse_args(wanted.split())
    assert (args.learning_rate, args.bf16, args.group_by_modality_length, args.gradient_checkpointing) == (2, 1, 1, 0)
    told = " ".join(parser.format_help().split())
    assert all(field.metadata["help"] in told for field in fields(TrainOptions))


def test_a_truncated_checkpoint_is_one_line(converted, tmp_path):
    """Orbax's threads say nothing of their own. Some 4 seconds."""
    folder = shutil.copytree(converted("vicuna"), tmp_path / "cut")
    largest = max((folder / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    os.truncate(largest, 1000)
    command = [sys.executable, "-m", "llava_jax", "ask", "--model-path", folder, "--query", "Hi"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(
        f"llava-jax: error: {folder / 'params'}: half-written or damaged"
    )
    assert done.stderr.count("\n") == 1
