"""TextVQA, VQAv2 and VizWiz: the soft accuracy of an answer against those of ten people.

Two normalisers that differ: EvalAI's (llava/eval/m4c_evaluator.py), by which LLaVA scores TextVQA and prepares what it
submits for VQAv2 and VizWiz; and the VQA challenge's own (vqaEval.py), which the servers then apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
    return _digits_and_articles(_punctuation(_one_line(text)))


def vqa_answer(text: str) -> str:
    """A text as the VQA challenge compares it; processPunctuation and processDigitArticle of vqaEval.py."""
    return _digits_and_articles(_punctuation(_one_line(text)))


def textvqa_question(prompt: str) -> str:
    """The question within a prompt of LLaVA's three TextVQA question files, in lower case.

    Raises:
        ValueError: the prompt has none of their forms (the reference: AssertionError, AttributeError).
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"the prompt {prompt!r:.200} is of no TextVQA form: 'QUESTION\\nAnswer …', either with a line 'Reference OCR "
        "token: …', or 'OCR tokens: … Question: QUESTION Short answer:'"
    )


def textvqa_annotations(annotations: Sequence[Mapping]) -> dict[tuple[str, str], Mapping]:
    """(image_id, question in lower case) → annotation. Quirk: of equal questions on an image, the last counts."""
    return {(entry["image_id"], entry["question"].lower()): entry for entry in annotations}


def score_textvqa(answers: Sequence[Mapping], annotations: Sequence[Mapping]) -> dict[str, float]:
    """{"accuracy": percent}, the M4C accuracy; llava/eval/eval_textvqa.py.

    Args:
        answers: answer lines, whose question_id is the image's id.
        annotations: "data" of TextVQA_0.5.1_val.json.

    Raises:
        ValueError: there are no answers, a prompt has another form, or a question has not ten annotated answers.
    """
    if not answers:
        raise ValueError("there are no TextVQA answers")
    by_question = textvqa_annotations(annotations)
    scores = []
    for answer in answers:
        people = by_question[answer["question_id"], textvqa_question(answer["prompt"])]["answers"]
        if len(people) != 10:
            raise ValueError(f"image {answer['question_id']}: {len(people)} annotated answers; TextVQA has 10 of each")
        scores.append(_soft_accuracy(evalai_answer(answer["text"]), [evalai_answer(said) for said in people]))
    return {"accuracy": 100 * (sum(scores) / len(scores))}


def score_vqav2(answers: Sequence[Mapping], annotations: Sequence[Mapping]) -> dict:
    """Accuracies in percent, rounded to two places: of all, by "answer_type", by "question_type".

    What counts is what LLaVA submits: each text through `evalai_answer`, then VQAEval of vqaEval.py.

    Args:
        annotations: "annotations" of v2_mscoco_val2014_annotations.json; every one must have its answer.
    """
    texts = {answer["question_id"]: evalai_answer(answer["text"]) for answer in answers}
    return _by_type(
        {entry["question_id"]: vqa_accuracy(texts[entry["question_id"]], entry) for entry in annotations},
        {entry["question_id"]: entry for entry in annotations},
        ("answer_type", "question_type"),
    )


def vqa_accuracy(text: str, annotation: Mapping) -> float:
    """The share of a person that `text` is worth, 0 … 1; VQAEval.evaluate on one question."""
    text = _one_line(text)
    people = [{**person, "answer": _one_line(person["answer"])} for person in annotation["answers"]]
    # Quirk: where all people agree to the letter, neither side is normalised.
    if len({person["answer"] for person in people}) > 1:
        text = vqa_answer(text)
        people = [{**person, "answer": vqa_answer(person["answer"])} for person in people]
    shares = []
    for person in people:
        # Quirk: the others are those whose record differs, so records without an answer_id leave together.
        others = [other["answer"] for other in people if other != person]
        shares.append(min(1, others.count(text) / 3))
    return sum(shares) / len(shares)


def score_vizwiz(answers: Mapping[str, str], annotations: Sequence[Mapping]) -> dict:
    """Accuracies in percent, rounded to two places: of all and by "answer_type"; VizWiz's own VQAEval.

    What counts is what LLaVA submits: each text through `evalai_answer`. VizWiz's table of contractions, which is
    typed with ’, then never meets a word that it has.

    Args:
        answers: image's file name → the model's text.
        annotations: val.json, a list; every one must have its answer.
    """
    accuracies = {}
    for entry in annotations:
        text = vqa_answer(evalai_answer(answers[entry["image"]]))
        # Quirk: what people said is compared as it was typed, not normalised.
        accuracies[entry["image"]] = _soft_accuracy(text, [person["answer"] for person in entry["answers"]])
    return _by_type(accuracies, {entry["image"]: entry for entry in annotations}, ("answer_type",))


def _soft_accuracy(text: str, people: Sequence[str]) -> float:
    """The mean over people of min(1, how many of the others said `text` / 3)."""
    shares = [min(1, (people.count(text) - (said == text)) / 3) for said in people]
    return sum(shares) / len(shares)


def _by_type(accuracies: Mapping, annotations: Mapping, fields: Sequence[str]) -> dict:
    """The mean of all `accuracies`, and for each of `fields` that of each of its values in `annotations`."""
    groups: dict[str, dict[str, list[float]]] = {field: {} for field in fields}
    for key, accuracy in accuracies.items():
        for field in fields:
            groups[field].setdefault(annotations[key][field], []).append(accuracy)
    figures = {field: {kind: _percent(group) for kind, group in groups[field].items()} for field in fields}
    return {"accuracy": _percent(list(accuracies.values())), **figures}


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 2)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    out = text
    for mark in PUNCTUATION:
        # Quirk: one mark that touches a space, or 1,000 anywhere, and marks vanish instead of becoming spaces.
        vanishes = mark + " " in text or " " + mark in text or COMMA.search(text) is not None
        out = out.replace(mark, "" if vanishes else " ")
    return PERIOD.sub("", out, count=POINTS)


def _digits_and_articles(text: str) -> str:
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
