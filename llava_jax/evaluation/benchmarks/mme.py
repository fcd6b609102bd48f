"""MME: accuracy and accuracy+ of its 14 subtasks. LLaVA's convert_answer_to_mme.py, then MME's calculation.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etils import epath

from llava_jax.evaluation.benchmarks.benchmark import Benchmark, Files, Published, Scorer, Submission
from llava_jax.evaluation.benchmarks.common import check_ids, question_ids, read_texts
from llava_jax.evaluation.questions import LOADER
from llava_jax.inputs.text import check_text
from llava_jax.records import naming, read_file

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
SHORT = "Answer the question using a single word or phrase."
YES_OR_NO = " Please answer yes or no."

Key = tuple[str, str, str]  # subtask, the image's text file, the question as that file has it


def read_truth(folder) -> dict[Key, str]:
    """What MME_Benchmark_release_version says about its subtasks; get_gt of convert_answer_to_mme.py."""
    folder, truth = epath.Path(folder), {}
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --annotations is MME_Benchmark_release_version")
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        texts = category / "questions_answers_YN" if (category / "images").exists() else category
        for path in sorted(texts.glob("*.txt")):
            try:
                lines = read_file(path).decode("utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 ({error})") from error
            for line in filter(str.strip, lines):
                question, _, answer = line.strip().rpartition("\t")
                if not question or answer.lower() not in ("yes", "no"):
                    raise ValueError(f"{path}: {line!r:.200} is not a question, a tab and Yes or No")
                truth[category.name, path.name, question] = answer
    return truth


def _score(answers: Sequence[Mapping], truth: Mapping[Key, str], files: Files) -> dict:
    if not all(isinstance(number, str) and "/" in number for number in question_ids(answers)):
        raise ValueError(
            f"{files.answers}: MME's ids are like existence/000000006040.jpg, these are not; is it MME's file?"
        )
    keys = [truth_key(answer, truth) for answer in answers]
    check_ids(list(set(keys)), truth, files.answers, files.annotations)
    for category in {category for category, _, _ in keys}:
        images = [image for key_category, image, _ in keys if key_category == category]
        if images[::2] != images[1::2] or len(set(images)) * 2 != len(images):
            raise ValueError(f"{files.answers}: each image of {category} needs two answers, one after the other")
    with naming(files.annotations):
        return score_mme(answers, truth)


def said(text: str) -> str:
    """yes, no or other, from the first four characters, in lower case; calculation.py's parse_pred_ans."""
    # Quirks: "not sure" and "nothing" are no; "  yes" is other; an answer of several lines, which breaks the
    # reference's file of results, is read by its beginning.
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def truth_key(answer: Mapping, truth: Mapping[Key, str]) -> Key:
    """Where the true answer of an answer line stands in `truth` (it may be missing); convert_answer_to_mme.py."""
    parts = str(answer["question_id"]).split("/")
    category = parts[0]
    file, question = parts[-1].split(".")[0] + ".txt", answer["prompt"]
    if SHORT in question:
        question = question.replace(SHORT, "").strip()
    if YES_OR_NO.strip() not in question:
        question += YES_OR_NO
        if (category, file, question) not in truth:
            question = question.replace(YES_OR_NO, " " + YES_OR_NO)  # some of MME's files have two spaces
    return category, file, question


def score_mme(answers: Sequence[Mapping], truth: Mapping[Key, str]) -> dict:
    """Sums over subtasks, "perception" and "cognition", and "subtasks", each one's {score, acc, acc_plus, other}.

    A subtask's score is acc + acc_plus, each in percent. Nothing is rounded, as in calculation.py. Answers are in the
    order of the questions: two of each image, one after the other.

    Raises:
        ValueError: a subtask has no answers or an odd number of them (the reference: no such file, AssertionError).
    """
    pairs: dict[str, list[tuple[str, str]]] = {category: [] for category in PERCEPTION + COGNITION}
    for answer in answers:
        key = truth_key(answer, truth)
        if key[0] in pairs:
            pairs[key[0]].append((truth[key].lower(), said(answer["text"])))
    scores = {category: _subtask(category, found) for category, found in pairs.items()}
    return {
        "perception": sum(scores[category]["score"] for category in PERCEPTION),
        "cognition": sum(scores[category]["score"] for category in COGNITION),
        "subtasks": scores,
    }


def _subtask(category: str, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    if not pairs or len(pairs) % 2:
        raise ValueError(f"MME's {category} has {len(pairs)} answers; there must be two of each of its images")
    right = [true == answer for true, answer in pairs]
    # Quirk: the two questions of an image are two answers that follow one another, whatever their images.
    both = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    acc, acc_plus = sum(right) / len(right) * 100, sum(both) / len(both) * 100
    other = sum(answer == "other" for _, answer in pairs)
    return {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus, "other": other}


def convert(answers_file, annotations) -> dict[str, bytes]:
    """{category.txt: lines of image's .txt, question, truth, answer}, as MME's calculation.py takes them."""
    truth = read_truth(annotations)
    lines: dict[str, str] = {}
    for n, answer in enumerate(read_texts(answers_file, "prompt", "text"), 1):
        check_text(answer["text"], f"{answers_file}, line {n}: the text")
        key = category, file, question = truth_key(answer, truth)
        if key not in truth:
            raise ValueError(
                f"{answers_file}, line {n}: {annotations} has no question {answer['prompt']!r:.200} in "
                f"{category:.80}/{file:.80}; is it the same release of MME?"
            )
        line = "\t".join((file, question, truth[key], answer["text"])) + "\n"
        lines[f"{category}.txt"] = lines.get(f"{category}.txt", "") + line
    return {name: text.encode() for name, text in lines.items()}


BENCHMARK = Benchmark(
    LOADER,
    scorer=Scorer(
        lambda files: read_truth(files.annotations),
        _score,
        "the folder MME/MME_Benchmark_release_version",
        {"prompt": (str,)},
        table=("subtasks",),
    ),
    submission=Submission(convert, "annotations", "the folder MME_Benchmark_release_version"),
    published={
        "perception": Published(1519, "the whole benchmark"),
        "cognition": Published(332, "the whole benchmark"),
    },
)
