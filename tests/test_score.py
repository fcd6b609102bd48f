"""`llava-jax score`: what it prints, and that it checks everything before it scores."""

import argparse
import csv
import json
import random
import re
from pathlib import Path

import pytest
from test_scores import gqa_question, mmbench_rounds, mme_answers, people, seed_lines

from llava_jax.cli import add_command
from llava_jax.cli.score import run
from llava_jax.evaluation import scoring
from llava_jax.evaluation.benchmarks import BENCHMARKS, mme

SCORED = [task for task, benchmark in BENCHMARKS.items() if benchmark.scorer]


@pytest.fixture(scope="module")
def golden():
    path = Path(__file__).parent / "golden" / "data" / "scores.json"
    return json.loads(path.read_text(encoding="utf-8"))


class Workplace:
    """The files of one benchmark, as LLaVA's eval folder has them, to be damaged by a test."""

    def __init__(self, folder):
        self.folder = folder

    def lines(self, name, entries):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        return str(path)

    def json(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    def args(self, task, answers, annotations=None, questions=None):
        parser = argparse.ArgumentParser()
        add_command(parser, "score")
        flags = [
            "--task",
            task,
            "--answers-file",
            answers if isinstance(answers, str) else self.lines("a.jsonl", answers),
        ]
        flags += ["--annotations", str(annotations)] if annotations else []
        return parser, flags + (["--question-file", questions] if questions else [])

    def score(self, task, answers, annotations=None, questions=None, *, capsys, as_json=True):
        parser, flags = self.args(task, answers, annotations, questions)
        run(parser.parse_args([*flags, *(["--json"] if as_json else [])]))
        out = capsys.readouterr().out
        if as_json:
            assert out.count("\n") == 1
        return json.loads(out) if as_json else out


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path)


def pope_files(place, golden):
    """Without the two categories whose labels the reference pairs with another number of answers."""
    recorded = golden["pope"]
    questions = [entry for entry in recorded["questions"] if entry["category"] in ("adversarial", "popular")]
    numbers = {entry["question_id"] for entry in questions}
    for category in ("adversarial", "popular"):
        labels = [{"label": label, "image": "x.jpg"} for label in recorded["labels"][category]]
        place.lines(f"pope/coco/coco_pope_{category}.json", labels)
    path = place.lines("pope/llava_pope_test.jsonl", [{**entry, "image": "val2014/x.jpg"} for entry in questions])
    return [entry for entry in recorded["answers"] if entry["question_id"] in numbers], place.folder / "pope/coco", path


def test_score_prints_what_was_published_beside_ours(place, golden, capsys):
    answers, coco, _ = pope_files(place, golden)
    figures = place.score("pope", answers, coco, capsys=capsys)
    assert figures["task"] == "pope" and figures["answers"] == 100 and figures["published"] == {"mean_f1": 86.5}
    assert figures["adversarial"]["accuracy"] == pytest.approx(52)
    lines = place.score("pope", answers, coco, capsys=capsys, as_json=False).splitlines()
    assert lines[0].split() == ["pope,", "100", "answers", "ours", "published"]
    assert lines[1].split()[:4] == ["mean", "f1", f"{figures['mean_f1']:.2f}", "86.5"]
    assert "adversarial accuracy" in "\n".join(lines)
    assert lines[-1].startswith("published: llava-v1.6-vicuna-7b, docs/MODEL_ZOO.md")


def test_pope_is_checked(place, golden, capsys):
    answers, coco, questions = pope_files(place, golden)

    def fails(message, answers=answers, error=ValueError, **files):
        with pytest.raises(error, match=message):
            place.score("pope", answers, coco, **files, capsys=capsys)

    fails(
        r"99 answers, but .*llava_pope_test.jsonl has 100 questions; without an answer: 99; answer the rest",
        answers[:-1],
    )
    fails("answered more than once: 99; keep one", answers + answers[-1:])
    fails("1 of 101 answers are to questions that .* does not have: 'x'", [*answers, {"question_id": "x", "text": ""}])
    fails("are not in the order of", answers[::-1])
    path = coco / "coco_pope_popular.json"
    good = path.read_text()
    path.write_text(good + good.splitlines()[0] + "\n")
    fails("51 labels for 50 questions")
    path.write_text(good.replace("x.jpg", "y.jpg", 1))
    fails("line 1: about y.jpg, but .* asks about x.jpg there")
    path.write_text("\n".join(["{}"] * 50))
    fails("coco_pope_popular.json, line 1: has no 'label'")
    path.unlink()
    fails("has no coco_pope_popular.json, but")
    Path(questions).rename(place.folder / "q.jsonl")
    fails("no such file; name POPE's questions with --question-file", error=FileNotFoundError)
    path.write_text(good)
    assert place.score("pope", answers, coco, str(place.folder / "q.jsonl"), capsys=capsys)["mean_f1"] > 0
    with pytest.raises(FileNotFoundError, match="has no coco_pope"):
        place.score("pope", answers, place.folder, capsys=capsys)


def test_textvqa_is_checked(place, golden, capsys):
    recorded = golden["textvqa"]
    answers = recorded["answers"]
    annotations = place.json("val.json", {"data": recorded["annotations"]})
    figures = place.score("textvqa", answers, annotations, capsys=capsys)
    assert f"Accuracy: {figures['accuracy']:.2f}%" == recorded["printed"][2]
    with pytest.raises(ValueError, match=r"59 answers, but .* has 60 questions"):
        place.score("textvqa", answers[1:], annotations, capsys=capsys)
    with pytest.raises(ValueError, match="has no question 'q' about image 'i'"):
        place.score("textvqa", [{"question_id": "i", "prompt": "Q\nA", "text": ""}], annotations, capsys=capsys)
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: has no 'prompt'"):
        place.score("textvqa", [{"question_id": "i", "text": ""}], annotations, capsys=capsys)
    test_split = place.json("test.json", {"data": [{"image_id": "i", "question": "q"}]})
    with pytest.raises(ValueError, match="entry 1: has no 'answers'; a test split has none, its server scores it"):
        place.score("textvqa", answers, test_split, capsys=capsys)


def test_vqav2_and_vizwiz_are_checked(place, capsys):
    annotations = [people(*["dog"] * 10, question_id=5), people(*["cat"] * 10, question_id=6)]
    path = place.json("v2.json", {"annotations": annotations})
    answers = [{"question_id": 5, "text": "A dog."}, {"question_id": 6, "text": "dog"}]
    assert place.score("vqav2", answers, path, capsys=capsys)["accuracy"] == 50
    with pytest.raises(ValueError, match=r"1 answers, but .* has 2 questions; without an answer: 6"):
        place.score("vqav2", answers[:1], path, capsys=capsys)
    with pytest.raises(ValueError, match="its server scores it"):
        place.score("vqav2", answers, place.json("q.json", {"questions": []}), capsys=capsys)
    val = place.json("val.json", [people(*["dog"] * 10, image="a.jpg"), people(*["cat"] * 10, image="b.jpg")])
    by_image = [{"question_id": "b.jpg", "text": "dog"}, {"question_id": "a.jpg", "text": "Dog"}]
    assert place.score("vizwiz", by_image, val, capsys=capsys)["accuracy"] == 50
    with pytest.raises(ValueError, match=r"2 of 2 answers are to questions that .* does not have: 5, 6"):
        place.score("vizwiz", answers, val, capsys=capsys)
    questions = place.lines("q.jsonl", [{"question_id": 5, "image": "a.jpg"}, {"question_id": 6, "image": "b.jpg"}])
    assert place.score("vizwiz", answers, val, questions, capsys=capsys)["accuracy"] == 50
    test_split = place.json("test.json", [{"image": "a.jpg", "question": "?"}])
    with pytest.raises(ValueError, match="entry 1: has no 'answers', 'answer_type'; a test split"):
        place.score("vizwiz", by_image, test_split, capsys=capsys)
    empty = place.json("e.json", {"annotations": [people(question_id=5)]})
    with pytest.raises(ValueError, match="a question has no annotated answers"):
        place.score("vqav2", answers[:1], empty, capsys=capsys)


def test_gqa_is_checked(place, capsys):
    questions = {"10": gqa_question("red"), "11": gqa_question("blue", "verify")}
    place.json("data/testdev_balanced_questions.json", questions)
    answers = [{"question_id": "11", "text": "Blue."}, {"question_id": "10", "text": "blue"}]
    figures = place.score("gqa", answers, place.folder / "data", capsys=capsys)
    assert (figures["accuracy"], figures["binary"], figures["open"]) == (50, 100, 0)
    out = place.score("gqa", answers, place.folder / "data", capsys=capsys, as_json=False)
    assert re.search(r"^structural verify +100.00$", out, re.MULTILINE)
    with pytest.raises(ValueError, match="without an answer: '10'"):
        place.score("gqa", answers[:1], place.folder / "data", capsys=capsys)
    bare = place.json("bare.json", {"10": {"question": "?", "isBalanced": True}})
    with pytest.raises(ValueError, match="entry 1: has no 'answer', 'types', 'semantic', 'groups'"):
        place.score("gqa", answers[1:], bare, capsys=capsys)


def test_scienceqa_is_checked(place, golden, capsys):
    recorded = golden["scienceqa"]
    place.json("sqa/problems.json", recorded["problems"])
    place.json("sqa/pid_splits.json", {"test": recorded["split"]})
    answers = [entry for entry in recorded["answers"] if entry["question_id"] in recorded["split"]]
    with pytest.raises(ValueError, match=r"88 answers, but .* has 90 questions; without an answer: '77', '78'"):
        place.score("scienceqa", answers, place.folder / "sqa", capsys=capsys)
    answers += [{"question_id": number, "prompt": "Unknown", "text": "FAILED"} for number in ("77", "78")]
    figures = place.score("scienceqa", answers, place.folder / "sqa", capsys=capsys)
    assert f"Accuracy: {figures['accuracy']:.2f}%" in recorded["printed"][0]
    assert figures["published"] == {"img_accuracy": 70.1}
    place.json("sqa/problems.json", {"1": {}})
    with pytest.raises(ValueError, match=r"problems.json: is not ScienceQA's"):
        place.score("scienceqa", answers, place.folder / "sqa", capsys=capsys)
    with pytest.raises(FileNotFoundError, match=r"pid_splits.json"):
        place.score("scienceqa", answers, place.folder / "nowhere", capsys=capsys)


def mmbench_table(
    place, name, rows, columns=("index", "question", "hint", "A", "B", "C", "image", "answer", "category")
):
    path = place.folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            cells = {"question": 'What\n"is" it?', "A": "dog", "B": "cat", "C": "owl", "image": "x" * 200_000}
            writer.writerow({**cells, **row})
    return str(path)


def test_mmbench_is_checked(place, capsys):
    rows = [{"index": 3, "answer": "B", "category": "p"}, {"index": 4, "answer": "A", "category": "q"}]
    path = mmbench_table(place, "mmbench_dev_20230712.tsv", rows)
    answers = [*mmbench_rounds(3, "B", ["B", "A", "C"]), *mmbench_rounds(4, "A", ["A", "A", "B"])]
    figures = place.score("mmbench", answers, path, capsys=capsys)
    assert (figures["circular"], figures["vanilla"], figures["published"]) == (50, 100, {"circular": 67.4})
    assert figures["category"] == {"p": 100, "q": 0}
    chinese = mmbench_table(place, "mmbench_dev_cn_20231003.tsv", rows)
    assert place.score("mmbench", answers, chinese, capsys=capsys)["published"] == {"circular": 60.6}
    out = place.score("mmbench", answers[::3], path, capsys=capsys, as_json=False)
    assert re.search(r"^circular +- +67.4", out, re.MULTILINE)
    with pytest.raises(ValueError, match=r"answered more than once: \(4, 2\)"):
        place.score("mmbench", answers + answers[-1:], path, capsys=capsys)
    with pytest.raises(ValueError, match="without an answer: 4"):
        place.score("mmbench", answers[:3], path, capsys=capsys)
    with pytest.raises(ValueError, match="question 3 has 2 of its 3 rotations"):
        place.score("mmbench", [answers[0], *answers[2:]], path, capsys=capsys)
    with pytest.raises(ValueError, match="line 1: has no 'round_id', 'options', 'option_char'"):
        place.score("mmbench", [{"question_id": 3, "text": "A"}], path, capsys=capsys)
    with pytest.raises(ValueError, match="line 1: options='dog' must be a list"):
        place.score("mmbench", [{**answers[0], "options": "dog"}], path, capsys=capsys)
    unnumbered = mmbench_table(place, "unnumbered.tsv", [{**row, "index": "x"} for row in rows])
    with pytest.raises(ValueError, match="the column index must have a whole number in each row"):
        place.score("mmbench", answers, unnumbered, capsys=capsys)
    other = mmbench_table(place, "other.tsv", [{**row, "answer": "D"} for row in rows])
    with pytest.raises(ValueError, match=r"but .*other.tsv has the answer 'D'; give the file that was asked"):
        place.score("mmbench", answers, other, capsys=capsys)
    test_split = mmbench_table(place, "test.tsv", rows, ("index", "question", "A", "B", "C", "image"))
    with pytest.raises(ValueError, match=r"test.tsv: needs the columns index and answer; a test split has none"):
        place.score("mmbench", answers, test_split, capsys=capsys)


def test_mmbench_rows_that_lost_their_true_option_are_wrong(place, capsys):
    """Their cell reads as empty, for MMBench's own program too; the others are scored."""
    columns = ("index", "question", "hint", *"ABCD", "image", "answer", "category", "l2-category")
    options = {"A": "dog", "B": "cat", "C": "None", "D": "owl"}
    rows = [{"index": 3, "answer": "D", **options}, {"index": 4, "answer": "A", **options}]
    rows += [{"index": 5, "answer": "C", "A": "dog", "B": "cat", "C": "", "D": ""}]
    path = mmbench_table(place, "dev.tsv", rows, columns)
    answers = [line for n in (3, 5) for line in mmbench_rounds(n, "A", ["A", "A"], ("dog", "cat"))]
    answers += mmbench_rounds(4, "A", ["A", "B"], ("dog", "cat"))
    figures = place.score("mmbench", answers, path, capsys=capsys)
    assert figures["circular"] == figures["vanilla"] == pytest.approx(100 / 3)
    assert figures["notes"] == [
        f"{path}, line 2, column C: 'None' counts as empty, as in the original; not asked: C, D; "
        "the answer is D, so it is scored as wrong",
        f"{path}, line 6, column C: is empty; the answer is C, so it is scored as wrong",
    ]
    lines = place.score("mmbench", answers, path, capsys=capsys, as_json=False).splitlines()
    assert lines[-2:] == figures["notes"]
    no_options = {"round_id": 0, "text": "", "options": [], "option_char": []}
    with pytest.raises(
        ValueError, match=r"question 4 was asked with options \[\], but .* has the answer 'A'; give the"
    ):
        place.score("mmbench", [*answers[:4], {"question_id": 4, **no_options}], path, capsys=capsys)
    with pytest.raises(ValueError, match="line 1: 'option_char' is not the letters of its 'options'"):
        place.score("mmbench", [{**answers[0], "option_char": ["A", "Q"]}, *answers[1:]], path, capsys=capsys)
    many = [{"index": n, "answer": "C", "C": ""} for n in range(30)]
    path = mmbench_table(place, "many.tsv", many, columns)
    answers = [line for n in range(30) for line in mmbench_rounds(n, "A", ["A"], ("dog", "cat"))]
    notes = place.score("mmbench", answers, path, capsys=capsys)["notes"]
    assert len(notes) == 21 and notes[-1] == "and 10 more rows are scored as wrong"


@pytest.mark.parametrize("task", ["pope", "textvqa", "vqav2", "gqa", "vizwiz", "scienceqa", "mmbench", "mme", "seed"])
def test_annotations_are_checked_before_anything_is_asked(place, task):
    """As `evaluate --annotations` does: an annotation of another kind is one line that names the file."""
    files = {
        "coco/coco_pope_random.json": "7",
        "q.jsonl": '{"question_id": 1, "category": "random", "image": 5}',
        "textvqa": '{"data": [{"image_id": "i", "question": 5, "answers": []}]}',
        "vqav2": '{"annotations": [{"question_id": 1, "answers": [5], "answer_type": "x", "question_type": "y"}]}',
        "gqa": '{"1": {"answer": "x", "isBalanced": 1, "question": "?", "types": [], "semantic": [], "groups": {}}}',
        "vizwiz": '[{"image": "a", "answers": [{"answer": null}], "answer_type": "x"}]',
        "pid_splits.json": '{"test": [["1"]]}',
        "problems.json": "{}",
        "mmbench": "index\tanswer\nx\tA\n",
        "MME/OCR/0.txt": b"\xff",
        "seed": '{"questions": [{"question_id": 1, "question_type_id": 9, "data_type": "image", "answer": "A"}], '
        '"question_type": {"Scene": 1}}',
    }
    for name, content in files.items():
        (place.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"pope": "coco", "scienceqa": ".", "mme": "MME"}.get(task, task)
    with pytest.raises(ValueError) as error:
        asked = str(place.folder / "q.jsonl") if task == "pope" else None
        scoring.check_annotations(task, "a.jsonl", str(place.folder / given), asked)
    assert str(error.value).startswith(str(place.folder)) and "\n" not in str(error.value)


def test_mme_is_checked(place, capsys):
    answers, truth = mme_answers(random.Random(1))
    folder = place.folder / "MME_Benchmark_release_version"
    for (category, file, question), true in truth.items():
        sub = folder / category
        if category in ("existence", "artwork"):  # two ways in which MME lays its files out
            (sub / "images").mkdir(parents=True, exist_ok=True)
            sub = sub / "questions_answers_YN"
        sub.mkdir(parents=True, exist_ok=True)
        with (sub / file).open("a", encoding="utf-8") as out:
            out.write(f"{question}\t{true}\n")
    assert mme.read_truth(folder) == truth
    figures = place.score("mme", answers, folder, capsys=capsys)
    assert figures["perception"] == mme.score_mme(answers, truth)["perception"]
    assert figures["published"] == {"perception": 1519, "cognition": 332}
    out = place.score("mme", answers, folder, capsys=capsys, as_json=False)
    assert re.search(rf"^subtasks OCR +{figures['subtasks']['OCR']['score']:.2f}$", out, re.MULTILINE)
    with pytest.raises(ValueError, match=r"83 answers, but .* has 84 questions; without an answer: .'code_reasoning'"):
        place.score("mme", answers[:-1], folder, capsys=capsys)
    with pytest.raises(ValueError, match="each image of existence needs two answers, one after the other"):
        place.score("mme", [answers[1], answers[2], answers[0], *answers[3:]], folder, capsys=capsys)
    with pytest.raises(ValueError, match="each image of existence needs two answers"):
        place.score("mme", answers[:2] + answers, folder, capsys=capsys)
    with pytest.raises(ValueError, match=r"answers are to questions that .* does not have: .'count', '0.txt', 'Who"):
        place.score("mme", [*answers, {**answers[6], "prompt": "Who?"}], folder, capsys=capsys)
    with pytest.raises(ValueError, match=r"ids are like existence/000000006040.jpg, these are not"):
        place.score("mme", [{**answers[0], "question_id": 5}], folder, capsys=capsys)
    (folder / "OCR" / "0.txt").write_text("Is it?\tPerhaps\n")
    with pytest.raises(ValueError, match=r"0.txt: 'Is it.*Perhaps' is not a question, a tab and Yes or No"):
        place.score("mme", answers, folder, capsys=capsys)
    with pytest.raises(FileNotFoundError, match="none: not there; mme needs the folder"):
        place.score("mme", answers, place.folder / "none", capsys=capsys)


def test_seed_is_checked(place, golden, capsys):
    recorded = golden["seed"]
    path = place.json("SEED-Bench.json", recorded["annotations"])
    for name in ("all", "no videos"):  # many have no videos
        case = recorded["cases"][name]
        assert seed_lines(place.score("seed", case["answers"], path, capsys=capsys)) == case["printed"]
    images = recorded["cases"]["no videos"]["answers"]
    with pytest.raises(ValueError, match="without an answer: "):
        place.score("seed", images[1:], path, capsys=capsys)
    with pytest.raises(ValueError, match="does not have: 'x'"):
        place.score("seed", [{"question_id": "x", "text": ""}], path, capsys=capsys)
    with pytest.raises(ValueError, match=r"is not SEED-Bench.json"):
        place.score("seed", images, place.json("q.json", []), capsys=capsys)


@pytest.mark.parametrize("task", SCORED)
def test_answers_are_checked_whatever_the_task(place, capsys, task):
    answers = place.folder / "answers.jsonl"
    with pytest.raises(ValueError, match=f"--task {task} needs --annotations: "):
        place.score(task, str(answers), capsys=capsys)
    with pytest.raises(FileNotFoundError, match=r"answers.jsonl: cannot be read"):
        place.score(task, str(answers), place.folder, capsys=capsys)
    answers.write_text("\n")
    with pytest.raises(ValueError, match="has no answers; write them with llava-jax evaluate"):
        place.score(task, str(answers), place.folder, capsys=capsys)
    answers.write_text('{"question_id": 1, "text')
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1: not JSON .*; let llava-jax evaluate finish it"):
        place.score(task, str(answers), place.folder, capsys=capsys)
    extra = dict.fromkeys(BENCHMARKS[task].scorer.keys, "")
    answers.write_text(json.dumps({"question_id": 1, "text": 5, **extra}))
    with pytest.raises(ValueError, match="line 1: text=5 must be a text"):
        place.score(task, str(answers), place.folder, capsys=capsys)
    answers.write_text(json.dumps({"question_id": [1], "text": ""}))
    with pytest.raises(ValueError, match=r"line 1: (has no |question_id=.1. must be a text)"):
        place.score(task, str(answers), place.folder, capsys=capsys)


def test_what_gpt_judges_has_no_scorer(place, capsys):
    with pytest.raises(ValueError, match=r"judged by GPT; hand a.jsonl itself to .*eval_gpt_review_bench.py"):
        place.score("llava-bench", "a.jsonl", capsys=capsys)
    with pytest.raises(ValueError, match=r"mm-vet has no scorer.* judged by GPT; make its file with llava-jax submit"):
        place.score("mm-vet", "a.jsonl", capsys=capsys)


def test_help_says_what_the_annotations_are(place):
    text = place.args("pope", "a")[0].format_help()
    for task in ("pope/coco", "TextVQA_0.5.1_val.json", "SEED-Bench.json", "MME_Benchmark_release_version"):
        assert task in text
