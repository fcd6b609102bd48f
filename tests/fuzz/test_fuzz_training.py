"""Odd and damaged training data and options: refused before the first step with a clear line, or every sample loads."""

import copy
import dataclasses

import numpy as np
import pytest
from fuzz import odd
from PIL import Image
from test_train_data import CONFIG, TOKENIZER

from llava_jax.training.checks import check_examples, check_labels
from llava_jax.training.data import load_example, load_examples, modality_lengths
from llava_jax.training.preprocess import training_tokenizer
from llava_jax.training.train_options import TrainOptions

CHECKED = training_tokenizer(TOKENIZER)
TEMPLATES = ("v1", "v0", "plain", "llama_2", "mpt", "mistral_instruct")
VALID = [
    {
        "id": "1",
        "image": "whole.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    {"id": 2, "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(folder / "whole.png")
    return folder


def refusal(function, *arguments, **keywords):
    """Like `odd.refusal_of`, for errors that list problems, a line for each kind."""
    try:
        function(*arguments, **keywords)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and len(message) < 4000 and "Traceback" not in message
        return error
    return None


def take(path, folder, template):
    """As a run does up to its first step; then every sample must load."""
    if odd.refusal_of(load_examples, path):
        return
    examples = load_examples(path)
    if refusal(check_examples, examples, folder, template):
        return
    sizes = check_examples(examples, folder, template)
    check_labels(examples, sizes, CONFIG, CHECKED, template, max_unlabelled_ratio=1.0, seed=0)
    for example in examples:
        load_example(example, folder, CONFIG, CHECKED, template)
    modality_lengths(examples)


def takes(path, folder, template, case):
    """`take`, whose failure names the case."""
    try:
        take(path, folder, template)
    except Exception as error:
        raise AssertionError(case) from error


@odd.cases(120, long=1500)
def test_changed_samples(folder, tmp_path, numbers):
    """Some 2 seconds."""
    for number in numbers:
        rng = odd.generator("sample", number)
        examples = odd.changed(rng, copy.deepcopy(VALID))
        if rng.random() < 0.5 and isinstance(examples, list):
            examples = odd.changed(rng, examples)
        template = rng.choice(TEMPLATES)
        name = rng.choice(("data.json", "data.jsonl"))
        lines = examples if isinstance(examples, list) and name.endswith("l") else [examples]
        content = "\n".join(map(odd.dump, lines)).encode()
        path = odd.write(tmp_path / name, content)
        takes(path, folder, template, f"case {number}, {template}: {examples!r:.500}")


@odd.cases(60, long=600)
def test_odd_texts(folder, tmp_path, numbers):
    """What people say, with separators, placeholders and halves of characters in it."""
    for number in numbers:
        rng = odd.generator("text", number)
        examples = copy.deepcopy(VALID)
        for example in examples:
            for turn in example["conversations"]:
                if rng.random() < 0.5:
                    turn["value"] = odd.text(rng)
                    turn["value"] += "<image>" * rng.randrange(2)
            if rng.random() < 0.3:
                example["conversations"].insert(0, {"from": "gpt", "value": odd.text(rng)})
        template = rng.choice(TEMPLATES)
        path = odd.write(tmp_path / "data.json", examples)
        takes(path, folder, template, f"case {number}, {template}: {examples!r:.500}")


@odd.cases(40, long=400)
def test_damaged_files(folder, tmp_path, numbers):
    for number in numbers:
        rng = odd.generator("file", number)
        name = rng.choice(("data.json", "data.jsonl"))
        lines = VALID if name.endswith("l") else [VALID]
        data = odd.damaged(rng, "\n".join(map(odd.dump, lines)).encode())
        takes(odd.write(tmp_path / name, data), folder, "v1", f"case {number}: {data!r:.500}")


@odd.cases(30, long=600)
def test_damaged_pictures(folder, tmp_path, numbers):
    """Found before the first step where the file is cut off; what only decoding shows is refused by name."""
    whole = (folder / "whole.png").read_bytes()
    for number in numbers:
        rng = odd.generator("picture", number)
        (tmp_path / "whole.png").write_bytes(odd.damaged(rng, whole))
        if refusal(check_examples, VALID, tmp_path, "v1") is None:
            odd.refusal_of(load_example, VALID[0], tmp_path, CONFIG, CHECKED, "v1")


@odd.cases(60, long=2000)
def test_odd_options(numbers):
    fields = [field.name for field in dataclasses.fields(TrainOptions)]
    for number in numbers:
        rng = odd.generator("options", number)
        given = dict(model_path="m", data_path="d", output_dir="o") | {rng.choice(fields): odd.value(rng)}
        error = odd.refusal_of(TrainOptions, **given)
        if error is None:
            told = dataclasses.asdict(TrainOptions(**given))
            assert all(np.isfinite(value) for value in told.values() if isinstance(value, float)), number
