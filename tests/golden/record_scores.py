"""Records data/scores.json: what the reference's own scripts make of synthetic answers, rich in what they stumble on.

Runs where the original LLaVA is installed (setup.sh makes such an environment), with a checkout of
github.com/haotian-liu/LLaVA for the scripts that the package does not have:

    python tests/golden/record_scores.py --llava LLaVA

The keys, each with what went in and what came out:

    evalai      [text, text as EvalAIAnswerProcessor gives it], …
    textvqa     annotations, answers; printed: eval_textvqa's lines; scores: of each answer; prompts: [prompt, its
                question or the exception's name], …
    pope        questions, labels, answers; printed: eval_pope's lines of each category; crashes: texts that raise
    scienceqa   problems, split, answers; printed; choices: {id: index}
    seed        annotations, cases: {name: {answers, printed, crash}}
    gqa         answers, predictions
"""

import argparse
import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from llava.eval import eval_textvqa
from llava.eval.eval_pope import eval_pope
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator

YES_NO = (  # parted by bars
    "Yes|No|yes|no|YES|NO|Yes.|No.|No!|no,|No, there is no dog.|Yes, there is.|Yes. No.|No. Yes.|There is not. Yes"
    "|n,o|,no|Nope|Nothing|nothing|Not|not|cannot|It is not clear|||.|,|. no|no\n|\nno|no dog|No\tdog|No，"
    "|I do not know|Yes, no doubt|é no è|no.no|the answer is no|Yes|Yes|No|No|Yes|No"
)
PHRASES = (
    "A dog.|a dog|the dog|The Dog!|an apple|dog, cat|dog , cat|dog/cat|dog / cat|10,000|10,000 dogs|1,2|$5.00|5.|5.0"
    "|.5|3.14.15|U.S.A.|U.S.A|e.g. this|one|two dogs|None|none|zero|ten|eleven|One hundred|dont|don't|Dont know"
    "|couldntve|couldnt've|its|it's|the dog's|dog's bone|what's up?|yes?|no!|(maybe)|[maybe]|a-b|a - b|a_b|a+b|1+1=2"
    '|"quoted"|`tick`|back\\slash|semi;colon|semi; colon|colon: here|under_score|new\nline|tab\there'
    "| spaces  within | |.|..|...|,|?|é|É|naïve café|你好|你好。|ß|İstanbul|🦙|don’t|the|a an the|a|stop sign|STOP|stop"
    "|7-up|7up|@home|50%|#1|<b>|{x}|12:30|12/25/2020|www.site.com|mr. smith|st. john's|o'clock|5 oclock|Ive|im here"
    "|somebody'd|yall'd've|twas|shes|she's|lets|let's|I'dve|'s|s's|x's,y's|answer, the one|1,,000|1,000,000|1 ,000"
    "|a.b|a. b|no.1|1.a|٣,٤|a,b,c|ok|OK.|ten 10"
)
CHOICES = (
    "A|B|C|D|E|F|A.|A. dog|B. cat|C.|C. |D: mouse|E. x|a|b. cat|The answer is A.|The answer is B|The answer is C, so"
    "|The answer is D\n|The answer is A. The answer is A.|The answer is a.|I say: The answer is B.|Answer: A|AB|A B"
    "| A||FAILED|Z|Z. z|The answer is Z.|(A)|A) dog|é. A"
)


def words(text):
    return text.split("|")


def written(folder, name, content, lines=False):
    path = Path(folder) / name
    path.write_text("".join(json.dumps(entry) + "\n" for entry in content) if lines else json.dumps(content))
    return str(path)


def printed(function, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        function(*arguments)
    return out.getvalue().splitlines()


def script(path, *arguments):
    """(lines printed, the last line of what went wrong or None) of a script run by itself."""
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True)
    return done.stdout.splitlines(), (done.stderr.strip().splitlines()[-1] if done.returncode else None)


def evalai(rng):
    processor = EvalAIAnswerProcessor()
    texts = [*words(PHRASES), "x." * 40, ". " * 70, "1.2." * 20]
    texts += [word for pair in processor.CONTRACTIONS.items() for word in pair]
    texts += [
        f"{a}{p}{b}" for p in processor.PUNCTUATIONS for a, b in (("x", "y"), ("x ", "y"), ("1", "2"), ("x", " the"))
    ]
    texts += [" ".join(rng.sample(words(PHRASES), 3)) for _ in range(100)]
    return [[text, processor(text)] for text in texts]


def textvqa(rng, folder):
    annotations, answers = [], []
    for i in range(60):
        question = rng.choice(["What Brand is it?", "what is the TIME?", "Who wrote this - é?"]) + f" {i % 50}"
        said = rng.sample(words(PHRASES), 3)
        people = [rng.choice(said + said[:1] * 3) for _ in range(10)]
        image = f"img{i % 50:04x}"
        annotations.append({"image_id": image, "question": question, "answers": people})
        short = "Answer the question using a single word or phrase."
        prompt = [
            f"{question}\n{short}",
            f"{question}\nReference OCR token: STOP, a\n{short}",
            f"Reference OCR token: STOP, Q\n{question}\n{short}",
            f"OCR tokens: STOP a. Question: {question} Short answer:",
        ][i % 4]
        text = rng.choice([*said, people[0], people[0].upper() + ".", rng.choice(words(PHRASES))])
        answers.append({"question_id": image, "prompt": prompt, "text": text})
    known = {(entry["image_id"], entry["question"].lower()): entry["answers"] for entry in annotations}
    answers = [answer for answer in answers if _key(answer) in known]
    scores = []
    for answer in answers:
        entry = {"pred_answer": answer["text"], "gt_answers": known[_key(answer)]}
        with contextlib.redirect_stderr(io.StringIO()):
            scores.append(TextVQAAccuracyEvaluator().eval_pred_list([entry]))
    prompts = [answer["prompt"] for answer in answers[:4]]
    prompts += ["one line", "a\nb\nc", "Q\n\nA", "OCR tokens: x Question: y", "OCR tokens: x\nQ"]
    prompts += ["Reference OCR token: a\nb", "Reference OCR token:x\nQ\nReference OCR token: y"]
    prompts += ["OCR tokens: Question: A\nB Short answer: C Short answer:"]
    return {
        "annotations": annotations,
        "answers": answers,
        "printed": printed(
            eval_textvqa.eval_single,
            written(folder, "TextVQA.json", {"data": annotations}),
            written(folder, "textvqa.jsonl", answers, lines=True),
        ),
        "scores": scores,
        "prompts": [[prompt, _question(prompt)] for prompt in prompts],
    }


def _key(answer):
    return answer["question_id"], eval_textvqa.prompt_processor(answer["prompt"])


def _question(prompt):
    try:
        return eval_textvqa.prompt_processor(prompt)
    except Exception as error:
        return {"error": type(error).__name__}


def pope(rng, folder, llava):
    """Category "cut" has more answers than labels, "short" fewer."""
    questions, answers, labels = [], [], {}
    for category, asked, labelled in (("adversarial", 50, 50), ("popular", 50, 50), ("cut", 12, 10), ("short", 8, 11)):
        labels[category] = [rng.choice(["yes", "no", "no", "No"]) for _ in range(labelled)]
        for _ in range(asked):
            number = len(questions)
            questions.append({"question_id": number, "category": category, "text": "Is there a dog?"})
            answers.append({"question_id": number, "text": rng.choice(words(YES_NO))})
    for text, answer in zip(words(YES_NO), answers, strict=False):
        answer["text"] = text
    for answer in answers[110:112]:  # those of "cut" that have no label
        answer["text"] = "Yes"
    coco = Path(folder) / "coco"
    coco.mkdir()
    for category, entries in labels.items():
        written(coco, f"coco_pope_{category}.json", [{"label": label} for label in entries], lines=True)
    lines, crash = script(
        llava / "llava/eval/eval_pope.py",
        f"--annotation-dir={coco}",
        f"--question-file={written(folder, 'pope.jsonl', questions, lines=True)}",
        f"--result-file={written(folder, 'pope_answers.jsonl', answers, lines=True)}",
    )
    assert crash is None, crash
    starts = [i for i, line in enumerate(lines) if line.startswith("Category: ")]
    found = {lines[i].split(",")[0].removeprefix("Category: "): lines[i + 1 : i + 9] for i in starts}
    crashes = []
    for texts, truths in ((["no", "No"], ["yes", "no"]), (["yes", "no"], ["no", "no"]), (["no", "yes"], ["yes", "no"])):
        path = written(folder, "labels.jsonl", [{"label": truth} for truth in truths], lines=True)
        try:
            printed(eval_pope, [{"text": text} for text in texts], path)
        except ZeroDivisionError:
            crashes.append([texts, truths])
    return {"questions": questions, "labels": labels, "answers": answers, "printed": found, "crashes": crashes}


def scienceqa(rng, folder, llava):
    problems = {str(i): {"choices": ["x"] * rng.randint(2, 5)} for i in range(1, 101)}
    answers = []
    for i, problem in problems.items():
        problem["answer"] = rng.randrange(len(problem["choices"]))
        letter = "ABCDE"[problem["answer"]]
        texts = [letter, f"{letter}. dog", f"So: The answer is {letter}.", rng.choice(words(CHOICES))]
        prompt = rng.choice(["<image>\nWhich?", "Which?"])
        answers.append({"question_id": i, "prompt": prompt, "text": rng.choice(texts)})
    for text, answer in zip(words(CHOICES), answers, strict=False):
        answer["text"] = text
    split = [i for i in problems if int(i) <= 90]
    answers = [answer for answer in answers if answer["question_id"] not in ("77", "78")]
    written(folder, "pid_splits.json", {"test": split})
    written(folder, "problems.json", problems)
    result = Path(folder) / "sqa_result.json"
    lines, crash = script(
        llava / "llava/eval/eval_science_qa.py",
        f"--base-dir={folder}",
        f"--result-file={written(folder, 'sqa.jsonl', answers, lines=True)}",
        f"--output-file={Path(folder) / 'sqa_output.json'}",
        f"--output-result={result}",
    )
    assert crash is None, crash
    choices = json.loads(result.read_text())["results"]
    return {"problems": problems, "split": split, "answers": answers, "printed": lines, "choices": choices}


def seed(rng, folder, llava):
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10, "Procedure": 12}
    questions = []
    for i in range(80):
        number = rng.choice(list(types.values()))
        kind = "video" if number >= 10 else "image"
        question_id = f"v{i}" if kind == "video" and i % 2 else f"{i}_0" if i % 3 == 0 else str(i)
        questions.append(
            {"question_id": question_id, "question_type_id": number, "data_type": kind, "answer": rng.choice("ABCD")}
        )
    annotations = {"question_type": types, "questions": questions}

    def answer(question, text=None):
        number = question["question_id"]
        with contextlib.suppress(ValueError):
            number = int(number)
        right = question["answer"]
        return {
            "question_id": number,
            "text": text or rng.choice([right, right, right + ".", right.lower(), "A", "", " B"]),
        }

    cases = {
        "all": [answer(question) for question in questions],
        "no videos": [answer(question) for question in questions if question["data_type"] == "image"],
        "nothing right": [answer(question, "Z") for question in questions],
    }
    path = written(folder, "SEED-Bench.json", annotations)
    results = {}
    for name, answers in cases.items():
        lines, crash = script(
            llava / "scripts/convert_seed_for_submission.py",
            f"--annotation-file={path}",
            f"--result-file={written(folder, 'seed.jsonl', answers, lines=True)}",
            f"--result-upload-file={Path(folder) / 'seed_upload.jsonl'}",
        )
        results[name] = {"answers": answers, "printed": lines, "crash": crash}
    return {"annotations": annotations, "cases": results}


def gqa(folder, llava):
    answers = [{"question_id": str(i), "text": text} for i, text in enumerate(words(PHRASES))]
    path = Path(folder) / "gqa.json"
    source = written(folder, "gqa.jsonl", answers, lines=True)
    _, crash = script(llava / "scripts/convert_gqa_for_eval.py", f"--src={source}", f"--dst={path}")
    assert crash is None, crash
    return {"answers": answers, "predictions": json.loads(path.read_text())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", type=Path, required=True, help="a checkout of github.com/haotian-liu/LLaVA")
    llava = parser.parse_args().llava
    rng = random.Random(5)
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            "evalai": evalai(rng),
            "textvqa": textvqa(rng, folder),
            "pope": pope(rng, folder, llava),
            "scienceqa": scienceqa(rng, folder, llava),
            "seed": seed(rng, folder, llava),
            "gqa": gqa(folder, llava),
        }
    path = Path(__file__).parent / "data" / "scores.json"
    path.write_text(json.dumps(recorded, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {path}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
