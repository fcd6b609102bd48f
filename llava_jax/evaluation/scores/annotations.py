"""The benchmarks' annotations, read and checked as a whole before anything is scored, or even asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from etils import epath

from llava_jax.evaluation.mmbench_table import MMBenchRow, read_mmbench
from llava_jax.evaluation.questions import ID
from llava_jax.fields import Kind
from llava_jax.records import check_objects, read_json, read_json_object, read_objects

SERVER = "a test split has none, its server scores it (llava-jax submit makes the file)"
PEOPLE: Kind = [{"answer": (str,)}]


@dataclass(frozen=True)
class Files:
    """The paths that a run is given."""

    answers: str
    annotations: str
    questions: str | None


# ---- pope


@dataclass(frozen=True)
class Pope:
    """POPE's questions, the file that has them, and category → "yes" or "no" of each of its questions, in order."""

    questions: Sequence[Mapping]
    asked_in: str
    labels: Mapping[str, Sequence[str]]


def read_pope(files: Files) -> Pope:
    folder = epath.Path(files.annotations)
    paths = {path.name[len("coco_pope_") : -len(".json")]: path for path in sorted(folder.glob("coco_pope_*.json"))}
    if not paths:
        raise FileNotFoundError(f"{folder}: has no coco_pope_*.json; the annotations of pope are its folder coco")
    beside = str(folder.parent / "llava_pope_test.jsonl")
    if files.questions is None and not epath.Path(beside).exists():
        raise FileNotFoundError(f"{beside}: no such file; name POPE's questions with --question-file")
    asked_in = files.questions or beside
    asked = read_objects(
        asked_in, {"question_id": ID, "category": (str,)}, "POPE's question file has question_id and category"
    )
    labels = {}
    for category, path in paths.items():
        entries = read_objects(path, {"label": (str,)}, "POPE's labels are one JSON object a line")
        _check_labels([entry for entry in asked if entry["category"] == category], entries, str(path), asked_in)
        labels[category] = [entry["label"] for entry in entries]
    others = {question["category"] for question in asked} - set(labels)
    if others:
        raise ValueError(f"{folder}: has no coco_pope_{min(others):.80}.json, but {asked_in} asks in that category")
    return Pope(asked, asked_in, labels)


def _check_labels(asked: Sequence[Mapping], labels: Sequence[Mapping], path: str, asked_in: str) -> None:
    """As many labels as questions, about the same pictures in the same order, where both name them."""
    if len(asked) != len(labels):
        raise ValueError(
            f"{path}: {len(labels)} labels for {len(asked)} questions of {asked_in}; take POPE's release for it"
        )
    for number, (question, label) in enumerate(zip(asked, labels, strict=True), 1):
        images = [PurePath(str(entry["image"])).name for entry in (question, label) if "image" in entry]
        if len(set(images)) > 1:
            raise ValueError(
                f"{path}, line {number}: about {images[1]:.80}, but {asked_in} asks about {images[0]:.80} there"
            )


# ---- answers of ten people


def read_textvqa(files: Files) -> list[dict]:
    data = _key_of(files.annotations, "data", "TextVQA_0.5.1_val.json, with a list 'data'")
    kinds: dict[str, Kind] = {"image_id": (str,), "question": (str,), "answers": [(str,)]}
    return check_objects(data, kinds, files.annotations, SERVER, "entry")


def read_vqav2(files: Files) -> list[dict]:
    what = f"v2_mscoco_val2014_annotations.json, with a list 'annotations'; {SERVER}"
    kinds = {"question_id": ID, "answers": PEOPLE, "answer_type": (str,), "question_type": (str,)}
    entries = check_objects(_key_of(files.annotations, "annotations", what), kinds, files.annotations, SERVER, "entry")
    return _with_people(entries, files.annotations)


@dataclass(frozen=True)
class VizWiz:
    """VizWiz's annotations, and question_id → image, where ids are not the images' names."""

    entries: list[dict]
    image_of: Mapping | None


def read_vizwiz(files: Files) -> VizWiz:
    kinds = {"image": (str,), "answers": PEOPLE, "answer_type": (str,)}
    entries = check_objects(read_json(files.annotations), kinds, files.annotations, SERVER, "entry")
    image_of = None
    if files.questions is not None:
        keys: dict[str, Kind] = {"question_id": ID, "image": (str,)}
        asked = read_objects(files.questions, keys, "VizWiz's question file has question_id and image")
        image_of = {question["question_id"]: question["image"] for question in asked}
    return VizWiz(_with_people(entries, files.annotations), image_of)


def _with_people(entries: list[dict], path: str) -> list[dict]:
    if not entries or not all(entry["answers"] for entry in entries):
        raise ValueError(f"{path}: a question has no annotated answers; {SERVER}")
    return entries


# ---- the others


def read_gqa(files: Files) -> dict[str, dict]:
    given = epath.Path(files.annotations)
    path = given / "testdev_balanced_questions.json" if given.is_dir() else given
    questions = read_json_object(path, "it is GQA's testdev_balanced_questions.json, question_id → question")
    kinds: dict[str, Kind] = {
        "answer": (str,),
        "isBalanced": (bool,),
        "question": (str,),
        "types": {"structural": (str,), "semantic": (str,)},
        "semantic": [{"operation": (str,), "argument": (str,)}],
        "groups": {"global": (str, type(None))},
    }
    remedy = "GQA's questions of a split with answers have all of them"
    check_objects(list(questions.values()), kinds, path, remedy, "entry")
    return questions


@dataclass(frozen=True)
class ScienceQA:
    """The problems by their ids, and the ids of those that count."""

    problems: Mapping[str, Mapping]
    split: Sequence[str]


def read_scienceqa(files: Files) -> ScienceQA:
    folder = epath.Path(files.annotations)
    splits, path = folder / "pid_splits.json", folder / "problems.json"
    split = _key_of(splits, "test", "ScienceQA's, with a list 'test'")
    if not isinstance(split, list) or not all(isinstance(number, str) for number in split):
        raise ValueError(f"{splits}: 'test' must be a list of ids, which are texts")
    problems = read_json(path)
    if not isinstance(problems, dict) or any(number not in problems for number in split):
        raise ValueError(f"{path}: is not ScienceQA's, with every question of the test split")
    kinds: dict[str, Kind] = {"choices": (list,), "answer": (int,)}
    check_objects([problems[number] for number in split], kinds, path, "take all of it", "question of the split")
    return ScienceQA(problems, split)


def read_mmbench_answers(files: Files) -> list[MMBenchRow]:
    path = files.annotations
    columns, rows = read_mmbench(path)
    if "answer" not in columns:
        raise ValueError(f"{path}: needs the columns index and answer; {SERVER}")
    for row in rows:
        if not isinstance(row.index, int):
            raise ValueError(f"{row.where}: the column index must have a whole number in each row")
        if not row.problem and not row.cells["answer"]:
            raise ValueError(f"{row.where}: has no answer; {SERVER}")
    return rows


def read_seed(files: Files) -> dict:
    path, whole = files.annotations, "SEED-Bench.json's questions have all of them"
    questions = _key_of(path, "questions", "SEED-Bench.json")
    names = _key_of(path, "question_type", "SEED-Bench.json")
    kinds: dict[str, Kind] = {
        "question_id": (str, int),
        "question_type_id": (int,),
        "data_type": (str,),
        "answer": (str,),
    }
    check_objects(questions, kinds, path, whole, "entry")
    numbers = list(names.values()) if isinstance(names, dict) else []
    if strangers := [n for n, question in enumerate(questions, 1) if question["question_type_id"] not in numbers]:
        raise ValueError(f"{path}, entry {strangers[0]}: its question_type_id is none of 'question_type'; {whole}")
    return {"questions": questions, "question_type": {name: n for name, n in names.items() if isinstance(n, int)}}


def _key_of(path, key: str, what: str):
    """What a JSON object in a file has under a key."""
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path}: is not {what}")
    return content[key]
