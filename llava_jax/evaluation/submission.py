"""Answers as the benchmarks' servers and their own evaluators take them, byte for byte as the reference writes them.

Sources: `scripts/convert_{vqav2,vizwiz,gqa,mmbench,mmvet,seed}_for_*.py`, and for MME `convert_answer_to_mme.py` of
LLaVA's eval.zip. MMBench's sheet has the same cells, but none of pandas' formatting of the first row.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from etils import epath

from llava_jax.evaluation.questions import ID
from llava_jax.evaluation.scores.mme import read_truth, truth_key
from llava_jax.evaluation.scores.vqa import evalai_answer
from llava_jax.evaluation.tables import read_table, typed
from llava_jax.fields import Kind, problem_of
from llava_jax.files import write_whole, writing
from llava_jax.inputs.text import check_text
from llava_jax.records import parse_json, read_json, read_lines, read_objects

NAMED = 3  # ids that an error names


@dataclass(frozen=True)
class Submission:
    """How a task's answers are written.

    Attributes:
        convert: (answers file, the other file that is needed) → the file's bytes; MME: {file's name: bytes}.
        needs: the argument that names the other file, or None.
        what: the other file.
    """

    convert: Callable[..., bytes | dict[str, bytes]]
    needs: str | None = None
    what: str = ""


def write_submission(
    task: str, answers_file: str, output: str, question_file: str | None = None, annotations: str | None = None
) -> Iterator[epath.Path]:
    """Write a task's answers for its server or evaluator; a file that is there is written over.

    Yields:
        each file once it is written: `output`; of mme, those in it.

    Raises:
        FileNotFoundError: a file cannot be read.
        ValueError: a file is missing or malformed, or an answer that the evaluator insists on is missing.
        OSError: the file cannot be written.
    """
    submission = SUBMISSIONS[task]
    given = [answers_file]
    if submission.needs:
        other = {"question_file": question_file, "annotations": annotations}[submission.needs]
        if other is None:
            raise ValueError(f"--task {task} needs --{submission.needs.replace('_', '-')}: {submission.what}")
        given.append(other)
    written, path = submission.convert(*given), epath.Path(output)
    if isinstance(written, bytes):
        files = {path: written}
    else:
        files = {path / name: content for name, content in written.items()}
    for path, content in files.items():
        with writing(path, "make room, or name another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        yield path


# ---- reading


def _entries(path, *keys: str) -> list[dict]:
    """The objects of a file that has one a line, each with a question_id and these keys, which are texts."""
    return read_objects(path, _kinds(*keys))


def _kinds(*keys: str) -> Mapping[str, Kind]:
    return {"question_id": ID, **dict.fromkeys(keys, (str,))}


def _answers_by_id(path) -> dict:
    """{question_id: text}, lines that are not JSON passed over, as the converters for VQAv2 and VizWiz do."""
    answers, passed_over = {}, 0
    for n, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {n}"
        try:
            entry = parse_json(line, where)
        except ValueError:
            passed_over += 1
            continue
        if problem := problem_of(entry, _kinds("text")):
            raise ValueError(f"{where}: {problem}")
        answers[entry["question_id"]] = entry["text"]
    if passed_over:
        print(f"{path}: {passed_over} lines are not JSON and were passed over")
    return answers


def _check_all(path, missing: list) -> None:
    if missing:
        some = ", ".join(f"{question_id!s:.80}" for question_id in missing[:NAMED]) + (
            ", …" if len(missing) > NAMED else ""
        )
        raise ValueError(f"{path}: has no answer to {len(missing)} questions ({some}); answer them all first")


# ---- one converter a task


def vqav2(answers_file, question_file) -> bytes:
    """An answer to every question of the file, which for the server is the whole test split; "" where there is none."""
    answers = _answers_by_id(answers_file)
    ids = [question["question_id"] for question in _entries(question_file)]
    found = sum(question_id in answers for question_id in ids)
    print(f"{found} of {len(ids)} questions have an answer")
    said = [{"question_id": i, "answer": evalai_answer(answers[i]) if i in answers else ""} for i in ids]
    return json.dumps(said).encode()


def vizwiz(answers_file, question_file) -> bytes:
    answers = _answers_by_id(answers_file)
    questions = _entries(question_file, "image")
    _check_all(answers_file, [q["question_id"] for q in questions if q["question_id"] not in answers])
    said = [{"image": q["image"], "answer": evalai_answer(answers[q["question_id"]])} for q in questions]
    return json.dumps(said).encode()


def gqa(answers_file) -> bytes:
    answers = _entries(answers_file, "text")
    said = [{"questionId": a["question_id"], "prediction": a["text"].rstrip(".").lower()} for a in answers]
    return json.dumps(said).encode()


def mm_vet(answers_file) -> bytes:
    answers = _entries(answers_file, "text")
    return json.dumps({f"v1_{a['question_id']}": a["text"] for a in answers}, indent=2).encode()


def seed(answers_file, annotations) -> bytes:
    """A line for each question of SEED-Bench.json, whose ids are texts where LLaVA's question file has integers."""
    answers = {a["question_id"]: a["text"] for a in _entries(answers_file, "text")}
    data = read_json(annotations)
    if problem := problem_of(data, {"questions": [{"question_id": ID}]}):
        raise ValueError(
            f"{annotations}: expected SEED-Bench.json, with 'questions' that have a question_id: {problem}"
        )
    questions = data["questions"]
    keys = [(q["question_id"], _as_answered(q["question_id"], answers)) for q in questions]
    _check_all(answers_file, [question_id for question_id, key in keys if key not in answers])
    lines = [json.dumps({"question_id": question_id, "prediction": answers[key]}) for question_id, key in keys]
    return "".join(line + "\n" for line in lines).encode()


def _as_answered(question_id, answers: Mapping):
    if question_id in answers or not re.fullmatch(r"\s*[+-]?\d{1,30}\s*", str(question_id)):
        return question_id
    return int(question_id)


def mme(answers_file, annotations) -> dict[str, bytes]:
    """{category.txt: lines of image's .txt, question, truth, answer}, as MME's calculation.py takes them."""
    truth = read_truth(annotations)
    lines: dict[str, str] = {}
    for n, answer in enumerate(_entries(answers_file, "prompt", "text"), 1):
        check_text(answer["text"], f"{answers_file}, line {n}: the text")
        key = category, file, question = truth_key(answer, truth)
        if key not in truth:
            raise ValueError(
                f"{answers_file}, line {n}: {annotations} has no question {answer['prompt']!r:.200} in "
                f"{category:.80}/{file:.80}; is it the same release of MME?"
            )
        line = "\t".join((file, question, truth[key], answer["text"])) + "\n"
        lines[f"{category}.txt"] = lines.get(f"{category}.txt", "") + line
    return {name: text.encode() for name, text in lines.items()}


_NOT_IN_SHEETS = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_AT = 6  # the column


def mmbench(answers_file, question_file) -> bytes:
    """MMBench's table as an .xlsx, without the pictures and with the predictions; of several rounds the last one's."""
    columns, rows = read_table(question_file)
    for row in rows:
        if len(row.cells) > len(columns):
            raise ValueError(f"{question_file}, line {row.line}: {len(row.cells)} cells for {len(columns)} columns")
    if "index" not in columns:
        raise ValueError(f"{question_file}: has no column index; its columns are {', '.join(columns):.500}")
    table = {name: typed([row.cells[i] for row in rows]) for i, name in enumerate(columns)}
    answers = {a["question_id"]: a["text"] for a in _entries(answers_file, "text")}
    kept = [(name, column) for name, column in table.items() if name not in _NOT_IN_SHEETS]
    kept.insert(_PREDICTION_AT, ("prediction", [answers.get(i) for i in table["index"]]))
    return workbook([[name for name, _ in kept], *zip(*(column for _, column in kept), strict=True)])


# ---- .xlsx

_PACKAGE = "http://schemas.openxmlformats.org/package/2006/"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_SHEETS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml."
_NO_CHARACTERS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML has none of these
_LONGEST = 32767  # characters of a cell


def workbook(rows: Sequence[Sequence[str | int | float | None]]) -> bytes:
    """An .xlsx with one sheet; None and NaN are empty cells. Characters that XML does not have are left out."""
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPE}worksheet+xml"/></Types>',
        "_rels/.rels": _relationship("officeDocument", "xl/workbook.xml"),
        "xl/_rels/workbook.xml.rels": _relationship("worksheet", "worksheets/sheet1.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{_SHEETS}" xmlns:r="{_OFFICE}">'
        '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{_SHEETS}"><sheetData>'
        + "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in rows)
        + "</sheetData></worksheet>",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts.items():
            entry = zipfile.ZipInfo(name)  # dated 1980, so that equal sheets are equal bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n' + part)
    return file.getvalue()


def _relationship(kind: str, target: str) -> str:
    return (
        f'<Relationships xmlns="{_PACKAGE}relationships">'
        f'<Relationship Id="rId1" Type="{_OFFICE}/{kind}" Target="{target}"/></Relationships>'
    )


def _cell(value: str | int | float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "<c/>"
    if not isinstance(value, str):
        return f"<c><v>{value}</v></c>"
    text = escape(_NO_CHARACTERS.sub("", value)[:_LONGEST], {"\r": "&#13;"})
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


SUBMISSIONS = {
    "vqav2": Submission(vqav2, "question_file", "llava_vqav2_mscoco_test2015.jsonl, all that the server asks"),
    "gqa": Submission(gqa),
    "vizwiz": Submission(vizwiz, "question_file", "llava_test.jsonl"),
    "mmbench": Submission(mmbench, "question_file", "the .tsv that was answered"),
    "mme": Submission(mme, "annotations", "the folder MME_Benchmark_release_version"),
    "seed": Submission(seed, "annotations", "SEED-Bench.json"),
    "mm-vet": Submission(mm_vet),
}
