"""MMBench and MMBench-CN: questions from a table, vanilla and circular accuracy by exact matching, the server's sheet.

Questions as LLaVA's llava/eval/model_vqa_mmbench.py reads them; that an image cell may be another row's index is in
VLMEvalKit's vlmeval/dataset/image_base.py. Scores as its vlmeval/utils/matching_util.py and
vlmeval/dataset/utils/multiple_choice.py give them with `exact_matching`, without GPT: LLaVA hands its answers to
MMBench's server, which asks GPT about an answer in which no option is found. The sheet is that of LLaVA's
scripts/convert_mmbench_for_submission.py: the same cells, but none of pandas' formatting of the first row.
"""

from __future__ import annotations

import base64
import functools
import itertools
import re
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llava_jax.evaluation.benchmarks.benchmark import NOTES, Benchmark, Files, Published, Scorer, Submission
from llava_jax.evaluation.benchmarks.common import SERVER, check_ids, check_once, percent, question_ids, read_texts
from llava_jax.evaluation.questions import SINGLE_PRED_PROMPT, Layout, PromptFlags, Question, checked_question
from llava_jax.evaluation.workbook import workbook
from llava_jax.records import naming, read_table, typed

OPTIONS = ["A", "B", "C", "D"]
MOST_INDEX_CHARACTERS = 64  # of an image cell that may be another row's index; a picture has more
MOST_NOTES = 20  # rows that a score names
ROTATION = 1_000_000  # dev_20230712's rotated copies of question n are n + 1,000,000, n + 2,000,000, …
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
SENTENCE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
NOT_IN_SHEET = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_AT = 6  # the sheet's column


# ---- the table


@dataclass(frozen=True)
class Row:
    where: str  # file and line, for errors
    index: int | float | str | None  # as pandas types the column; None where it is empty
    cells: Mapping[str, str | None]  # by column; None is an empty one
    options: list[str]  # what is asked: those before the first empty one
    problem: str | None  # why the row cannot be asked
    lost: str | None  # which options stand in the file and are not asked, and by which cell


def read_rows(path) -> tuple[list[str], list[Row]]:
    columns, rows = read_table(path)
    _check_has_index(path, columns)
    at = columns.index("index")
    indices = typed([row.cells[at] for row in rows])
    return columns, [
        _row_of(f"{path}, line {row.line}", columns, row.cells, row.written, None if row.cells[at] is None else index)
        for row, index in zip(rows, indices, strict=True)
    ]


def _check_has_index(path, columns: Sequence[str]) -> None:
    if "index" not in columns:
        raise ValueError(f"{path}: has no column index; its columns are {', '.join(columns):.500}")


def _row_of(where: str, columns: Sequence[str], cells: Sequence[str | None], written: Sequence[str], index) -> Row:
    if len(cells) > len(columns):  # which cell belongs to which column, nobody can say
        problem = f"has {len(cells)} cells for {len(columns)} columns"
        return Row(where, index, dict.fromkeys(columns), [], problem, None)
    row = dict(zip(columns, cells, strict=True))
    options = [cell or "" for cell in itertools.takewhile(lambda cell: not is_none(cell), map(row.get, OPTIONS))]
    return Row(where, index, row, options, None, _lost(where, dict(zip(columns, written, strict=True)), options))


def is_none(value: str | None) -> bool:
    """The reference's function of this name, for cells."""
    return value is None or value.lower() in ("nan", "none")


def _lost(where: str, written: Mapping[str, str], options: Sequence[str]) -> str | None:
    lost = [name for name in OPTIONS[len(options) :] if written.get(name, "").lower() not in ("", "nan")]
    if not lost:
        return None
    ended_by = OPTIONS[len(options)]
    why = f"{written[ended_by]!r:.40} counts as empty" if written.get(ended_by) else "is empty"
    return f"{where}, column {ended_by}: {why}, as in the original; not asked: {', '.join(lost)}"


def picture_reader(rows: Sequence[Row]) -> Callable[[str], bytes]:
    """image cell → picture's bytes, a row's own or the one of the row whose index the cell is.

    What it returns raises ValueError where there is none.
    """
    images = {index.strip(): row.cells["image"] for row in rows if (index := row.cells["index"])}
    decode = functools.cache(base64.b64decode)  # a picture is kept once, however many rows have it

    def read(cell: str) -> bytes:
        named: list[str] = []
        while len(cell) <= MOST_INDEX_CHARACTERS and (name := cell.strip()) in images:
            if name in named or not images[name]:
                raise ValueError(f"its image is row {[*named, name][0]}'s, which has none")
            named.append(name)
            cell = images[name] or ""
        whose = f"its image is row {named[0]}'s, which" if named else "its image"
        if cell.strip().isdecimal():
            raise ValueError(f"{whose} is {cell:.40}, neither base64 nor another row's index")
        try:
            return decode(cell)
        except ValueError as error:
            raise ValueError(f"{whose} is not base64 ({error})") from error

    return read


# ---- questions


def _read_questions(path, flags: PromptFlags) -> list[Question]:
    columns, rows = read_rows(path)
    if missing := [name for name in ("question", "hint", *OPTIONS, "image") if name not in columns]:
        raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns):.500}")
    picture_of = picture_reader(rows)
    return [question for row in rows for question in _of_row(row, picture_of, flags)]


def _of_row(row: Row, picture_of: Callable[[str], bytes], flags: PromptFlags) -> list[Question]:
    """One question a round; the first empty option ends them; the sentence that asks for the letter is not echoed."""
    question, hint, cell, options = row.cells["question"], row.cells["hint"], row.cells["image"], row.options
    empty = [name for name in ("index", "question", "image") if row.cells[name] is None]
    problem = row.problem or (f"its {', '.join(empty)} is empty" if empty else None)
    image = None
    if cell:
        try:
            image = picture_of(cell)
        except ValueError as error:
            problem = problem or str(error)
    asked = (question or "") if is_none(hint) else f"{hint}\n{question or ''}"
    if flags.all_rounds and not options:  # the reference leaves such a row out without a word
        problem = problem or f"its {OPTIONS[0]} is empty, so there is no option to rotate"
    letters = OPTIONS[: len(options)]
    rounds = []
    for r in range(max(1, len(options)) if flags.all_rounds else 1):
        turned = options[r:] + options[:r]
        prompt = "\n".join([asked, *(f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True))])
        text = f"{prompt}\n{SINGLE_PRED_PROMPT[flags.lang]}" if flags.single_pred_prompt else prompt
        fields = {"round_id": r, "options": turned, "option_char": letters[r:] + letters[:r]}
        rounds.append(checked_question(row.where, Question(row.index, text, prompt, image, fields, problem, row.lost)))
    return rounds


MMBENCH = Layout(
    "mmbench", _read_questions, max_new_tokens=1024, rgb=False, ending=".tsv", single_pred_prompt=True, all_rounds=True
)


# ---- scores


def read_truth(files: Files) -> list[Row]:
    columns, rows = read_rows(files.annotations)
    if "answer" not in columns:
        raise ValueError(f"{files.annotations}: needs the columns index and answer; {SERVER}")
    for row in rows:
        if not isinstance(row.index, int):
            raise ValueError(f"{row.where}: the column index must have a whole number in each row")
        if not row.problem and not row.cells["answer"]:
            raise ValueError(f"{row.where}: has no answer; {SERVER}")
    return rows


def _score(answers: Sequence[Mapping], rows: list[Row], files: Files) -> dict:
    check_once([(answer["question_id"], answer["round_id"]) for answer in answers], files.answers)
    indices = [row.index for row in rows]
    check_ids(list(set(question_ids(answers))), indices, files.answers, files.annotations)
    by_index = dict(zip(indices, rows, strict=True))
    wrong = {}
    for number, answer in enumerate(answers, 1):
        letters = answer["option_char"]
        if sorted(letters) != list(string.ascii_uppercase[: len(answer["options"])]):
            raise ValueError(f"{files.answers}, line {number}: 'option_char' is not the letters of its 'options'")
        row = by_index[answer["question_id"]]
        if row.cells["answer"] not in letters:
            wrong[row.index] = _without_its_answer(row, letters, files)
    entries = [{**row.cells, "index": row.index} for row in rows]
    with naming(files.answers):
        figures = score_mmbench(answers, entries)
    notes = [*wrong.values()][:MOST_NOTES]
    if len(wrong) > MOST_NOTES:
        notes.append(f"and {len(wrong) - MOST_NOTES} more rows are scored as wrong")
    return figures | ({NOTES: notes} if notes else {})


def _without_its_answer(row: Row, letters: Sequence[str], files: Files) -> str:
    """Why a row's true option was not among those asked, where it is the row's own fault.

    MMBench's own program reads the same cells as empty and can match no answer with them either: it counts as wrong.
    """
    truth, asked = row.cells["answer"], OPTIONS[: len(row.options)]
    if row.problem:
        return f"{row.where}: {row.problem}; scored as wrong"
    if truth not in row.cells or sorted(letters) != asked:
        raise ValueError(
            f"{files.answers}: question {row.index} was asked with options {letters}, but {files.annotations} has the "
            f"answer {truth!r:.80}; give the file that was asked"
        )
    return f"{row.lost or f'{row.where}, column {truth}: is empty'}; the answer is {truth}, so it is scored as wrong"


def infer_option(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, "Z" for a refusal, None if it is not clear; can_infer_option."""
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(SEPARATORS).split()
    named = [letter for letter in choices if letter in words]
    # Quirk: the letter must first stand among the last four words.
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    # Quirk: matched without case, "the answer is a dog" names A.
    found = SENTENCE.search(text)
    return found.group(1).upper() if found and found.group(1).upper() in choices else None


def infer_text(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the one option whose text an answer contains, None if none or several are; can_infer_text."""
    # Quirks: an answer of more than twice all options' length is not searched; options are found within words.
    text = text.lower()
    if len(text) > 2 * sum(len(option) for option in choices.values()):
        return None
    found = [letter for letter, option in choices.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def infer(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer gives, or None; can_infer."""
    return infer_option(text, choices) or infer_text(text, choices)


def is_right(answer: Mapping, truth: str) -> bool:
    """Whether an answer line gives the option that was `truth` before the options were rotated: not if none was. Its
    "options" are in the order in which they were shown, "option_char" are their own letters."""
    shown = dict(zip(string.ascii_uppercase, answer["options"], strict=False))
    if truth not in answer["option_char"]:
        return False
    return infer(answer["text"], shown) == string.ascii_uppercase[list(answer["option_char"]).index(truth)]


def score_mmbench(answers: Sequence[Mapping], rows: Sequence[Mapping]) -> dict:
    """Accuracies in percent: "circular" (None without rotations), "vanilla", and by "category" and "l2-category".

    A question is circularly right if it is right in all its rotations: the rounds of --all-rounds, the rotated copies
    in the file, or both. Categories are circular where "circular" is.

    Args:
        rows: of the TSV: "index", "answer" and, where the file has them, "category" and "l2-category".

    Raises:
        ValueError: a question has not all its rotations, others have, and it may be right or wrong.
    """
    truth = {row["index"]: row["answer"] for row in rows}
    circular, vanilla, options = defaultdict(list), {}, {}
    for answer in answers:
        number = answer["question_id"]
        right = is_right(answer, truth[number])
        circular[number % ROTATION].append(right)
        options[number % ROTATION] = len(answer["options"])
        if number < ROTATION and answer["round_id"] == 0:
            vanilla[number] = right
    hits = vanilla
    rotated = any(len(rights) > 1 for rights in circular.values())
    if rotated:
        for number in vanilla:
            # One that is wrong already is wrong with any further answers.
            if all(circular[number]) and len(circular[number]) < options[number]:
                raise ValueError(f"question {number} has {len(circular[number])} of its {options[number]} rotations")
        hits = {number: all(circular[number]) for number in vanilla}
    return {
        "circular": percent(list(hits.values())) if rotated else None,
        "vanilla": percent(list(vanilla.values())),
        "questions": len(vanilla),
        "category": _by("category", rows, hits),
        "l2-category": _by("l2-category", rows, hits),
    }


def _by(field: str, rows: Sequence[Mapping], hits: Mapping[int, bool]) -> dict[str, float | None]:
    groups = defaultdict(list)
    for row in rows:
        if row["index"] in hits and row.get(field):
            groups[row[field]].append(hits[row["index"]])
    return {name: percent(groups[name]) for name in sorted(groups)}


# ---- the server's sheet


def convert(answers_file, question_file) -> bytes:
    """The table as an .xlsx, without the pictures and with the predictions; of several rounds the last one's."""
    columns, rows = read_table(question_file)
    for row in rows:
        if len(row.cells) > len(columns):
            raise ValueError(f"{question_file}, line {row.line}: {len(row.cells)} cells for {len(columns)} columns")
    _check_has_index(question_file, columns)
    table = {name: typed([row.cells[i] for row in rows]) for i, name in enumerate(columns)}
    answers = {answer["question_id"]: answer["text"] for answer in read_texts(answers_file, "text")}
    kept = [(name, column) for name, column in table.items() if name not in NOT_IN_SHEET]
    kept.insert(PREDICTION_AT, ("prediction", [answers.get(index) for index in table["index"]]))
    return workbook([[name for name, _ in kept], *zip(*(column for _, column in kept), strict=True)])


BENCHMARK = Benchmark(
    MMBENCH,
    single_pred_prompt=True,
    langs=tuple(SINGLE_PRED_PROMPT),
    scorer=Scorer(
        read_truth,
        _score,
        "mmbench/mmbench_dev_20230712.tsv",
        {"round_id": (int,), "options": [(str,)], "option_char": [(str,)]},
        table=("l2-category",),
    ),
    submission=Submission(convert, "question_file", "the .tsv that was answered"),
    published={"circular": Published(67.4, "dev, by its server")},
    editions={"_cn": {"circular": Published(60.6, "dev, by its server")}},
)
