"""Questions as the reference's evaluation programs ask and echo them, and entries that nobody can ask."""

import base64
import csv
import functools
import importlib
import io
import json
import math
import pkgutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.evaluation import benchmarks
from llava_jax.evaluation.benchmarks import BENCHMARKS, layout_for
from llava_jax.evaluation.benchmarks.mmbench import MMBENCH
from llava_jax.evaluation.benchmarks.scienceqa import SCIENCE
from llava_jax.evaluation.questions import LOADER, VQA, PromptFlags, Question, get_chunk, read_questions, user_turn
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.tokenizer import LlamaTokenizer, tokenizer_image_token
from llava_jax.records import read_table, typed

TOKENIZER = Path(__file__).parent / "golden" / "tokenizers" / "llama" / "tokenizer.model"
PICTURES = {"a.png": [3, 2], "b c.png": [4, 2], "folder/d.png": [5, 2]}  # as record_questions.py has them
LAYOUTS = {layout.name: layout for layout in (LOADER, VQA, SCIENCE, MMBENCH)}
COLUMNS = "index\tquestion\thint\tA\tB\tC\tD\timage\n"


@pytest.fixture(scope="module")
def recorded(golden):
    arrays = golden("questions")
    ids = np.split(arrays["ids"], arrays["ends"][:-1])
    return {key: json.loads(str(arrays[key])) for key in ("files", "runs", "chunks", "tables", "typed")} | {"ids": ids}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write


def questions_of(run, path):
    """The questions of a run of one of the reference's programs, by its flags."""
    flags = run["flags"]
    value = {flag: flags[flags.index(flag) + 1] for flag in ("--lang", "--num-chunks", "--chunk-idx") if flag in flags}
    questions = read_questions(
        path,
        LAYOUTS[run["program"]],
        PromptFlags("--single-pred-prompt" in flags, "--all-rounds" in flags, value.get("--lang", "en")),
    )
    return get_chunk(questions, int(value.get("--num-chunks", 1)), int(value.get("--chunk-idx", 0)))


@functools.cache
def tokenizer_of(start_end):
    tokenizer = LlamaTokenizer(TOKENIZER.read_bytes(), legacy=False).add_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer.add_tokens(["<im_patch>"]).add_tokens(["<im_start>", "<im_end>"]) if start_end else tokenizer


def ids_of(question, conv_mode, start_end):
    conv = conv_templates[conv_mode]
    conv = conv.append_message(conv.roles[0], user_turn(question, start_end)).append_message(conv.roles[1], None)
    return tokenizer_image_token(conv.get_prompt(), tokenizer_of(start_end))


def size_of(image):
    if image is None:
        return None
    return list(Image.open(io.BytesIO(image)).size) if isinstance(image, bytes) else PICTURES[image]


# ---- equal to the reference


def test_every_run_of_the_references_programs(recorded, write):
    """Ids, prompts, further fields and their order, pictures, and the tokens of what is asked."""
    rows, tokens = iter(recorded["ids"]), {}
    for run in recorded["runs"]:
        questions = questions_of(run, write(run["file"], recorded["files"][run["file"]]))
        if "--all-rounds" in run["flags"]:  # the reference leaves out a row without options
            questions = [question for question in questions if "no option to rotate" not in (question.error or "")]
        for question, line, size in zip(questions, run["lines"], run["sizes"], strict=True):
            assert question.error is None
            want = json.loads(line)
            got = {"question_id": question.question_id, "prompt": question.prompt, **question.fields}
            assert got == {key: want[key] for key in got} and len(want) == len(got) + 4
            assert json.dumps(question.question_id) == json.dumps(want["question_id"])  # 1 is not 1.0
            assert list(question.fields) == [key for key in want if key in question.fields]
            assert size_of(question.image) == size
            asked = user_turn(question), run["conv_mode"], run["mm_use_im_start_end"]
            if asked not in tokens:
                tokens[asked] = ids_of(question, *asked[1:])
            assert tokens[asked] == next(rows).tolist(), run
    assert next(rows, None) is None


def test_runs_cover_what_differs(recorded):
    said = [(run["program"], *run["flags"], run["conv_mode"], run["mm_use_im_start_end"]) for run in recorded["runs"]]
    assert {program for program, *_ in said} == {"loader", "vqa", "science", "mmbench"}
    assert len(set(said)) >= 20 and sum(len(run["lines"]) for run in recorded["runs"]) == len(recorded["ids"])


def test_tables_as_pandas_reads_them(recorded, write):
    refused = 0
    for text, columns, rows in recorded["tables"]:
        path = write("table.tsv", text)
        if columns is None:
            refused += 1
            try:
                width = max(len(row.cells) for row in read_table(path)[1])
            except ValueError:
                continue
            assert width > 3, text  # questions and sheets are then refused by row
            continue
        got_columns, got = read_table(path)
        assert (got_columns, [row.cells for row in got]) == (columns, rows), repr(text)
    assert 20 < refused < len(recorded["tables"]) / 2


def test_integers_that_pandas_has_no_room_for():
    """Seen with pandas 2.2."""
    largest = str(2**64 - 1)
    assert typed(["1", largest]) == [1, 2**64 - 1] and typed(["-5", str(2**63 - 1)]) == [-5, 2**63 - 1]
    for column in (
        ["1", str(2**64)],
        ["-1", str(2**63)],
        [str(-(2**63) - 1), "3"],
        ["1", None, str(2**64)],
        ["1" * 5000],
    ):
        assert typed(column) == column


def test_columns_typed_as_pandas_types_them(recorded):
    for cells, want in recorded["typed"]:
        got = [None if isinstance(x, float) and math.isnan(x) else x for x in typed(cells)]
        assert json.dumps(got) == json.dumps(want), cells


def test_chunks(recorded):
    for count, n, chunks in recorded["chunks"]:
        questions = [Question(i, "", "", None) for i in range(count)]
        for k in range(n):
            want = chunks[k] if k < len(chunks) else []  # the reference: IndexError
            assert [q.question_id for q in get_chunk(questions, n, k)] == want
    assert get_chunk([], 3, 2) == []
    for n, k in ((3, 3), (3, -1), (0, 0)):
        with pytest.raises(ValueError, match="--chunk-idx must be from 0 to --num-chunks - 1"):
            get_chunk(questions, n, k)


# ---- entries that cannot be asked

GOOD = {"question_id": 1, "image": "a.png", "text": "What?"}


def lines(*entries):
    return b"\n".join(e if isinstance(e, bytes) else json.dumps(e).encode() for e in entries)


def test_malformed_lines_stay_in_their_place(write):
    bad = {
        b'{"question_id": 2, "te': (None, "not JSON"),
        b"": (None, "not JSON"),
        b"[1]": (None, "expected an object with question_id, image, text, got list"),
        b'{"question_id": 3, "text": "\xff"}': (None, "not JSON"),
        b"[" * 100_000: (None, "not JSON"),
        lines({"question_id": "4", "text": "x"}): ("4", "has no 'image'"),
        lines({"question_id": 5}): (5, "has no 'image', 'text'"),
        lines({"image": "a", "text": "x"}): (None, "has no 'question_id'"),
        lines(GOOD | {"text": 7}): (1, "text=7 must be a text"),
        lines(GOOD | {"image": None}): (1, "image=None must be a text"),
        lines(GOOD | {"question_id": [1]}): (None, "question_id=[1] must be a text"),
        lines(GOOD | {"text": "<image>\nWhat?"}): (1, "the question has <image>"),
        lines(GOOD | {"text": "\ud800"}): (1, "half of a surrogate pair"),
    }
    path = write("q.jsonl", lines(GOOD, *bad, GOOD, b"", b"  ", b""))
    questions = read_questions(path, LOADER)
    assert len(questions) == len(bad) + 2 and questions[0] == questions[-1] == Question(1, "What?", "What?", "a.png")
    for n, (question, (question_id, problem)) in enumerate(zip(questions[1:], bad.values(), strict=False), 2):
        assert question.question_id == question_id
        assert question.error.startswith(f"{path}, line {n}: ") and problem in question.error
    assert questions[-3].prompt == "<image>\nWhat?"  # echoed though it cannot be asked


def test_malformed_science(write):
    good = {"id": "1", "conversations": [{"value": "What?"}]}
    bad = [
        ("x", None, "expected an object with id, conversations, got str"),
        ({"id": "2"}, "2", "has no 'conversations'"),
        ({"id": "3", "conversations": []}, "3", "'conversations' is empty"),
        ({"id": "4", "conversations": [{}]}, "4", "has no 'value'"),
        ({"id": "5", "conversations": [7]}, "5", "expected an object with value, got int"),
        ({"id": "6", "conversations": [{"value": None}]}, "6", "value=None must be a text"),
        (good | {"id": "7", "image": None}, "7", "image=None must be a text"),
        (good | {"id": "8", "conversations": [{"value": "<im<image>age>"}]}, "8", "the question has <image>"),
    ]
    path = write("q.json", json.dumps([good, *(entry for entry, *_ in bad)]))
    first, *questions = read_questions(path, SCIENCE)
    assert first == Question("1", "What?", "What?", None)
    for n, (question, (_, question_id, problem)) in enumerate(zip(questions, bad, strict=True), 2):
        assert (question.question_id, question.error.split(": ")[0]) == (question_id, f"{path}, entry {n}")
        assert problem in question.error


def test_malformed_rows(write):
    image = base64.b64encode(b"not a picture, which is found when it is read").decode()
    rows = [
        ("1\tWhat?\t\tx\ty\t\t\t" + image, 1, None),
        ("2\t\thint\tx\ty\t\t\t" + image, 2, "its question is empty"),
        ("3\tWhat?\t\tx\ty", 3, "its image is empty"),
        ('4\t"two\nlines"\t\tx\ty\t\t\tabc', 4, "its image is not base64"),
        ("5\tWhat?\t\tx\ty\t\t\té", 5, "its image is not base64"),
        ("6\tWhat?\t\tx\ty\t\t\tabcd\tmore", 6, "has 9 cells for 8 columns"),
        ("7\t<image>\t\tx\ty\t\t\t" + image, 7, "the question has <image>"),
        ("8\tWhat?\t\tx\ty\t\t\t" + image, 8, None),
    ]
    path = write("q.tsv", COLUMNS + "\n".join(row for row, *_ in rows))
    lines = [2, 3, 4, 5, 7, 8, 9, 10]
    for all_rounds in (False, True):
        questions = iter(read_questions(path, MMBENCH, PromptFlags(all_rounds=all_rounds)))
        for (_, question_id, problem), line in zip(rows, lines, strict=True):
            question = next(questions)
            assert (question.question_id, question.fields["round_id"]) == (question_id, 0)
            if problem:
                assert question.error.startswith(f"{path}, line {line}: ") and problem in question.error
            else:
                assert question.error is None and question.image.startswith(b"not a picture")
            if all_rounds and "cells" not in (problem or ""):
                second = next(questions)
                assert second.fields["option_char"] == ["B", "A"] and second.error == question.error
        assert next(questions, None) is None
    (nameless, _) = read_questions(
        write("n.tsv", COLUMNS + f"\tx\t\tx\t\t\t\t{image}\n2\tx\t\tx\t\t\t\t{image}"), MMBENCH
    )
    assert nameless.question_id is None and "its index is empty" in nameless.error


def test_an_option_that_reads_as_empty_is_named(write):
    """It and those after it are not asked, as in the reference's runs, which are recorded; now it is said, too."""
    image = base64.b64encode(bytes(100)).decode()
    rows = {
        ("cat", "dog", "bird", "fish"): None,
        ("cat", "dog", "", ""): None,
        ("cat", "dog", "nan", "NaN"): None,  # how a program writes what is not there
        ("cat", "dog", "None", "fish"): "column C: 'None' counts as empty, as in the original; not asked: C, D",
        ("cat", "NA", "", ""): "column B: 'NA' counts as empty, as in the original; not asked: B",
        ("cat", "dog", "bird", "nOnE"): "column D: 'nOnE' counts as empty, as in the original; not asked: D",
        ("cat", "", "bird", ""): "column B: is empty, as in the original; not asked: C",
        ("nan", "dog", "", ""): "column A: 'nan' counts as empty, as in the original; not asked: B",
    }
    lines = [f"{n}\tWhat?\t\t{chr(9).join(options)}\t{image}\n" for n, options in enumerate(rows)]
    path = write("q.tsv", COLUMNS + "".join(lines))
    questions = read_questions(path, MMBENCH)
    for n, (question, options, note) in enumerate(zip(questions, rows, rows.values(), strict=True), 2):
        assert question.note == (note and f"{path}, line {n}, {note}")
        asked = question.fields["options"]
        assert question.error is None and asked == list(options)[: len(asked)]
    assert [len(question.fields["options"]) for question in questions] == [4, 2, 2, 2, 1, 3, 1, 0]


def test_an_image_cell_may_be_another_rows_index(write):
    picture = b"not a picture, but longer than any index of a row is"
    cells = [base64.b64encode(picture).decode(), "1", " 2 ", "5", "4", "99", "6", "abc", "eHl6"]
    rows = "".join(f"{n}\tx\t\tx\t\t\t\t{cell}\n" for n, cell in enumerate(cells, 1))
    path = write("q.tsv", COLUMNS + rows)
    first, again, through, *others, tiny = read_questions(path, MMBENCH)
    assert first.image == again.image == through.image == picture and again.image is first.image
    assert tiny.image == b"xyz" and not any(q.error for q in (first, again, through, tiny))
    problems = [
        "its image is row 5's, which has none",
        "its image is row 4's, which has none",
        "its image is 99, neither base64 nor another row's index",
        "its image is row 6's, which is 99, neither base64 nor another row's index",
        "its image is not base64",
    ]
    for n, (question, problem) in enumerate(zip(others, problems, strict=True), 5):
        assert question.image is None and question.error.startswith(f"{path}, line {n}: {problem}")
    path = write("words.tsv", COLUMNS + f"a\tx\t\tx\t\t\t\t{cells[0]}\nb\tx\t\tx\t\t\t\ta\n")
    assert [question.image for question in read_questions(path, MMBENCH)] == [picture, picture]


def test_ids_are_repeated_as_they_are(write):
    """As the reference does: two that are the same, true, NaN, any number; but no lists, which nobody can score."""
    ids = [7, 7, True, math.nan, 10**30, 1e308, -0.0, "\ud83d", "", None]
    questions = read_questions(write("q.jsonl", lines(*(GOOD | {"question_id": number} for number in ids))), VQA)
    assert [repr(question.question_id) for question in questions] == [repr(number) for number in ids]
    assert not any(question.error for question in questions)


def test_large_pictures_in_a_table(write):
    picture = bytes(range(256)) * 1000
    path = write("q.tsv", COLUMNS + f"1\tx\t\tx\t\t\t\t{base64.b64encode(picture).decode()}\n")
    limit = csv.field_size_limit()
    assert read_questions(path, MMBENCH)[0].image == picture
    assert csv.field_size_limit() == limit


def test_byte_order_mark_and_carriage_returns(write):
    assert len(read_questions(write("q.jsonl", b"\xef\xbb\xbf" + lines(GOOD, GOOD).replace(b"\n", b"\r\n")), VQA)) == 2
    image = base64.b64encode(b"x").decode()
    path = write("q.tsv", ("\ufeff" + COLUMNS + f"1\tx\t\tx\t\t\t\t{image}\n").replace("\n", "\r"))
    assert read_questions(path, MMBENCH)[0] == Question(
        1, "x\nA. x", "x\nA. x", b"x", {"round_id": 0, "options": ["x"], "option_char": ["A"]}
    )


# ---- files and arguments that are wrong as a whole


@pytest.mark.parametrize(
    ("layout", "content", "problem"),
    [
        ("loader", "\n \n", "has no questions"),
        ("loader", b"\x1f\x8b\n\0", "no line of it is JSON; the first error: "),
        ("vqa", json.dumps(GOOD).encode("utf-16"), "is UTF-16 or UTF-32; save it as UTF-8"),
        ("science", "[" * 100_000, "not JSON (nested too deep)"),
        ("science", b'[{"id": "\xff"}]', "not JSON"),
        ("science", "[]", "has no questions"),
        ("science", '{"0": {}}', "expected a list of questions, got dict"),
        ("science", '[{"id": 1}', "not JSON"),
        ("mmbench", "", "is empty; expected a first line that names the columns"),
        ("mmbench", COLUMNS, "has no questions"),
        ("mmbench", "index\tquestion\tA\tB\tC\timage\n1\n", "has no column hint, D; its columns are index, question"),
        ("mmbench", COLUMNS + '1\t"x\n2\ty\n', "line 2: a quotation mark is never closed"),
        ("mmbench", COLUMNS.encode() + b"1\t\xff", "not UTF-8"),
    ],
)
def test_one_error_for_a_file(write, layout, content, problem):
    path = write("q", content)
    with pytest.raises(ValueError) as error:
        read_questions(path, LAYOUTS[layout])
    assert str(path) in str(error.value) and problem in str(error.value)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            read_questions(path, LOADER)


@pytest.mark.parametrize(
    ("layout", "arguments", "problem"),
    [
        ("loader", {"single_pred_prompt": True}, "single_pred_prompt: the loader layout has none"),
        ("science", {"all_rounds": True}, "all_rounds: the science layout has none"),
        ("mmbench", {"lang": "de"}, "lang='de' is not known; use one of en, cn"),
    ],
)
def test_arguments(write, layout, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        read_questions(write("q", "{}"), LAYOUTS[layout], PromptFlags(**arguments))


def test_user_turn():
    question = Question(1, "Say <image-placeholder>.", "", "a.png")
    assert user_turn(question) == "<image>\nSay <image-placeholder>."
    assert user_turn(question, True) == "<im_start><image><im_end>\nSay <image-placeholder>."
    assert user_turn(Question(1, "x", "", None), True) == "x"


# ---- tasks


def test_every_benchmark_has_its_line_in_the_table():
    path = f"{benchmarks.__name__}."
    modules = [importlib.import_module(path + module.name) for module in pkgutil.iter_modules(benchmarks.__path__)]
    found = {module.__name__: module.BENCHMARK for module in modules if hasattr(module, "BENCHMARK")}
    assert found == {path + name.replace("-", "_"): benchmark for name, benchmark in BENCHMARKS.items()}


def test_tasks():
    assert list(BENCHMARKS) == [
        *("pope", "textvqa", "vqav2", "gqa", "vizwiz", "scienceqa", "mmbench", "mme", "seed", "llava-bench", "mm-vet")
    ]
    for benchmark in BENCHMARKS.values():
        assert benchmark.single_pred_prompt == (benchmark.layout in (SCIENCE, MMBENCH))
    tokens = {name: layout.max_new_tokens for name, layout in LAYOUTS.items()}
    assert tokens == {"loader": 128, "vqa": 1024, "science": 1024, "mmbench": 1024}
    assert [name for name, benchmark in BENCHMARKS.items() if "cn" in benchmark.langs] == ["mmbench"]


def test_layouts():
    assert layout_for("llava-bench", "questions.jsonl") == VQA and layout_for("pope", "x.json") == LOADER
    for path, layout in (("gs://b/q.jsonl", LOADER), ("x/q.json", SCIENCE), (Path("q.tsv"), MMBENCH)):
        assert layout_for(None, path) == layout
    with pytest.raises(ValueError, match=r"q.txt: its ending is none of .jsonl, .json, .tsv"):
        layout_for(None, "q.txt")
    with pytest.raises(ValueError, match="task='coco' is not known; use one of pope"):
        layout_for("coco", "q.jsonl")
