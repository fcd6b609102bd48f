"""Each scorer against the reference's own script (golden/record_scores.py), or against the official formula."""

import json
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest

from llava_jax.evaluation.benchmarks import gqa, mmbench, mme, pope, scienceqa, seed, textvqa, vizwiz, vqa, vqav2


@pytest.fixture(scope="module")
def golden():
    path = Path(__file__).parent / "golden" / "data" / "scores.json"
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(line):
    return [float(text) for text in re.findall(r"[-+]?[\d.]+(?:e-?\d+)?", line)]


# ---- the reference's own scripts


def test_evalai_answers(golden):
    assert len(golden["evalai"]) > 400
    for text, wanted in golden["evalai"]:
        assert vqa.evalai_answer(text) == wanted, text


def test_textvqa(golden):
    recorded = golden["textvqa"]
    answers, annotations = recorded["answers"], recorded["annotations"]
    assert len(set(recorded["scores"])) > 3
    for answer, wanted in zip(answers, recorded["scores"], strict=True):
        assert textvqa.score_textvqa([answer], annotations)["accuracy"] == pytest.approx(100 * wanted, abs=1e-9)
    accuracy = textvqa.score_textvqa(answers, annotations)["accuracy"]
    assert f"Accuracy: {accuracy:.2f}%" == recorded["printed"][2]


def test_textvqa_prompts(golden):
    for prompt, wanted in golden["textvqa"]["prompts"]:
        if isinstance(wanted, str):
            assert textvqa.textvqa_question(prompt) == wanted
        else:
            with pytest.raises(ValueError, match="is of no TextVQA form"):
                textvqa.textvqa_question(prompt)


def test_textvqa_wants_ten_people(golden):
    recorded = golden["textvqa"]
    short = [{**entry, "answers": entry["answers"][:9]} for entry in recorded["annotations"]]
    with pytest.raises(ValueError, match="9 annotated answers"):
        textvqa.score_textvqa(recorded["answers"], short)


def test_pope(golden):
    recorded = golden["pope"]
    categories = {question["question_id"]: question["category"] for question in recorded["questions"]}
    figures = pope.score_pope(recorded["answers"], categories, recorded["labels"])
    for category, printed in recorded["printed"].items():
        ours = figures[category]
        assert [ours[name] for name in ("tp", "fp", "tn", "fn")] == numbers(printed[1])
        for name, line in zip(("accuracy", "precision", "recall", "f1", "yes_ratio"), printed[2:7], strict=True):
            wanted = float(line.split(": ")[1])
            assert ours[name] == pytest.approx(100 * wanted, abs=1e-11), (category, name)
    assert figures["mean_f1"] == sum(figures[category]["f1"] for category in recorded["labels"]) / 4


def test_pope_where_the_reference_divides_by_zero(golden):
    assert len(golden["pope"]["crashes"]) == 3
    figures = [pope.score_category(texts, labels) for texts, labels in golden["pope"]["crashes"]]
    assert [(f["precision"], f["recall"], f["f1"]) for f in figures] == [(0, 0, 0)] * 3
    assert [f["accuracy"] for f in figures] == [50, 50, 0]
    with pytest.raises(ValueError, match="no answers"):
        pope.score_category([], [])


def test_scienceqa(golden):
    recorded = golden["scienceqa"]
    figures = scienceqa.score_scienceqa(recorded["answers"], recorded["problems"], recorded["split"])
    printed = (
        f"Total: {figures['total']}, Correct: {figures['correct']}, Accuracy: {figures['accuracy']:.2f}%, "
        f"IMG-Accuracy: {figures['img_accuracy']:.2f}%"
    )
    assert [printed] == recorded["printed"]
    texts = {answer["question_id"]: answer["text"] for answer in recorded["answers"]}
    assert len(texts) < len(recorded["problems"])
    for number, wanted in recorded["choices"].items():
        choices = len(recorded["problems"][number]["choices"])
        assert scienceqa.predicted_choice(texts.get(number, "FAILED"), choices) == wanted, texts[number]


def test_scienceqa_without_images():
    problems = {"1": {"choices": ["x", "y"], "answer": 1}}
    answers = [{"question_id": "1", "prompt": "Which?", "text": "B"}]
    figures = scienceqa.score_scienceqa(answers, problems, ["1"])
    assert figures["accuracy"] == 100 and figures["img_accuracy"] is None
    with pytest.raises(ValueError, match="no questions"):
        scienceqa.score_scienceqa(answers, problems, [])


def seed_lines(figures):
    lines = [f"{name}: {value:.2f}%" for name, value in figures["types"].items()]
    names = {"Total": "accuracy", "image": "image", "video": "video"}
    return lines + [f"{name} accuracy: {figures[key]:.2f}%" for name, key in names.items()]


def test_seed(golden):
    recorded = golden["seed"]
    for name in ("all", "no videos"):
        case = recorded["cases"][name]
        assert seed_lines(seed.score_seed(case["answers"], recorded["annotations"])) == case["printed"]
    case = recorded["cases"]["nothing right"]  # there the reference crashes before it prints
    assert case["crash"].startswith("KeyError")
    figures = seed.score_seed(case["answers"], recorded["annotations"])
    assert {*figures["types"].values(), figures["accuracy"], figures["image"], figures["video"]} == {0.0}
    images = [entry for entry in recorded["annotations"]["questions"] if entry["data_type"] == "image"]
    figures = seed.score_seed(case["answers"], {**recorded["annotations"], "questions": images})
    assert figures["image"] == 0 and figures["video"] is None


def test_gqa_predictions(golden):
    texts = [answer["text"] for answer in golden["gqa"]["answers"]]
    assert [gqa.prediction(text) for text in texts] == [said["prediction"] for said in golden["gqa"]["predictions"]]


# ---- official formulas, written down once more


@pytest.mark.parametrize(
    "text, official, evalai",
    [
        ("The Dogs, a cat", "dogs cat", "dogs cat"),
        ("1,000", "1000", "1000"),
        ("1,000-2", "10002", "1000 2"),  # a comma between digits makes all marks vanish, if it is still there
        ("dog,cat", "dog cat", "dogcat"),
        ("dog's", "dog's", "dog 's"),
        ("what?", "what", "what"),
        ("a/b", "b", "b"),
        ("x/ y/z", "x yz", "x yz"),
        ("5.0 or 5.", "5.0 or 5", "5.0 or 5"),
        ("none, two tens", "0 2 tens", "0 2 tens"),
        ("dont Couldn'tve", "don't couldn't've", "don't couldn't've"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("." * 40 + "x", "." * 8 + "x", "." * 8 + "x"),  # only the first 32 points go
        ("\tan\n é ", "é", "é"),
        ("", "", ""),
    ],
)
def test_the_two_normalisers(text, official, evalai):
    assert vqa.vqa_answer(text) == official
    assert vqa.evalai_answer(text) == evalai


def people(*answers, ids=True, **more):
    entries = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
    if ids:
        entries = [{**entry, "answer_id": i} for i, entry in enumerate(entries, 1)]
    return {"answers": entries, "answer_type": "other", "question_type": "what", **more}


@pytest.mark.parametrize("agreeing, wanted", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_soft_accuracy_of_vqav2(agreeing, wanted):
    """k of ten agree: with one of them left out, (k (k - 1) + (10 - k) k) / 30 = 9 k / 30."""
    annotation = people(*["The dog."] * agreeing, *[f"other {i}" for i in range(10 - agreeing)])
    assert vqav2.vqa_accuracy("dog", annotation) == pytest.approx(wanted)


def test_vqav2_quirks():
    assert vqav2.vqa_accuracy("dog", people(*["The dog."] * 10)) == 0  # all agree: nobody is normalised
    assert vqav2.vqa_accuracy("The dog.", people(*["The dog.\n"] * 10)) == 1  # but the lines are
    # Without ids equal records are one: nine "dog" and one "cat" leave nine others or, of a "dog", none.
    assert vqav2.vqa_accuracy("dog", people(*["dog"] * 9, "cat", ids=False)) == pytest.approx(0.1)
    # What is submitted has been through EvalAI's normaliser: "dog,cat" is "dogcat" by then.
    annotations = [people(*["dog cat"] * 9, "x", question_id=1)]
    assert vqav2.score_vqav2([{"question_id": 1, "text": "dog,cat"}], annotations)["accuracy"] == 0
    assert vqav2.score_vqav2([{"question_id": 1, "text": "Dog\ncat."}], annotations)["accuracy"] == 100


def test_vqav2_by_type():
    annotations = [
        people(*["yes"] * 9, "no", question_id=1) | {"answer_type": "yes/no", "question_type": "is"},
        people(*["2"] * 2, *"345678", "9", "10", question_id=2) | {"answer_type": "number"},
        people(*["2"] * 1, *"3456789", "10", "11", question_id=3) | {"answer_type": "number"},
    ]
    answers = [{"question_id": i, "text": text} for i, text in ((3, "Two"), (1, "Yes."), (2, "two"))]
    figures = vqav2.score_vqav2(answers, annotations)
    assert figures["answer_type"] == {"yes/no": 100.0, "number": 45.0}
    assert figures["question_type"] == {"is": 100.0, "what": 45.0}
    assert figures["accuracy"] == 63.33


def test_vizwiz():
    def score_of(text, *answers):
        return vizwiz.score_vizwiz({"a.jpg": text}, [people(*answers, ids=False, image="a.jpg")])["accuracy"]

    assert score_of("Dog.", *["dog"] * 3, *"1234567") == 90
    assert score_of("Dog.", *["dog"] * 10) == 100  # equal records count, each but the one left out
    assert score_of("Dog.", *["Dog."] * 10) == 0  # people's answers are not normalised
    assert score_of("unanswerable", *["unanswerable"] * 2, *"12345678") == 60
    figures = vizwiz.score_vizwiz(
        {"a.jpg": "x", "b.jpg": "y"}, [people(*"x" * 10, image="a.jpg"), people(*"x" * 10, image="b.jpg")]
    )
    assert figures == {"accuracy": 50, "answer_type": {"other": 50}}


def gqa_question(answer, structural="query", group="g", balanced=True, text="what is it?", operations=()):
    return {
        "answer": answer,
        "isBalanced": balanced,
        "question": text,
        "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
        "groups": {"global": group},
        "semantic": [dict(zip(("operation", "argument"), step, strict=True)) for step in operations],
    }


def test_gqa():
    questions = {
        "1": gqa_question("red", operations=[("select", "dog (3)"), ("query", "name")]),
        "2": gqa_question("red", operations=[("select", "a"), ("relate", "exist,o (1)"), ("choose name", "b|c")]),
        "3": gqa_question("blue", text="a b c d"),
        "4": gqa_question("yes", "verify", group=None, operations=[("select", "x"), ("exist", "?"), ("and", "")]),
        "5": gqa_question("no", "logical", group="h"),
        "6": gqa_question("no", "logical", group="h", balanced=False),
    }
    texts = {"1": "Red.", "2": "green", "3": "Blue", "4": "Yes", "5": "yes, it is"}
    answers = [{"question_id": number, "text": text} for number, text in texts.items()]
    figures = gqa.score_gqa(answers, questions)
    assert (figures["accuracy"], figures["open"], figures["binary"]) == (60, pytest.approx(200 / 3), 50)
    assert figures["structural"] == {
        "logical": {"accuracy": 0, "questions": 1},
        "query": {"accuracy": pytest.approx(200 / 3), "questions": 3},
        "verify": {"accuracy": 100, "questions": 1},
    }
    assert {steps: row["questions"] for steps, row in figures["steps"].items()} == {0: 2, 1: 2, 2: 1}
    assert {words: row["questions"] for words, row in figures["words"].items()} == {3: 4, 4: 1}
    # Group g: red true twice, said once; blue once, once: (1 - 2)² / 2, of 3. Group h: no once, never: 1, of 1.
    assert figures["distribution"] == pytest.approx((0.5 * 3 + 1 * 1) / 4 / 100)
    only = gqa.score_gqa(answers, {"4": questions["4"]})
    assert only["distribution"] is None and only["open"] == 0


MME_SAID = (
    "Yes|No|yes|no|YES.|No, it|Yes, it|Maybe|The yes| yes|  yes|   yes|not|Nope|nothing|Eyes||y|n|é no|Unknown|yes\nno"
)


def mme_answers(rng):
    """Three pictures of each subtask: answers in order, and the truth, where every third question has two spaces."""
    answers, truth = [], {}
    for category in (*mme.PERCEPTION, *mme.COGNITION):
        for i in range(3):
            image = f"{category}/images/{i}.v1.jpg" if i else f"{category}/{i}.v1.png"
            for n, true in enumerate(("Yes", "No")):
                question = f"Is it {n}?"
                space = "  " if (i + n) % 3 == 0 else " "
                truth[category, f"{i}.txt", f"{question}{space}Please answer yes or no."] = true
                asked = f"{question}\nAnswer the question using a single word or phrase."
                if category == "OCR":  # as MME itself asks
                    asked = f"{question}{space}Please answer yes or no."
                text = rng.choice([true, true, true, rng.choice(MME_SAID.split("|"))])
                answers.append({"question_id": image, "prompt": asked, "text": text})
    return answers, truth


def mme_formula(answers, truth):
    """calculation.py on the results that convert_answer_to_mme.py writes."""
    tasks = defaultdict(list)
    for answer, true in zip(answers, truth.values(), strict=True):
        start = answer["text"].lower()[:4]
        label = "yes" if "yes" in start else "no" if "no" in start else "other"
        tasks[answer["question_id"].split("/")[0]].append(label == true.lower())
    scores = {}
    for task, right in tasks.items():
        acc = sum(right) / len(right)
        acc_plus = sum(a and b for a, b in zip(right[0::2], right[1::2], strict=True)) / (len(right) / 2)
        scores[task] = acc * 100 + acc_plus * 100
    return scores


def test_mme():
    for case in range(20):
        answers, truth = mme_answers(random.Random(case))
        wanted = mme_formula(answers, truth)
        figures = mme.score_mme(answers, truth)
        assert {name: row["score"] for name, row in figures["subtasks"].items()} == wanted
        assert figures["perception"] == pytest.approx(sum(list(wanted.values())[:10]))
        assert figures["cognition"] == pytest.approx(sum(list(wanted.values())[10:]))
    assert 500 < figures["perception"] < 1900
    assert len(wanted) == 14


@pytest.mark.parametrize(
    "text, wanted",
    [("Nothing", "no"), ("Eyes", "yes"), ("  no", "no"), ("   no", "other"), ("", "other"), ("n", "other")],
)
def test_mme_reads_four_characters(text, wanted):
    assert mme.said(text) == wanted


def test_mme_counts():
    answers, truth = mme_answers(random.Random(0))
    for i, text in enumerate(["Yes", "No", "Yes", "Yes", "what", "No"]):
        answers[i]["text"] = text
    row = mme.score_mme(answers, truth)["subtasks"]["existence"]
    assert row == {
        "score": pytest.approx(100),
        "acc": pytest.approx(200 / 3),
        "acc_plus": pytest.approx(100 / 3),
        "other": 1,
    }
    with pytest.raises(ValueError, match="existence has 5 answers"):
        mme.score_mme(answers[1:], truth)


SHOWN = {"A": "a dog", "B": "a cat", "C": "Two birds", "D": "none"}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("D: none", "D"),
        ("**B**", "B"),
        ("a", None),
        ("A or B", None),  # two letters, then two options' texts would decide
        ("A B: a cat", "B"),  # two letters, but one text
        ("B is right, as one can see here", None),  # the letter must be among the last four words
        ("B is the one", "B"),
        ("B is the right one", None),
        ("The answer is B, as one can see here", "B"),
        ("the ANSWER is c because of the many small wings", "C"),
        ("The answer is a dog", "A"),
        ("two birds", "C"),
        ("It is a CAT.", "B"),
        ("a cat and a dog", None),
        ("a cat " * 20, None),  # too long to be searched
        ("Z", "Z"),
        ("Cannot determine the answer, B", "Z"),
        ("Failed to obtain answer via API. B", None),
        ("E", None),
        ("", None),
    ],
)
def test_mmbench_matching(text, wanted):
    assert mmbench.infer(text, SHOWN) == wanted


def mmbench_rounds(number, truth, texts, options=("dog", "cat", "owl")):
    """What model_vqa_mmbench writes with --all-rounds; `texts` are the answers to its rounds."""
    letters = list("ABCD"[: len(options)])
    for r, text in enumerate(texts):
        shown = {"options": [*options[r:], *options[:r]], "option_char": letters[r:] + letters[:r]}
        yield {"question_id": number, "round_id": r, "prompt": "?", "text": text, **shown}


def test_mmbench():
    rows = [
        {"index": number, "answer": answer, "category": category, "l2-category": l2}
        for number, answer, category, l2 in (
            (1, "A", "x", "p"),
            (2, "B", "x", "q"),
            (3, "C", "y", "q"),
            (4, "A", "y", "q"),
        )
    ]
    rounds = [
        ("A", "C.", "B: dog"),  # A is C in the second round, where the order is cat, owl, dog
        ("B", "A", "B"),  # wrong in the last, where it is C
        ("owl", "An owl", "the owl!"),
        ("cat", "C", "B"),
    ]
    answers = [
        line
        for row, texts in zip(rows, rounds, strict=True)
        for line in mmbench_rounds(row["index"], row["answer"], texts)
    ]
    figures = mmbench.score_mmbench(answers, rows)
    assert figures == {
        "circular": 50,
        "vanilla": 75,
        "questions": 4,
        "category": {"x": 50, "y": 50},
        "l2-category": {"p": 100, "q": pytest.approx(100 / 3)},
    }
    first = [answer for answer in answers if answer["round_id"] == 0]
    figures = mmbench.score_mmbench(first, rows)
    assert (figures["circular"], figures["vanilla"], figures["category"]) == (None, 75, {"x": 100, "y": 50})
    with pytest.raises(ValueError, match="question 3 has 2 of its 3 rotations"):
        mmbench.score_mmbench([answer for answer in answers if answer is not answers[8]], rows)
    assert mmbench.score_mmbench(answers[:-1], rows)["circular"] == 50  # question 4 is wrong in any case


def test_mmbench_with_rotated_copies_in_the_file():
    """dev_20230712 has the rotations as questions of their own, each with its own answer."""
    rows, answers = [], []
    for number, texts in ((7, "AC"), (8, "AA"), (9, "BB")):
        for copy, (text, answer) in enumerate(zip(texts, "AC" if number != 9 else "BB", strict=True)):
            index = copy * 1_000_000 + number
            rows.append({"index": index, "answer": answer})
            answers += list(mmbench_rounds(index, answer, [text], ("dog", "cat", "owl")[: 2 if number == 9 else 3]))
    with pytest.raises(ValueError, match="question 7 has 2 of its 3"):
        mmbench.score_mmbench(answers, rows)
    rows += [{"index": 2_000_000 + number, "answer": "B"} for number in (7, 8)]
    answers += [line for number in (7, 8) for line in mmbench_rounds(2_000_000 + number, "B", ["B"])]
    figures = mmbench.score_mmbench(answers, rows)
    assert (figures["circular"], figures["vanilla"], figures["questions"]) == (pytest.approx(200 / 3), 100, 3)
    assert figures["category"] == {}
