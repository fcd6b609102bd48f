"""The answer file: each process appends to its own part, which survives being killed; at the end they are merged."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from etils import epath

from llava_jax.evaluation.questions import Question
from llava_jax.files import is_local, write_whole, writing
from llava_jax.records import parse_json, read_file

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
ID_LENGTH = 22
WEIGHTS_LENGTH = 6  # of an id's beginning, which says which weights answered
KEPT = "what is answered is kept; make room for the rest, and start it again to go on"


def answer_id(weights: str, settings: Sequence, number: int, question: Question) -> str:
    """What the reference's shortuuid.uuid() looks like, but the same for the same question asked in the same way.

    `weights` is the checkpoint's fingerprint, `settings` whatever else the answer depends on, as JSON has it, and
    `number` the question's place in the file, where the same question may stand twice.
    """
    image = question.image if isinstance(question.image, str | None) else hashlib.sha256(question.image).hexdigest()
    asked = [question.question_id, question.text, question.prompt, image, dict(question.fields)]
    text = json.dumps([weights, list(settings), number, asked])
    return _encode(json.dumps(weights), WEIGHTS_LENGTH) + _encode(text, ID_LENGTH - WEIGHTS_LENGTH)


def _encode(text: str, count: int) -> str:
    value, letters = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]), []
    for _ in range(count):
        value, letter = divmod(value, len(ALPHABET))
        letters.append(ALPHABET[letter])
    return "".join(letters)


def answer_line(question: Question, text: str, model_id: str, error: str | None = None) -> str:
    """One line of the answer file, the reference's keys in its order; an error stands in the metadata."""
    later = dict(question.fields)
    earlier = {key: later.pop(key) for key in ("round_id",) if key in later}
    answer = {"question_id": question.question_id, **earlier, "prompt": question.prompt, "text": text, **later}
    metadata = {"error": error} if error else {}
    answer |= {"answer_id": question.answer_id, "model_id": model_id, "metadata": metadata}
    return json.dumps(answer) + "\n"


@dataclass(frozen=True)
class AnswerFile:
    """An answer file in the making, local or gs://."""

    path: epath.Path  # of the merged file; the parts stand beside it
    questions: Sequence[Question]  # all of this run's, with their answer ids, in order

    def part(self, process: int) -> epath.Path:
        """What that process appends to; where nothing can be appended to, the beginning of its parts' names."""
        return self.path.parent / f"{self.path.name}.part-{process}"

    def parts(self) -> list[epath.Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))

    def check_shared(self, process: int, processes: int) -> None:
        """ValueError if a process does not see the parts of all of them."""
        seen = {path.name.removeprefix(f"{self.path.name}.part-").split("-")[0] for path in self.parts()}
        if missing := {str(number) for number in range(processes)} - seen:
            raise ValueError(
                f"--answers-file {self.path}: process {process} does not see what process {min(missing)} writes; name "
                "a place that all hosts share, such as gs://…"
            )

    def answered(self) -> dict[str, str]:
        """Answer id → line, of the questions that are answered, well or with an error; ValueError if a file holds other
        answers than this run's, or is damaged."""
        known = {question.answer_id for question in self.questions}
        lines: dict[str, str] = {}
        for path in [*([self.path] if self.path.exists() else []), *self.parts()]:
            data = read_file(path)
            for n, written in enumerate(data[: data.rfind(b"\n") + 1].splitlines(keepends=True), 1):
                line = written.decode("utf-8", "replace")
                answer_id = str(_answer(line).get("answer_id"))
                if answer_id not in known:
                    raise ValueError(
                        f"{path}, line {n}: not an answer to these questions by this model, template and options "
                        f"({self._origin(line)}); name another --answers-file, or delete this one (and its parts) to "
                        "begin anew"
                    )
                if answer_id not in lines or failure_of(lines[answer_id]):
                    lines[answer_id] = line
        return lines

    def _origin(self, line: str) -> str:
        """Of an answer that is none of this run's: what it is."""
        answer = _answer(line)
        if not answer:
            return "it is no JSON object"
        model = f"it is by {answer.get('model_id')!r:.80}"
        ours = {question.answer_id[:WEIGHTS_LENGTH] for question in self.questions}
        if not ours or str(answer.get("answer_id"))[:WEIGHTS_LENGTH] in ours:
            return f"{model}, with these weights, but with another template, other options or to another question"
        return f"{model}, with other weights than this checkpoint's or by another program"

    def merge(self) -> None:
        """All lines in the order of the questions, written at once; the parts are then deleted. Where answers are
        missing (ValueError), or it cannot be written (OSError), the parts are kept."""
        lines, count = self.answered(), len(self.questions)
        if len(lines) < count:
            raise ValueError(f"{self.path}: {count - len(lines)} of {count} questions have no answer yet; start again")
        with writing(self.path, KEPT):
            write_whole(self.path, "".join(lines[question.answer_id] for question in self.questions).encode())
        for part in self.parts():
            part.unlink()


class AnswerShard:
    """One process's part, to append to; where it cannot be written (OSError), what it held stays."""

    def __init__(self, path: epath.Path):
        self.path, self._objects = path, 0
        with writing(path, KEPT):
            if is_local(path):
                with open(path, "a+b") as file:  # a last line that was not written to its end is cut off
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            else:
                self._write_object(b"")  # so that the others see it

    def append(self, lines: Iterable[str]) -> None:
        """Lines that are safe on the disk when this returns."""
        text = "".join(lines).encode()
        if not text:
            return
        with writing(self.path, KEPT):
            if is_local(self.path):
                with open(self.path, "ab") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                self._write_object(text)

    def _write_object(self, text: bytes) -> None:
        """An object store has no appending: an object each time, written whole or not at all."""
        while (path := self.path.parent / f"{self.path.name}-{self._objects:06d}").exists():
            self._objects += 1
        path.write_bytes(text)


def failure_of(line: str) -> str | None:
    """Why the question of an answer's line could not be asked."""
    metadata = _answer(line).get("metadata")
    error = metadata.get("error") if isinstance(metadata, dict) else None
    return str(error) if error else None


def _answer(line: str) -> dict:
    """What a line says; nothing if it is no answer."""
    try:
        answer = parse_json(line, "")
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
