"""Answers that a killed run had given, by what was asked: lines of JSON in a folder, local or gs://."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from llava_jax.evaluation.answers import KEPT, AnswerShard
from llava_jax.files import writing
from llava_jax.records import parse_json, read_file


def cache_key(asked: Any) -> str:
    """What a question, as JSON has it, is known by."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class AnswerCache:
    """Each run appends to a file of its own, and finds what all of them had; so several may run at once.

    Raises:
        ValueError, OSError: the folder cannot be made or written, or a file in it is not a cache's.
    """

    def __init__(self, folder: str):
        self._folder = epath.Path(folder).expanduser()
        with writing(self._folder, KEPT):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = {}
        for path in sorted(self._folder.glob("answers-*.jsonl*")):
            self._known |= _read(path)
        self._shard = AnswerShard(self._folder / f"answers-{uuid.uuid4().hex}.jsonl")

    def known(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers there are to some of these."""
        return {key: self._known[key] for key in keys if key in self._known}

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers, as JSON has them; they are safe on the disk when this returns."""
        self._shard.append(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())
        self._known |= answers


def _read(path: epath.Path) -> dict[str, Any]:
    """A file's answers; a last line that was not written to its end is left out."""
    data, answers = read_file(path), {}
    for n, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        entry = parse_json(line, f"{path}, line {n}", "delete the file to have its questions asked again")
        if not isinstance(entry, dict) or entry.keys() != {"key", "answer"}:
            raise ValueError(f"{path}, line {n}: is no answer; name another folder for the cache")
        answers[entry["key"]] = entry["answer"]
    return answers
