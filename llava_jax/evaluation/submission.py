"""Answers as the benchmarks' servers and their own evaluators take them, byte for byte as the reference's converters
write them."""

from __future__ import annotations

from collections.abc import Iterator

from etils import epath

from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.files import write_whole, writing


def write_submission(
    task: str, answers_file: str, output: str, question_file: str | None = None, annotations: str | None = None
) -> Iterator[epath.Path]:
    """Write a task's answers for its server or evaluator; a file that is there is written over.

    Yields:
        each file once it is written: `output`; of mme, those in it.

    Raises:
        ValueError: a file is missing or malformed, or an answer that the evaluator insists on is missing.
        OSError: a file cannot be read or written.
    """
    submission = BENCHMARKS[task].submission
    if submission is None:
        raise ValueError(f"{task} has no server or evaluator to write its answers for")
    given = [answers_file]
    if submission.needs:
        other = {"question_file": question_file, "annotations": annotations}[submission.needs]
        if other is None:
            raise ValueError(f"--task {task} needs --{submission.needs.replace('_', '-')}: {submission.what}")
        given.append(other)
    written = submission.convert(*given)
    files = {"": written} if isinstance(written, bytes) else written
    for name, content in files.items():
        path = epath.Path(output) / name
        with writing(path, "make room, or name another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        yield path
