"""The answer file: each process appends to its own part, which survives being killed; at the end they are merged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from etils import epath

from llava_jax.evaluation.questions import Question
from llava_jax.files import write_atomically

SHORTUUID = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def answer_id(settings: Sequence, number: int, question: Question) -> str:
    """What the reference's shortuuid.uuid() looks like, but the same for the same question asked in the same way.

    Args:
        settings: whatever else the answer depends on, as JSON has it.
        number: the question's place in the file, where the same question may stand twice.
    """
    image = question.image if isinstance(question.image, str | None) else hashlib.sha256(question.image).hexdigest()
    asked = [question.question_id, question.text, question.prompt, image, dict(question.fields)]
    digest = hashlib.sha256(json.dumps([list(settings), number, asked]).encode()).digest()
    value, letters = int.from_bytes(digest[:16]), []
    for _ in range(22):
        value, letter = divmod(value, len(SHORTUUID))
        letters.append(SHORTUUID[letter])
    return "".join(letters)


def answer_line(question: Question, text: str, answer_id: str, model_id: str, error: str | None = None) -> str:
    """One line of the answer file, the reference's keys in its order; an error stands in the metadata."""
    later = dict(question.fields)
    earlier = {key: later.pop(key) for key in ("round_id",) if key in later}
    answer = {"question_id": question.question_id, **earlier, "prompt": question.prompt, "text": text, **later}
    answer |= {"answer_id": answer_id, "model_id": model_id, "metadata": {"error": error} if error else {}}
    return json.dumps(answer) + "\n"


@dataclass(frozen=True)
class AnswerFile:
    """An answer file in the making, local or gs://.

    Attributes:
        path: of the merged file; the parts stand beside it.
        ids: the answer id of each question, in order.
    """

    path: epath.Path
    ids: tuple[str, ...]

    def part(self, process: int) -> epath.Path:
        """What that process appends to; where nothing can be appended to, the beginning of its parts' names."""
        return self.path.parent / f"{self.path.name}.part-{process}"

    def parts(self) -> list[epath.Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part-*"))

    def answered(self) -> dict[int, str]:
        """Question number → its line, as far as they are answered, well or with an error.

        Raises:
            ValueError: a file holds other answers than this run's, or is damaged.
        """
        numbers: dict[str | None, int] = {answer_id: number for number, answer_id in enumerate(self.ids)}
        lines: dict[int, str] = {}
        for path in [*([self.path] if self.path.exists() else []), *self.parts()]:
            for n, line in enumerate(_whole_lines(path), 1):
                number = numbers.get(_id_of(line))
                if number is None:
                    raise ValueError(
                        f"{path}, line {n}: not an answer to these questions by this model, template and options; "
                        "name another --answers-file, or delete this one (and its parts) to begin anew"
                    )
                if number not in lines or failure_of(lines[number]):
                    lines[number] = line
        return lines

    def merge(self) -> None:
        """All lines in the order of the questions, written at once; the parts are then deleted.

        Raises:
            ValueError: answers are missing.
        """
        lines = self.answered()
        missing = len(self.ids) - len(lines)
        if missing:
            raise ValueError(f"{self.path}: {missing} of {len(self.ids)} questions have no answer yet; start again")
        text = "".join(lines[number] for number in range(len(self.ids)))
        if is_local(self.path):
            write_atomically(self.path, text)
        else:  # an object appears whole
            self.path.write_text(text)
        for part in self.parts():
            part.unlink()


class Part:
    """One process's part, to append to."""

    def __init__(self, path: epath.Path):
        self.path, self._objects = path, 0
        if is_local(path):
            self._repair()
        else:
            self._write_object(b"")  # so that the others see it

    def append(self, lines: Iterable[str]) -> None:
        """Lines that are safe on the disk when this returns."""
        text = "".join(lines).encode()
        if text and is_local(self.path):
            with open(self.path, "ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        elif text:
            self._write_object(text)

    def _write_object(self, text: bytes) -> None:
        """An object store has no appending: an object each time, written whole or not at all."""
        while (path := self.path.parent / f"{self.path.name}-{self._objects:06d}").exists():
            self._objects += 1
        path.write_bytes(text)

    def _repair(self) -> None:
        """Cut off a last line that was not written to its end."""
        with open(self.path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def failure_of(line: str) -> str | None:
    """Why the question of an answer's line could not be asked."""
    return json.loads(line)["metadata"].get("error")


def _whole_lines(path: epath.Path) -> list[str]:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines(keepends=True)


def _id_of(line: str) -> str | None:
    try:
        return json.loads(line).get("answer_id")
    except (ValueError, AttributeError):
        return None
