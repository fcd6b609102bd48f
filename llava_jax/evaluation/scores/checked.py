"""The scorers with their files: all is read and checked before anything is scored.

The references' own scripts score answers that are too few, too many, out of order or of other questions without a word.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from etils import epath

from llava_jax.evaluation.questions import read_json, read_lines, read_table, typed
from llava_jax.evaluation.scores.gqa import score_gqa
from llava_jax.evaluation.scores.mmbench import score_mmbench
from llava_jax.evaluation.scores.mme import read_truth, score_mme, truth_key
from llava_jax.evaluation.scores.pope import score_pope
from llava_jax.evaluation.scores.scienceqa import score_scienceqa
from llava_jax.evaluation.scores.seed import question_id, score_seed
from llava_jax.evaluation.scores.vqa import (
    score_textvqa,
    score_vizwiz,
    score_vqav2,
    textvqa_annotations,
    textvqa_question,
)

NAMED = 3  # ids that an error names
KEYS = {"round_id": int, "options": list, "option_char": list}  # of answer lines; all others are texts
SERVER = "a test split has none, its server scores it (llava-jax submit makes the file)"


@dataclass(frozen=True)
class Files:
    """The paths that a run is given."""

    answers: str
    annotations: str
    questions: str | None


@dataclass(frozen=True)
class Scorer:
    """How a task is scored.

    Attributes:
        score: (answers, files) → figures: numbers, None, or dicts of them.
        annotations: what the annotations are, as they lie in LLaVA's playground/data/eval.
        keys: what an answer line must have besides question_id and text.
        table: the figures that are dicts and yet belong into a short table.
    """

    score: Callable[[Sequence[Mapping], Files], dict]
    annotations: str
    keys: tuple[str, ...] = ()
    table: tuple[str, ...] = ()


# ---- files


def read_answers(path: str, keys: Collection[str] = ()) -> list[dict]:
    """Answer lines, each with question_id, a text and `keys`.

    Raises:
        FileNotFoundError: the file cannot be read.
        ValueError: it is empty, or a line is not such an answer.
    """
    answers = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); let llava-jax evaluate finish it") from error
        missing = [key for key in ("question_id", "text", *keys) if not isinstance(answer, dict) or key not in answer]
        if missing:
            raise ValueError(f"{path}, line {number}: has no {', '.join(missing)}; it is no answer of this task")
        if wrong := [key for key in ("text", *keys) if not isinstance(answer[key], KEYS.get(key, str))]:
            kind = KEYS.get(wrong[0], str).__name__
            raise ValueError(f"{path}, line {number}: {wrong[0]!r} must be a {kind}, got {answer[wrong[0]]!r:.80}")
        if not isinstance(answer["question_id"], str | int | float | None):
            raise ValueError(f"{path}, line {number}: 'question_id' must be a text or a number")
        answers.append(answer)
    if not answers:
        raise ValueError(f"{path}: has no answers; write them with llava-jax evaluate")
    return answers


def _json(path: str, kind: type[dict] | type[list], keys: Collection[str] = (), what: str = ""):
    """A JSON file that must be a `kind`, with these keys."""
    content = read_json(path)
    if not isinstance(content, kind) or any(key not in content for key in keys):
        raise ValueError(f"{path}: is not {what}")
    return content


def _inside(path: str, name: str) -> str:
    """The file of this name in a folder, or the file that was given itself."""
    given = epath.Path(path)
    return str(given / name if given.is_dir() else given)


def _records(entries: Sequence, keys: Collection[str], path: str, remedy: str) -> Sequence[Mapping]:
    """`entries`, once they are seen to be a list of objects with `keys`."""
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries, got {entries!r:.40}; {remedy}")
    for number, entry in enumerate(entries, 1):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{path}, entry {number}: has no {', '.join(missing)}; {remedy}")
    return entries


def check_ids(answered: Sequence, expected: Collection, files: Files) -> None:
    """Each question that the annotations have must be answered once, and no other.

    Raises:
        ValueError: not so; it names some ids.
    """
    check_once(answered, files)
    if strangers := set(answered).difference(expected):
        raise ValueError(
            f"{files.answers}: {len(strangers)} of {len(answered)} answers are to questions that {files.annotations} "
            f"does not have: {_some(strangers)}; give the annotations of the questions that were asked"
        )
    if missing := set(expected).difference(answered):
        raise ValueError(
            f"{files.answers}: {len(answered)} answers, but {files.annotations} has {len(expected)} questions; without "
            f"an answer: {_some(missing)}; answer the rest with llava-jax evaluate"
        )


def check_once(answered: Sequence, files: Files) -> None:
    if twice := [number for number, count in Counter(answered).items() if count > 1]:
        raise ValueError(f"{files.answers}: answered more than once: {_some(twice)}; keep one answer to each question")


def _some(ids: Collection) -> str:
    first = sorted(map(repr, ids))[:NAMED]
    return ", ".join(first) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")


def _ids(answers: Sequence[Mapping]) -> list:
    return [answer["question_id"] for answer in answers]


# ---- one function a task


def _pope(answers: Sequence[Mapping], files: Files) -> dict:
    folder = epath.Path(files.annotations)
    paths = {path.name[len("coco_pope_") : -len(".json")]: path for path in sorted(folder.glob("coco_pope_*.json"))}
    if not paths:
        raise FileNotFoundError(f"{folder}: has no coco_pope_*.json; the annotations of pope are its folder coco")
    beside = str(folder.parent / "llava_pope_test.jsonl")
    if files.questions is None and not epath.Path(beside).exists():
        raise FileNotFoundError(f"{beside}: no such file; name POPE's questions with --question-file")
    asked_in = files.questions or beside
    asked = _jsonl(asked_in, ("question_id", "category"), "POPE's question file has question_id and category")
    check_ids(_ids(answers), _ids(asked), Files(files.answers, asked_in, None))
    if _ids(answers) != _ids(asked):
        raise ValueError(
            f"{files.answers}: its answers are not in the order of {asked_in}, by which POPE's labels find them"
        )
    labels = {}
    for category, path in paths.items():
        entries = _jsonl(str(path), ("label",), "POPE's labels are one JSON object a line")
        same = [question for question in asked if question["category"] == category]
        _check_labels(same, entries, str(path), asked_in)
        labels[category] = [entry["label"] for entry in entries]
    others = {question["category"] for question in asked} - set(labels)
    if others:
        raise ValueError(f"{folder}: has no coco_pope_{min(others)}.json, but {asked_in} asks in that category")
    return score_pope(answers, {question["question_id"]: question["category"] for question in asked}, labels)


def _check_labels(asked: Sequence[Mapping], labels: Sequence[Mapping], path: str, asked_in: str) -> None:
    """As many labels as questions, about the same pictures in the same order, where both name them."""
    if len(asked) != len(labels):
        raise ValueError(
            f"{path}: {len(labels)} labels for {len(asked)} questions of {asked_in}; take POPE's release for it"
        )
    for number, (question, label) in enumerate(zip(asked, labels, strict=True), 1):
        images = [epath.Path(entry["image"]).name for entry in (question, label) if "image" in entry]
        if len(set(images)) > 1:
            raise ValueError(f"{path}, line {number}: about {images[1]}, but {asked_in} asks about {images[0]} there")


def _jsonl(path: str, keys: Collection[str], remedy: str) -> Sequence[Mapping]:
    try:
        return _records([json.loads(line) for line in read_lines(path)], keys, path, remedy)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON lines ({error}); {remedy}") from error


def _textvqa(answers: Sequence[Mapping], files: Files) -> dict:
    path = files.annotations
    data = _json(path, dict, ("data",), "TextVQA_0.5.1_val.json, with a list 'data'")["data"]
    _records(data, ("image_id", "question", "answers"), path, SERVER)
    known = textvqa_annotations(data)
    for answer in answers:
        key = answer["question_id"], textvqa_question(answer["prompt"])
        if key not in known:
            raise ValueError(
                f"{files.answers}: {path} has no question {key[1]!r} about image {key[0]!r}; is it the same split?"
            )
    if len(answers) != len(data):
        raise ValueError(
            f"{files.answers}: {len(answers)} answers, but {path} has {len(data)} questions; answer each once, with "
            "llava-jax evaluate"
        )
    return score_textvqa(answers, data)


def _vqav2(answers: Sequence[Mapping], files: Files) -> dict:
    what = f"v2_mscoco_val2014_annotations.json, with a list 'annotations'; {SERVER}"
    entries = _json(files.annotations, dict, ("annotations",), what)["annotations"]
    _records(entries, ("question_id", "answers", "answer_type", "question_type"), files.annotations, SERVER)
    _check_people(entries, files.annotations)
    check_ids(_ids(answers), _ids(entries), files)
    return score_vqav2(answers, entries)


def _vizwiz(answers: Sequence[Mapping], files: Files) -> dict:
    entries = _json(files.annotations, list, (), f"VizWiz's val.json, a list; {SERVER}")
    _records(entries, ("image", "answers", "answer_type"), files.annotations, SERVER)
    _check_people(entries, files.annotations)
    if files.questions is None:
        images = _ids(answers)
    else:
        asked = _jsonl(files.questions, ("question_id", "image"), "VizWiz's question file has question_id and image")
        check_ids(_ids(answers), _ids(asked), Files(files.answers, files.questions, None))
        image_of = {question["question_id"]: question["image"] for question in asked}
        images = [image_of[number] for number in _ids(answers)]
    check_ids(images, [entry["image"] for entry in entries], files)
    return score_vizwiz({image: answer["text"] for image, answer in zip(images, answers, strict=True)}, entries)


def _check_people(entries: Sequence[Mapping], path: str) -> None:
    if not entries or not all(entry["answers"] for entry in entries):
        raise ValueError(f"{path}: a question has no annotated answers; {SERVER}")


def _gqa(answers: Sequence[Mapping], files: Files) -> dict:
    path = _inside(files.annotations, "testdev_balanced_questions.json")
    questions = _json(path, dict, (), "GQA's testdev_balanced_questions.json, question_id → question")
    keys = ("answer", "isBalanced", "question", "types", "semantic", "groups")
    _records(list(questions.values()), keys, path, "GQA's questions of a split with answers have all of them")
    check_ids(_ids(answers), questions, files)
    return score_gqa(answers, questions)


def _scienceqa(answers: Sequence[Mapping], files: Files) -> dict:
    folder = epath.Path(files.annotations)
    split = _json(str(folder / "pid_splits.json"), dict, ("test",), "ScienceQA's, with a list 'test'")["test"]
    if not isinstance(split, list):
        raise ValueError(f"{folder / 'pid_splits.json'}: 'test' must be a list of ids")
    problems = _json(str(folder / "problems.json"), dict, split, "ScienceQA's, with every question of the test split")
    _records(
        [problems[number] for number in split], ("choices", "answer"), str(folder / "problems.json"), "take all of it"
    )
    check_ids(_ids(answers), split, files)
    return score_scienceqa(answers, problems, split)


def _mmbench(answers: Sequence[Mapping], files: Files) -> dict:
    columns, rows = read_table(files.annotations)
    if "index" not in columns or "answer" not in columns:
        raise ValueError(f"{files.annotations}: needs the columns index and answer; {SERVER}")
    kept = [(place, name) for place, name in enumerate(columns) if name != "image"]
    cells: dict[str, list] = {name: [row.cells[place] for row in rows] for place, name in kept}
    cells["index"] = typed(cells["index"])
    if not all(isinstance(index, int) for index in cells["index"]):
        raise ValueError(f"{files.annotations}: the column index must have a whole number in each row")
    entries = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    if not all(entry["answer"] for entry in entries):
        raise ValueError(f"{files.annotations}: a question has no answer; {SERVER}")
    check_once([(answer["question_id"], answer["round_id"]) for answer in answers], files)
    check_ids(list(set(_ids(answers))), cells["index"], files)
    truth = {entry["index"]: entry["answer"] for entry in entries}
    for answer in answers:
        if truth[answer["question_id"]] not in answer["option_char"]:
            raise ValueError(
                f"{files.answers}: question {answer['question_id']} was asked with options {answer['option_char']}, "
                f"but {files.annotations} has the answer {truth[answer['question_id']]!r}; give the file that was asked"
            )
    return score_mmbench(answers, entries)


def _mme(answers: Sequence[Mapping], files: Files) -> dict:
    truth = read_truth(files.annotations)
    if not all(isinstance(number, str) and "/" in number for number in _ids(answers)):
        raise ValueError(
            f"{files.answers}: MME's ids are like existence/000000006040.jpg, these are not; is it MME's file?"
        )
    keys = [truth_key(answer, truth) for answer in answers]
    check_ids(list(set(keys)), truth, files)
    for category in {category for category, _, _ in keys}:
        images = [image for key_category, image, _ in keys if key_category == category]
        if images[::2] != images[1::2] or len(set(images)) * 2 != len(images):
            raise ValueError(f"{files.answers}: each image of {category} needs two answers, one after the other")
    return score_mme(answers, truth)


def _seed(answers: Sequence[Mapping], files: Files) -> dict:
    data = _json(files.annotations, dict, ("questions", "question_type"), "SEED-Bench.json")
    keys = ("question_id", "question_type_id", "data_type", "answer")
    questions = _records(data["questions"], keys, files.annotations, "SEED-Bench.json's questions have all of them")
    numbers = {(question["data_type"], question_id(question["question_id"])) for question in questions}
    answered = set(_ids(answers))
    # Many have no videos: images or videos may be left out as a whole; the total then counts them as wrong, as LLaVA's.
    kinds = {kind for kind, number in numbers if number in answered} or {kind for kind, _ in numbers}
    check_ids(_ids(answers), [number for kind, number in numbers if kind in kinds], files)
    return score_seed(answers, data)


SCORERS = {
    "pope": Scorer(_pope, "the folder pope/coco, with coco_pope_*.json", table=("random", "popular", "adversarial")),
    "textvqa": Scorer(_textvqa, "textvqa/TextVQA_0.5.1_val.json", ("prompt",)),
    "vqav2": Scorer(
        _vqav2, "v2_mscoco_val2014_annotations.json (test splits: by their server)", table=("answer_type",)
    ),
    "gqa": Scorer(_gqa, "gqa/data, or testdev_balanced_questions.json in it", table=("structural", "semantic")),
    "vizwiz": Scorer(_vizwiz, "val.json (the test split: by its server)", table=("answer_type",)),
    "scienceqa": Scorer(_scienceqa, "the folder scienceqa, with pid_splits.json and problems.json", ("prompt",)),
    "mmbench": Scorer(
        _mmbench, "mmbench/mmbench_dev_20230712.tsv", ("round_id", "options", "option_char"), ("l2-category",)
    ),
    "mme": Scorer(_mme, "the folder MME/MME_Benchmark_release_version", ("prompt",), ("subtasks",)),
    "seed": Scorer(_seed, "seed_bench/SEED-Bench.json", table=("types",)),
}
