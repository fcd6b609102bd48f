"""The command line, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import llava_jax
from llava_jax.cli import main
from llava_jax.demo.scenes import draw
from llava_jax.demo.score import held_out_scene, questions_about


def test_ask_prints_what_generate_returns(converted, pictures, capsys):
    folder, image = converted("vicuna"), pictures["chelsea"]
    llava, params = llava_jax.load(folder)
    wanted = llava.generate(params, image, "What is it?", max_new_tokens=12)
    command = ["ask", "--model-path", folder, "--image-file", image, "--query", "What is it?", "--max_new_tokens", "12"]
    capsys.readouterr()  # the fixtures' own
    assert main(command) == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert main([*command, "--temperature", "1", "--top_p", "0.9", "--seed", "3", "--conv-mode", "llava_v0"]) == 0
    assert capsys.readouterr().out != wanted + "\n"


def test_several_images_and_none(converted, pictures, capsys):
    ask = ["ask", "--model-path", converted("llava15"), "--query", "Compare", "--max_new_tokens", "4"]
    assert main([*ask, "--image-file", f"{pictures['chelsea']},{pictures['chelsea']}"]) == 0
    assert main(ask) == 0
    assert main([*ask, "--image-file", f"{pictures['chelsea']};{pictures['chelsea']}", "--sep", ";"]) == 0
    outs = capsys.readouterr().out.splitlines()
    assert len(outs) >= 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model-path": "/nowhere"}, "/nowhere: no such directory"),
        ({"--image-file": "/nowhere.jpg"}, "'/nowhere.jpg': no such file"),
        ({"--image-file": __file__}, "is not a picture that Pillow can read"),
        ({"--temperature": "-1"}, "temperature=-1.0 must be more than 0; 0 is greedy"),
    ],
)
def test_errors_are_one_line(converted, pictures, capsys, change, message):
    flags = {"--model-path": converted("vicuna"), "--image-file": pictures["chelsea"], "--query": "Hi", **change}
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
    assert Image.open(tmp_path / "llava-jax-demo.png").width > 1000
    llava, params = llava_jax.load(tmp_path / "model")
    scene = held_out_scene(3, 1)
    question = questions_about(scene, 3, 1)[-1]
    assert f"{question.text} {llava.generate(params, draw(scene), question.text)}" in said


def test_the_score_is_one_line_of_json(capsys):
    assert main(["demo", "--score", "--scenes", "40", "--seed", "5", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert {"colour", "count", "yes_no", "position", "reading", "description"} <= score.keys()
    assert score["colour"] > 0.95 and score["yes_no"] > 0.9 and score["position"] > 0.9


def test_the_readmes_names_exist():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    names = set(re.findall(r"llava_jax\.(\w+)\(", readme))
    assert {"load", "Sample"} <= names and all(hasattr(llava_jax, name) for name in names)


def test_help_imports_no_jax():
    code = """
import sys
from llava_jax.cli import main
try:
    main(["ask", "--help"])
except SystemExit:
    assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
