"""What is handed in: byte for byte as the reference's converters write it."""

import argparse
import errno
import io
import json
import os
import zipfile
from xml.etree import ElementTree

import pytest

from llava_jax.cli import add_command
from llava_jax.cli.submit import run
from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.workbook import workbook

SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


@pytest.fixture(scope="module")
def recorded(golden):
    return {key: json.loads(str(golden("questions")[key])) for key in ("files", "submissions")}


@pytest.fixture
def files(recorded, tmp_path, monkeypatch):
    """The recorded files in the working directory, and MME's folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in recorded["files"].items():
        (tmp_path / name).write_bytes(text.encode())
    for name, text in json.loads(recorded["files"]["mme.json"]).items():
        path = tmp_path / "MME" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def submit(task, answers, *flags):
    parser = argparse.ArgumentParser()
    add_command(parser, "submit")
    run(parser.parse_args(["--task", task, "--answers-file", answers, "--output", "new/out", *flags]))


def cells_of(xlsx):
    """The sheet's rows, as a reader sees them."""

    def value(cell):
        if cell.get("t") == "inlineStr":
            return cell.find(f"{SHEET}is/{SHEET}t").text or ""
        number = cell.find(f"{SHEET}v")
        return None if number is None else json.loads(number.text)

    with zipfile.ZipFile(io.BytesIO(xlsx)) as archive:
        for part in archive.namelist():
            ElementTree.fromstring(archive.read(part))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    return [[value(cell) for cell in row] for row in sheet.iter(f"{SHEET}row")]


# ---- equal to the reference


@pytest.mark.parametrize(
    ("task", "answers", "flags"),
    [
        ("vqav2", "broken.jsonl", ["--question-file", "asked.jsonl"]),
        ("vizwiz", "broken.jsonl", ["--question-file", "answered.jsonl"]),
        ("gqa", "answers.jsonl", []),
        ("mm-vet", "answers.jsonl", []),
        ("seed", "answers.jsonl", ["--annotations", "seed.json"]),
    ],
)
def test_bytes(recorded, files, capsys, task, answers, flags):
    submit(task, answers, *flags)
    assert (files / "new" / "out").read_bytes() == recorded["submissions"][task][""].encode()
    printed = capsys.readouterr().out
    assert "wrote new/out" in printed
    assert ("broken.jsonl: 1 lines are not JSON" in printed) == (answers == "broken.jsonl")
    assert ("8 of 9 questions have an answer" in printed) == (task == "vqav2")


def test_mme(recorded, files):
    submit("mme", "mme_answers.jsonl", "--annotations", "MME")
    written = {path.name: path.read_text(encoding="utf-8") for path in (files / "new" / "out").iterdir()}
    assert written == recorded["submissions"]["mme"] and set(written) == {"color.txt", "OCR.txt"}


def test_sheet(recorded, files):
    submit("mmbench", "mmbench_answers.jsonl", "--question-file", "mmbench.tsv")
    written = (files / "new" / "out").read_bytes()
    want = recorded["submissions"]["mmbench"]
    assert cells_of(written) == want and want[0][5:8] == ["D", "prediction", "answer"]
    submit("mmbench", "mmbench_answers.jsonl", "--question-file", "mmbench.tsv")
    assert (files / "new" / "out").read_bytes() == written


def test_workbook():
    rows = [
        ["a", None, "=1+1", " <&>\"'\n"],
        [1, 2.5, float("nan"), "x\0\x0b\ud800y"],
        ["", "é🦙", "_x000B_", "z" * 40_000],
    ]
    got = cells_of(workbook(rows))
    assert got == [["a", None, "=1+1", " <&>\"'\n"], [1, 2.5, None, "xy"], ["", "é🦙", "_x000B_", "z" * 32_767]]
    assert cells_of(workbook([["a\r\nb"]])) == [["a\r\nb"]]


# ---- what is refused


@pytest.mark.parametrize(
    ("task", "answers", "flags", "problem"),
    [
        ("vqav2", "answers.jsonl", [], "--task vqav2 needs --question-file: llava_vqav2_mscoco_test2015.jsonl"),
        ("seed", "answers.jsonl", [], "--task seed needs --annotations: SEED-Bench.json"),
        ("gqa", "broken.jsonl", [], "broken.jsonl, line 4: not JSON"),
        ("gqa", "science.json", [], "science.json, line 1: not JSON"),
        ("gqa", "number.jsonl", [], "number.jsonl, line 1: text=7 must be a text"),
        ("mme", "answered.jsonl", ["--annotations", "MME"], "answered.jsonl, line 1: has no 'prompt'"),
        ("mme", "answers.jsonl", ["--annotations", "MME"], "has no question '?' in 10/10.txt"),
        ("vizwiz", "answers.jsonl", ["--question-file", "asked.jsonl"], "has no answer to 1 questions (99)"),
        ("vizwiz", "mme_answers.jsonl", ["--question-file", "asked.jsonl"], "9 questions (17, 16, 15, …)"),
        ("seed", "mme_answers.jsonl", ["--annotations", "seed.json"], "has no answer to 8 questions (10, 11, 12, …)"),
        ("seed", "answers.jsonl", ["--annotations", "science.json"], "science.json: expected SEED-Bench.json"),
        ("mmbench", "answers.jsonl", ["--question-file", "asked.jsonl"], "asked.jsonl: has no column index"),
        ("mmbench", "answers.jsonl", ["--question-file", "long.tsv"], "long.tsv, line 2: 2 cells for 1 columns"),
    ],
)
def test_one_error(files, task, answers, flags, problem):
    (files / "number.jsonl").write_text('{"question_id": 1, "text": 7}\n')
    (files / "long.tsv").write_text("index\n1\t2\n")
    with pytest.raises(ValueError) as error:
        submit(task, answers, *flags)
    assert problem in str(error.value)
    assert not (files / "new").exists()


@pytest.mark.parametrize(
    ("task", "answers", "flags", "line", "problem"),
    [
        ("gqa", "odd.jsonl", [], '{"question_id": 1, "text": [1]}', "odd.jsonl, line 1: text=[1] must be a text"),
        (
            "mm-vet",
            "odd.jsonl",
            [],
            '{"question_id": {}, "text": ""}',
            "odd.jsonl, line 1: question_id={} must be a text",
        ),
        ("gqa", "odd.jsonl", [], "[" * 100_000, "odd.jsonl, line 1: not JSON (nested too deep)"),
        (
            "vqav2",
            "answers.jsonl",
            ["--question-file", "odd.jsonl"],
            '{"question_id": []}',
            "odd.jsonl, line 1: question_id=[] must",
        ),
        (
            "seed",
            "answers.jsonl",
            ["--annotations", "odd.jsonl"],
            '{"questions": [{"question_id": []}]}',
            "odd.jsonl: expec",
        ),
        (
            *("mme", "odd.jsonl", ["--annotations", "MME"]),
            '{"question_id": "color/1.png", "prompt": "Is it red?", "text": "\\ud83d"}',
            "odd.jsonl, line 1: the text: has '\\ud83d'",
        ),
    ],
)
def test_odd_lines_are_named(files, task, answers, flags, line, problem):
    (files / "odd.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError) as error:
        submit(task, answers, *flags)
    assert str(error.value).startswith(problem) and not (files / "new").exists()


def test_a_full_disk_is_named_and_what_was_there_stays(files, monkeypatch):
    submit("gqa", "answers.jsonl")
    before = (files / "new" / "out").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^new/out: cannot be written \(No space left on device\); make room, or name"):
        submit("mm-vet", "answers.jsonl")
    assert (files / "new" / "out").read_bytes() == before and len(list((files / "new").iterdir())) == 1


def test_missing_files(files):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: cannot be read"):
        submit("gqa", "none.jsonl")
    with pytest.raises(FileNotFoundError, match="none: no such folder; --annotations is MME_Benchmark_release_version"):
        submit("mme", "mme_answers.jsonl", "--annotations", "none")


def test_tasks_with_a_submission(capsys):
    submitted = {task for task, benchmark in BENCHMARKS.items() if benchmark.submission}
    assert submitted == {"vqav2", "gqa", "vizwiz", "mmbench", "mme", "seed", "mm-vet"}
    with pytest.raises(SystemExit):
        submit("pope", "a.jsonl")
    assert "invalid choice: 'pope'" in capsys.readouterr().err
