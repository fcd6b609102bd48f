"""What TextVQA, VQAv2 and VizWiz share: the soft accuracy of an answer against those of ten people.

Two normalisers that differ: EvalAI's (llava/eval/m4c_evaluator.py), by which LLaVA scores TextVQA and prepares what it
submits for VQAv2 and VizWiz; and the VQA challenge's own (vqaEval.py), which the servers then apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llava_jax.evaluation.benchmarks.common import SERVER
from llava_jax.evaluation.questions import ID
from llava_jax.fields import Kind, problem_of
from llava_jax.records import check_objects, json_lines

PEOPLE: Kind = [{"answer": (str,)}]
ARTICLES = ("a", "an", "the")
NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS.split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Quirk: meant as a lookbehind, (?!<=\d) is always true here; so a point goes unless a digit follows.
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
POINTS = int(re.UNICODE)  # quirk: the flag is passed as re.sub's count, so only the first 32 points go
COMMA = re.compile(r"(\d)(\,)(\d)")
# Each is written for its misspellings, which lack one of its apostrophes. Entries of the reference's that never apply
# (with capitals, or unchanged) are left out.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTED.split() for place, c in enumerate(word) if c == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # quirk: the reference's table has this one the wrong way round


def evalai_answer(text: str) -> str:
    """A text as EvalAI compares it; LLaVA's EvalAIAnswerProcessor."""
    # Quirk: every comma and question mark goes here, so the punctuation step never sees 1,000.
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_answer(text)


def vqa_answer(text: str) -> str:
    """A text as the VQA challenge compares it; processPunctuation and processDigitArticle of vqaEval.py."""
    text = out = one_line(text)
    for mark in PUNCTUATION:
        # Quirk: one mark that touches a space, or 1,000 anywhere, and marks vanish instead of becoming spaces.
        vanishes = mark + " " in text or " " + mark in text or COMMA.search(text) is not None
        out = out.replace(mark, "" if vanishes else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", out, count=POINTS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def check_annotated(entries: object, kinds: Mapping[str, Kind], path: str) -> list[dict]:
    """`entries`, if they are a list of objects of these kinds, each with at least one person's answer."""
    checked = check_objects(entries, kinds, path, SERVER, "entry")
    if not checked or not all(entry["answers"] for entry in checked):
        raise ValueError(f"{path}: a question has no annotated answers; {SERVER}")
    return checked


def soft_accuracy(text: str, people: Sequence[str]) -> float:
    """The mean over people of min(1, how many of the others said `text` / 3)."""
    shares = [min(1, (people.count(text) - (said == text)) / 3) for said in people]
    return sum(shares) / len(shares)


def by_type(accuracies: Mapping, annotations: Mapping, fields: Sequence[str]) -> dict:
    """The mean of all `accuracies` in percent, and for each of `fields` that of each of its values in `annotations`."""
    groups: dict[str, dict[str, list[float]]] = {field: {} for field in fields}
    for key, accuracy in accuracies.items():
        for field in fields:
            groups[field].setdefault(annotations[key][field], []).append(accuracy)
    figures = {field: {kind: _percent(group) for kind, group in groups[field].items()} for field in fields}
    return {"accuracy": _percent(list(accuracies.values())), **figures}


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 2)


def submitted_answers(path) -> dict:
    """question_id → text as it is submitted; lines that are not JSON are passed over, as LLaVA's converters do."""
    answers, passed_over = {}, 0
    for where, entry in json_lines(path):
        if isinstance(entry, ValueError):
            passed_over += 1
        elif problem := problem_of(entry, {"question_id": ID, "text": (str,)}):
            raise ValueError(f"{where}: {problem}")
        else:
            answers[entry["question_id"]] = evalai_answer(entry["text"])
    if passed_over:
        print(f"{path}: {passed_over} lines are not JSON and were passed over")
    return answers


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
