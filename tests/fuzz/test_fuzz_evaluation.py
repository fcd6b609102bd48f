"""Question files, answers, annotations and submissions of all benchmarks, changed and damaged: taken, or one line."""

import argparse
import base64
import contextlib
import io
import json
import random

import pytest
from etils import epath
from fuzz import odd
from test_scores import gqa_question, mme_answers, people

from llava_jax.cli import add_command
from llava_jax.cli.score import print_scores
from llava_jax.cli.submit import run as run_submit
from llava_jax.evaluation.answers import AnswerFile, AnswerShard, answer_line
from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.benchmarks.mmbench import MMBENCH
from llava_jax.evaluation.benchmarks.scienceqa import SCIENCE
from llava_jax.evaluation.questions import LOADER, VQA, PromptFlags, Question, get_chunk, read_questions, user_turn

PICTURE = base64.b64encode(bytes(range(120))).decode()
TABLE = "index\tquestion\thint\tA\tB\tC\tD\timage\tanswer\tcategory\tl2-category\n"
TABLE += f"1\tWhich?\t\tcat\tdog\tbird\t\t{PICTURE}\tB\tx\ty\n2\tAnd?\thint\tcat\tdog\t\t\t1\tA\tx\tz\n"
TABLE += f"3\tNone?\t\tcat\tdog\tNone\tbird\t{PICTURE}\tD\tx\tz\n"


class Lines(list):
    """JSON values, one a line."""


def mmbench_answers():
    options = {1: ["cat", "dog", "bird"], 2: ["cat", "dog"], 3: ["cat", "dog"]}
    for number, shown in options.items():
        for r in range(len(shown)):
            letters = list("ABC"[: len(shown)])
            fields = {"options": shown[r:] + shown[:r], "option_char": letters[r:] + letters[:r]}
            yield {"question_id": number, "round_id": r, "prompt": "?", "text": "A", **fields}


def mme_files():
    answers, truth = mme_answers(random.Random(0))
    files: dict[str, str] = {}
    for (category, file, question), true in truth.items():
        name = f"MME/{category}/{file}"
        files[name] = files.get(name, "") + f"{question}\t{true}\n"
    return {"answers.jsonl": Lines(answers)} | files


def said(*ids, **more):
    return Lines({"question_id": number, "prompt": "Is it?\nAnswer shortly.", "text": "dog", **more} for number in ids)


def seed_question(number, kind, answer):
    return {"question_id": number, "question_type_id": 1, "data_type": kind, "answer": answer}


# task → (its files, what --annotations names, what --question-file names)
SCORED = {
    "pope": (
        {
            "answers.jsonl": said(1, 2),
            "pope.jsonl": Lines({"question_id": n, "category": "random", "image": "a/x.jpg"} for n in (1, 2)),
            "coco/coco_pope_random.json": Lines({"label": label, "image": "x.jpg"} for label in ("yes", "no")),
        },
        "coco",
        "pope.jsonl",
    ),
    "textvqa": (
        {
            "answers.jsonl": said("i"),
            "val.json": {"data": [{"image_id": "i", "question": "Is it?", "answers": ["dog"] * 10}]},
        },
        "val.json",
        None,
    ),
    "vqav2": (
        {
            "answers.jsonl": said(5, 6),
            "v2.json": {"annotations": [people(*"abcdefghij", question_id=5), people(*["dog"] * 10, question_id=6)]},
        },
        "v2.json",
        None,
    ),
    "gqa": (
        {
            "answers.jsonl": said("10", "11"),
            "q.json": {
                "10": gqa_question("dog", operations=[("select", "x"), ("query", "name")]),
                "11": gqa_question("yes", "verify", None),
            },
        },
        "q.json",
        None,
    ),
    "vizwiz": (
        {
            "answers.jsonl": said(5, 6),
            "val.json": [people(*["dog"] * 10, image=image) for image in ("a.jpg", "b.jpg")],
            "q.jsonl": Lines({"question_id": n, "image": image} for n, image in ((5, "a.jpg"), (6, "b.jpg"))),
        },
        "val.json",
        "q.jsonl",
    ),
    "scienceqa": (
        {
            "answers.jsonl": said("1", "2"),
            "pid_splits.json": {"test": ["1", "2"], "val": []},
            "problems.json": {n: {"choices": ["x", "y"], "answer": 1} for n in ("1", "2")},
        },
        ".",
        None,
    ),
    "mmbench": ({"answers.jsonl": Lines(mmbench_answers()), "dev.tsv": TABLE}, "dev.tsv", None),
    "mme": (mme_files(), "MME", None),
    "seed": (
        {
            "answers.jsonl": said(1, "v_2"),
            "seed.json": {
                "questions": [seed_question("1", "image", "A"), seed_question("v_2", "video", "B")],
                "question_type": {"Scene": 1, "Other": 2},
            },
        },
        "seed.json",
        None,
    ),
}
ASKED = Lines({"question_id": n, "image": f"{n}.jpg", "text": "?"} for n in (1, 2))
# task → (its files, what --annotations names, what --question-file names)
SUBMITTED = {
    "vqav2": ({"answers.jsonl": said(1, 2), "q.jsonl": ASKED}, None, "q.jsonl"),
    "gqa": ({"answers.jsonl": said("1", "2")}, None, None),
    "vizwiz": ({"answers.jsonl": said(1, 2), "q.jsonl": ASKED}, None, "q.jsonl"),
    "mmbench": ({"answers.jsonl": Lines(mmbench_answers()), "dev.tsv": TABLE}, None, "dev.tsv"),
    "mme": SCORED["mme"],
    "seed": SCORED["seed"],
    "mm-vet": ({"answers.jsonl": said(1, 2)}, None, None),
}
QUESTIONS = {
    LOADER: ASKED,
    VQA: ASKED,
    SCIENCE: [
        {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
        {"id": 2, "conversations": [{"from": "human", "value": "What?"}]},
    ],
    MMBENCH: TABLE,
}


def as_bytes(content) -> bytes:
    if isinstance(content, str):
        return content.encode(errors="surrogatepass")
    if isinstance(content, Lines):
        return "".join(odd.dump(line) + "\n" for line in content).encode()
    return odd.dump(content).encode()


def spoilt(rng, content) -> bytes:
    """A file's bytes with one thing wrong, or odd, somewhere."""
    if rng.random() < 0.25:
        return odd.damaged(rng, as_bytes(content))
    if isinstance(content, Lines):
        at = rng.randrange(len(content))
        return as_bytes(Lines([*content[:at], odd.changed(rng, content[at]), *content[at + rng.randrange(2) :]]))
    if not isinstance(content, str):
        return as_bytes(odd.changed(rng, content))
    lines = content.split("\n")
    at = rng.randrange(len(lines))
    cells = lines[at].split("\t")
    cells[rng.randrange(len(cells))] = rng.choice(("None", "NA", "1", "2", "", str(odd.value(rng)), odd.text(rng)))
    return as_bytes("\n".join([*lines[:at], "\t".join(cells), *lines[at + 1 :]]))


def write(folder, files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(as_bytes(content))


def refusal_with_one_spoilt(rng, folder, files, function):
    """`odd.refusal_of`, while one of the files, of which the answers are one in two, is spoilt."""
    name = "answers.jsonl" if rng.random() < 0.5 else rng.choice(list(files))
    (folder / name).write_bytes(spoilt(rng, files[name]))
    try:
        return odd.refusal_of(function)
    finally:
        (folder / name).write_bytes(as_bytes(files[name]))


@contextlib.contextmanager
def printed():
    """Standard output as a terminal takes it: half characters are errors."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)):
        yield


def run_all(name, numbers, case) -> None:
    """Runs all cases; each that neither takes its input nor refuses it with one line is told."""
    faults, refused = [], 0
    for number in numbers:
        try:
            refused += case(odd.generator(name, number)) is not None
        except Exception as error:
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
    assert not faults, f"{len(faults)} of {len(numbers)}: " + "\n".join(faults)
    assert 0 < refused < len(numbers) or len(numbers) < 20


def ask(path, layout, all_rounds):
    """What `evaluate` does with a question file before there is a model."""
    for n, question in enumerate(get_chunk(read_questions(path, layout, PromptFlags(all_rounds=all_rounds)), 2, 0)):
        user_turn(question)
        line = answer_line(question, "", "model", question.error)
        assert line.count("\n") == 1 and json.loads(line)["prompt"] == question.prompt, n
        assert "\n" not in (question.error or "") and len(question.error or "") < 2000


@pytest.mark.parametrize("layout", QUESTIONS, ids=lambda layout: layout.name)
@odd.cases(25, 600)
def test_question_files(tmp_path, numbers, layout):
    path = tmp_path / "questions"
    path.write_bytes(as_bytes(QUESTIONS[layout]))
    assert odd.refusal_of(ask, path, layout, False) is None

    def case(rng):
        path.write_bytes(spoilt(rng, QUESTIONS[layout]))
        return odd.refusal_of(ask, path, layout, layout == MMBENCH and rng.random() < 0.5)

    run_all(f"questions {layout.name}", numbers, case)


ANSWERED = [Question(n, "?", "?", None, answer_id=letter * 22) for n, letter in enumerate("abcd")]


def finish(path) -> None:
    """What `evaluate` does with the answers that are there, and with one that is new."""
    file = AnswerFile(epath.Path(path), ANSWERED)
    answered = file.answered()
    part = AnswerShard(file.part(0))
    part.append(answer_line(question, "new", "m") for question in ANSWERED if question.answer_id not in answered)
    file.merge()


@odd.cases(60, 1500)
def test_answers_to_go_on_with(tmp_path, numbers):
    path = tmp_path / "answers.jsonl"
    lines = Lines(
        json.loads(answer_line(question, "x", "m", error))
        for question, error in zip(ANSWERED, (None, "no picture", None, None), strict=True)
    )

    def case(rng):
        for file in tmp_path.iterdir():
            file.unlink()
        name = rng.choice(("answers.jsonl", "answers.jsonl.part-0", "answers.jsonl.part-3"))
        (tmp_path / name).write_bytes(spoilt(rng, Lines(lines[: rng.randrange(1, 5)])))
        refusal = odd.refusal_of(finish, path)
        if refusal is None:
            assert path.read_bytes().count(b"\n") == len(ANSWERED) and len(list(tmp_path.iterdir())) == 1
        return refusal

    run_all("answers", numbers, case)


@pytest.mark.parametrize("task", SCORED)
@odd.cases(20, 300)
def test_scores(tmp_path, numbers, task):
    files, annotations, questions = SCORED[task]

    def run():
        asked = None if questions is None else str(tmp_path / questions)
        with printed():
            print_scores(task, str(tmp_path / "answers.jsonl"), str(tmp_path / annotations), asked)

    write(tmp_path, files)
    assert odd.refusal_of(run) is None
    run_all(f"score {task}", numbers, lambda rng: refusal_with_one_spoilt(rng, tmp_path, files, run))


@pytest.mark.parametrize("task", SUBMITTED)
@odd.cases(8, 200)
def test_submissions(tmp_path, numbers, task):
    files, annotations, questions = SUBMITTED[task]
    parser = argparse.ArgumentParser()
    add_command(parser, "submit")
    flags = ["--task", task, "--answers-file", str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "out")]
    flags += ["--annotations", str(tmp_path / annotations)] if annotations else []
    flags += ["--question-file", str(tmp_path / questions)] if questions else []

    def run():
        with printed():
            run_submit(parser.parse_args(flags))

    write(tmp_path, files)
    assert odd.refusal_of(run) is None
    run_all(f"submit {task}", numbers, lambda rng: refusal_with_one_spoilt(rng, tmp_path, files, run))


def test_every_task_is_among_them():
    assert set(SCORED) == {task for task, benchmark in BENCHMARKS.items() if benchmark.scorer}
    assert set(SUBMITTED) == {task for task, benchmark in BENCHMARKS.items() if benchmark.submission}
