"""Records data/questions.npz: what the reference's evaluation programs ask and echo, and what its converters write.

Runs where the original LLaVA is installed (setup.sh makes such an environment):

    python tests/golden/record_questions.py --scripts LLaVA/scripts --mme convert_answer_to_mme.py

`--scripts` is that folder of LLaVA's repository, `--mme` a file of its eval.zip. The programs run whole, as
`python -m llava.eval.…`; only the model is not there: `generate` notes what it is given. The keys:

    files         JSON: {name: text} of the question files, the answers and the annotations, all made here
    runs          JSON: [{"program", "file", "flags", "conv_mode", "mm_use_im_start_end", "lines": answer lines,
                  "sizes": for each of them the image's (width, height), or null}]
    ids, ends     token ids of all the lines of all the runs, one after another, and where each ends
    chunks        JSON: [[number of questions, n, the chunks that exist]]
    tables        JSON: [[text, columns, rows]] as pandas' read_table reads it, or [text, null, null] where it refuses
    typed         JSON: [[column's cells, the same as pandas types them]]
    submissions   JSON: {task: {file's name: text}}; of mmbench the sheet's rows
"""

import argparse
import base64
import contextlib
import io
import json
import math
import os
import random
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openpyxl
import pandas
import torch
from llava.model import builder
from PIL import Image
from transformers import LlamaTokenizer

sys.modules["shortuuid"] = SimpleNamespace(uuid=lambda: "id")  # the answer ids are random
from llava.eval.model_vqa_loader import split_list  # noqa: E402

HERE = Path(__file__).parent
CONV_MODES = ("vicuna_v1", "mistral_instruct")
LETTER = "Answer with the option's letter from the given choices directly."


def picture(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


PICTURES = {"a.png": (3, 2), "b c.png": (4, 2), "folder/d.png": (5, 2)}


# ---- question files

LINES = [
    {"question_id": 0, "image": "a.png", "text": "Is there a dog in the image?", "category": "adversarial"},
    {"question_id": "color/000000006040.jpg", "image": "folder/d.png", "text": "Is it red?\nAnswer with one word."},
    {"text": "  spaces around \n\n", "image": "b c.png", "question_id": 7},
    {"question_id": 262144, "image": "a.png", "text": ""},
    {"question_id": "é", "image": "a.png", "text": "Déjà vu — 你好 🦙\t\tok </s> USER: <s> ### \u2028 x"},
    {"question_id": None, "image": "a.png", "text": "Say <image-placeholder>, <im_start>, <Image> or <IMAGE>."},
    {"question_id": 1.5, "image": "b c.png", "text": "Reference OCR token: A, B\nWhat?\nAnswer the question."},
]


def science():
    def entry(number, value, **others):
        return {"id": number, **others, "conversations": [{"from": "human", "value": value}, {"from": "gpt"}]}

    return [
        entry("4", "<image>\nWhich is it?\nA. one\nB. two", image="a.png"),
        entry("5", "Context: N/A\nWhich?\nA. one\nB. two"),
        entry(6, "Look\n<image>\n at  <image>this.  ", image="folder/d.png"),
        entry("7", "  no <image> here \n"),
        entry("8", "<image>", image="b c.png"),
        entry("9", "\u3000Déjà vu — 你好 🦙</s>\u00a0", image="a.png"),
    ]


COLUMNS = ("index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment")


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"' if any(c in cell for c in '\t\n\r"') else cell


def mmbench(indices, rows):
    """A table of (question, hint, A, B, C, D)."""
    lines = ["\t".join(COLUMNS)]
    for i, (index, row) in enumerate(zip(indices, rows, strict=True)):
        image = base64.b64encode(picture(2 + i, 3)).decode()
        lines.append("\t".join(map(quoted, [index, *row, "A", "x", image, "y", "z", ""])))
    return "\n".join(lines) + "\n"


ROWS = [
    ("Which one?", "The hint.", "cat", "dog", "bird", "fish"),
    ("Three?", "nan", "cat", "dog", "bird", ""),
    ("Two?", "", "yes", "no", "NaN", "fish"),
    ("Numbers among words?", "None", "1", "2.50", "007", "1e3"),
    ("Stops at None?", "NONE", "cat", "nOnE", "bird", "fish"),
    ("Stops at NAN?", "NAN", "cat", "dog", "NAN", "fish"),
    ("Stops at N/A?", "N/A", "cat", "dog", "N/A", "fish"),
    ('Says "quoted"\nand breaks\nlines?', 'A "hint"\twith a tab', '"cat"', "dog\n", " bird ", "null"),
    ('A quote " within', 'it"s', 'c"at', "d", "e", "f"),
    ("  spaces  ", "  ", " ", "dog", "bird", "fish"),
    ("图中是什么？🦙", "提示", "猫", "狗", "鸟", "鱼"),
    ("No options?", "", "", "dog", "bird", "fish"),
    ("<im_start> <image-placeholder> </s>", "", "a", "b", "", ""),
]


def question_files():
    loader = "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(LINES))
    return {
        "loader.jsonl": loader,
        "science.json": json.dumps(science(), indent=1, ensure_ascii=False),
        "mmbench.tsv": mmbench([str(1_000_000 + 7 * i) for i in range(len(ROWS))], ROWS),
        "mmbench_text.tsv": mmbench(["a1", "2", "3"], ROWS[:3]),
        "mmbench_float.tsv": mmbench(["1", "2.0", "03"], ROWS[:3]).replace("\n", "\r\n"),
        "mmbench_blank.tsv": "\n" + mmbench(["+1", " 2", "003"], ROWS[:3]).replace("\n", "\n\n  \n"),
    }


def planned_runs():
    for conv_mode in CONV_MODES:
        for start_end in (False, True):
            for program in ("loader", "vqa"):
                yield program, "loader.jsonl", [], conv_mode, start_end
            for flags in ([], ["--single-pred-prompt"]):
                yield "science", "science.json", flags, conv_mode, start_end
            yield "mmbench", "mmbench.tsv", ["--single-pred-prompt", "--all-rounds"], conv_mode, start_end
    for flags in (
        [],
        ["--all-rounds"],
        ["--single-pred-prompt"],
        ["--single-pred-prompt", "--lang", "cn"],
        ["--all-rounds", "--num-chunks", "3", "--chunk-idx", "1"],
    ):
        yield "mmbench", "mmbench.tsv", flags, "vicuna_v1", False
    for kind in ("text", "float", "blank"):
        yield "mmbench", f"mmbench_{kind}.tsv", [], "vicuna_v1", False


# ---- the reference's programs, without a model


class Model:
    """What the programs ask of a model; notes what it is to continue."""

    def __init__(self, mm_use_im_start_end):
        self.config = SimpleNamespace(mm_use_im_start_end=mm_use_im_start_end, image_aspect_ratio=None)
        self.ids, self.sizes = [], []

    def generate(self, input_ids, images, image_sizes, **_):
        self.ids.append(input_ids[0].tolist())
        self.sizes.append(image_sizes and list(image_sizes[0]))
        return torch.tensor([[1, 3869]])


def tokenizer_of(mm_use_im_start_end):
    tokenizer = LlamaTokenizer(str(HERE / "tokenizers/llama/tokenizer.model"), legacy=False, pad_token="<unk>")
    if mm_use_im_start_end:
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    return tokenizer


def image_processor(images, return_tensors):
    return {"pixel_values": torch.zeros(len(images), 3, 1, 1)}


def without_cuda():
    move = torch.Tensor.to
    torch.Tensor.cuda = lambda self: self
    torch.Tensor.to = lambda self, *args, device=None, non_blocking=False, **kwargs: (
        move(self, *args, **kwargs) if args or kwargs else self
    )


def execute(run, *args):
    """Runs a program as its command does, with its standard output thrown away."""
    sys.argv = ["program", *args]
    with contextlib.redirect_stdout(io.StringIO()):
        run()


def record_run(program, file, flags, conv_mode, start_end):
    model, answers = Model(start_end), "answers/x.jsonl"
    builder.load_pretrained_model = lambda *_: (tokenizer_of(start_end), model, image_processor, 2048)
    name = "model_vqa" if program == "vqa" else f"model_vqa_{program}"
    execute(
        lambda: runpy.run_module(f"llava.eval.{name}", run_name="__main__", alter_sys=True),
        *("--model-path", "llava-tiny", "--image-folder", "images", "--question-file", file),
        *("--answers-file", answers, "--conv-mode", conv_mode, "--temperature", "0", *flags),
    )
    lines = Path(answers).read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(model.ids)
    said = {"program": program, "file": file, "flags": flags, "conv_mode": conv_mode, "mm_use_im_start_end": start_end}
    return said | {"lines": lines, "sizes": model.sizes}, model.ids


# ---- pandas


def read_by_pandas(text):
    try:
        table = pandas.read_table(io.StringIO(text, newline=""), dtype=str)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError):
        return [text, None, None]
    if not isinstance(table.index, pandas.RangeIndex):  # a first row that is too long moves the columns
        return [text, None, None]
    return [text, list(table.columns), table.astype(object).where(table.notna(), None).values.tolist()]


def tables(rng, count):
    empty = [*sorted(pandas._libs.parsers.STR_NA_VALUES), "NAN", "Null", "none", "NONE", " NA", "N/A ", "#N/A"]
    yield "x\ty\n" + "".join(f"{i}\t{cell}\n" for i, cell in enumerate(empty))
    words = [*'ab" \t\n\ré', '""', '"x"', '"a\tb"', '"\n"', '"\r\n"', "\r\n", "NA", "None", ""]
    for _ in range(count):
        yield "x\ty\tz\n" + "".join(rng.choice(words) for _ in range(rng.randint(0, 14)))


TYPED = [
    ["1", "2"],
    ["1", None],
    ["1", "2.5"],
    ["1", "x"],
    ["007", "+1", "-2", " 3 "],
    ["1.", ".5", "1e3", "-1E-2", None],
    ["1_000", "2"],
    ["0x10", "2"],
    ["1 2", "3"],
    [None, "x"],
    ["٣", "1"],
]


def typed_by_pandas(cells):
    text = "x\ty\n" + "".join(f"{'' if cell is None else cell}\t\n" for cell in cells)
    column = pandas.read_table(io.StringIO(text))["x"].astype(object).tolist()
    return [cells, [None if isinstance(x, float) and math.isnan(x) else x for x in column]]


# ---- converters

ANSWERS = {
    10: "A dog.",
    11: "yes",
    12: "two  cats, and\na 1,000.5 dogs' house!",
    13: "None of the above..",
    14: "",
    15: "Déjà vu 你好",
    16: " B",
    17: "don't",
}
MME = {  # in both forms of the benchmark's folders; some questions have two spaces
    "color/questions_answers_YN/1.txt": "Is it red? Please answer yes or no.\tYes\n"
    "Is it blue?  Please answer yes or no.\tNo\n",
    "color/images/1.jpg": "",
    "OCR/2.txt": "Is it \u201cHELLO\u201d? Please answer yes or no.\tYes\nIs it BYE? Please answer yes or no.\tNo",
    "OCR/2.png": "",
    "readme.txt": "not a category",
}
SHORT = "\nAnswer the question using a single word or phrase."
MME_ANSWERS = [
    ("color/1.jpg", "Is it red?" + SHORT, "Yes"),
    ("OCR/2.png", "Is it \u201cHELLO\u201d?" + SHORT, "Yes, it is."),
    ("color/1.jpg", "Is it blue?" + SHORT, "No"),
    ("OCR/folder/2.more.png", "Is it BYE? Please answer yes or no." + SHORT, ""),
]


def answer_lines(answers):
    return "".join(json.dumps({"question_id": i, "prompt": p, "text": t}) + "\n" for i, p, t in answers)


def converter_files():
    texts = [(i, "?", text) for i, text in ANSWERS.items()]
    asked = [{"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in (*reversed(ANSWERS), 99)]
    seed = [
        {"question_id": str(i), "answer": text, "question_type_id": 1, "data_type": "video" if i % 2 else "image"}
        for i, text in ANSWERS.items()
    ]
    indices = [str(1_000_000 + 7 * i) for i in range(len(ROWS))]
    rounds = [(int(index), "?", f"{letter} {i}") for i, index in enumerate(indices[1:]) for letter in "AB"]
    rounds[2] = (*rounds[2][:2], "<b>&amp; \u00e9\n x ")
    return {
        "answers.jsonl": answer_lines(texts),
        "broken.jsonl": answer_lines(texts[:3]) + '{"question_id": 13, "te\n' + answer_lines(texts[3:]),
        "asked.jsonl": "".join(json.dumps(line) + "\n" for line in asked),
        "answered.jsonl": "".join(json.dumps(line) + "\n" for line in asked[:-1]),
        "seed.json": json.dumps({"question_type": {"Scene": 1}, "questions": seed}),
        "mmbench_answers.jsonl": answer_lines(rounds),
        "mme.json": json.dumps(MME),
        "mme_answers.jsonl": answer_lines(MME_ANSWERS),
    }


def place(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def record_submissions(scripts, mme, files):
    def run(script, *args):
        execute(lambda: runpy.run_path(str(script), run_name="__main__"), *args)

    place("vqav2/answers/s/c/merge.jsonl", files["broken.jsonl"])
    place("vqav2/llava_vqav2_mscoco_test2015.jsonl", files["asked.jsonl"])
    run(scripts / "convert_vqav2_for_submission.py", "--dir", "vqav2", "--ckpt", "c", "--split", "s")
    run(
        scripts / "convert_vizwiz_for_submission.py",
        *("--annotation-file", "answered.jsonl", "--result-file", "broken.jsonl", "--result-upload-file", "out/vizwiz"),
    )
    run(scripts / "convert_gqa_for_eval.py", "--src", "answers.jsonl", "--dst", "out/gqa")
    run(scripts / "convert_mmvet_for_eval.py", "--src", "answers.jsonl", "--dst", "out/mm-vet")
    run(
        scripts / "convert_seed_for_submission.py",
        *("--annotation-file", "seed.json", "--result-file", "answers.jsonl", "--result-upload-file", "out/seed"),
    )
    run(
        scripts / "convert_mmbench_for_submission.py",
        *("--annotation-file", "mmbench.tsv", "--result-dir", ".", "--upload-dir", "out"),
        *("--experiment", "mmbench_answers"),
    )
    for name, text in MME.items():
        place(f"MME_Benchmark_release_version/{name}", text)
    place("answers/x.jsonl", files["mme_answers.jsonl"])
    run(mme, "--experiment", "x")
    sheet = openpyxl.load_workbook("out/mmbench_answers.xlsx").active
    written = {"vqav2": "vqav2/answers_upload/s/c.json"} | {t: f"out/{t}" for t in ("vizwiz", "gqa", "mm-vet", "seed")}
    return {task: {"": Path(path).read_text(encoding="utf-8")} for task, path in written.items()} | {
        "mme": {path.name: path.read_text(encoding="utf-8") for path in Path("eval_tool/answers/x").iterdir()},
        "mmbench": [list(row) for row in sheet.iter_rows(values_only=True)],
    }


def record(scripts, mme):
    """All keys; the working directory is an empty one."""
    files = question_files() | converter_files()
    for name, text in files.items():
        place(name, text)
    for name, size in PICTURES.items():
        place(f"images/{name}", picture(*size))
    os.mkdir("out")
    without_cuda()
    runs, ids = zip(*(record_run(*run) for run in planned_runs()), strict=True)
    rows, rng = [row for of_run in ids for row in of_run], random.Random(0)
    chunks = [[count, n, split_list(list(range(count)), n)] for count in range(1, 12) for n in range(1, 8)]
    return {
        "files": json.dumps(files),
        "runs": json.dumps(runs),
        "ids": np.concatenate(rows).astype(np.int32),
        "ends": np.cumsum([len(row) for row in rows], dtype=np.int32),
        "chunks": json.dumps(chunks),
        "tables": json.dumps([read_by_pandas(text) for text in tables(rng, 400)]),
        "typed": json.dumps([typed_by_pandas(cells) for cells in TYPED]),
        "submissions": json.dumps(record_submissions(scripts, mme, files)),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scripts", type=Path, required=True, help="scripts/ of LLaVA's repository")
    parser.add_argument("--mme", type=Path, required=True, help="convert_answer_to_mme.py of LLaVA's eval.zip")
    args = parser.parse_args()
    scripts, mme = args.scripts.resolve(), args.mme.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        out = record(scripts, mme)
        os.chdir(HERE)
    np.savez_compressed(HERE / "data" / "questions.npz", **{key: np.array(value) for key, value in out.items()})


if __name__ == "__main__":
    main()
