"""Odd prompts, options and ids: each is taken, or refused with one clear line. On the host but for a few of them."""

from pathlib import Path

import numpy as np
import odd
import pytest
from small import small_model
from test_prompt import CONFIG, TOKENIZER

from llava_jax.config import GenerationDefaults
from llava_jax.conversion.prompt_template import choose_template
from llava_jax.inference.generation_options import generation_options
from llava_jax.inference.sampling import Greedy, Sample
from llava_jax.inputs.batch import as_rows, pack, pack_text
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.prompt import as_prompts, prompt_ids
from llava_jax.inputs.types import ProcessedImage

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?"},
]
OPTIONS = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1}
SAMPLE = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 1}
BATCH = {
    "input_ids": [[1, -200, 5], [1, 7, 0]],
    "attention_mask": [[1, 1, 1], [1, 1, 0]],
    "labels": [[-100, -200, 5]] * 2,
}
IDS = (-200, -100, -1, 0, 1, len(TOKENIZER) - 1, len(TOKENIZER), 32000, 2**31, 2**63, 1.0, None, True)
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint 'llava-v1.6-random' has conv_mode")


def all_cases(check, numbers):
    """`check(rng)` for each case; an error names the case."""
    for number in numbers:
        try:
            check(odd.generator(check.__name__, number))
        except BaseException as error:
            error.add_note(f"{check.__name__}, case {number}")
            raise


def changed_options(rng, options: dict) -> dict:
    """The options with one or two odd values among them."""
    return options | {rng.choice(list(options)): odd.value(rng) for _ in range(rng.randint(1, 2))}


def odd_prompt(rng):
    if rng.random() < 0.4:
        return odd.changed(rng, MESSAGES)
    texts = [odd.text(rng) for _ in range(rng.randrange(6))]
    return rng.choice((texts, "".join(texts), odd.value(rng)))


@odd.cases(120, long=3000)
def test_prompts(numbers):
    def a_prompt(rng):
        asked, sizes = odd_prompt(rng), [(rng.randint(1, 2000), rng.randint(1, 2000))] * rng.randrange(3)
        mode, answer = rng.choice((None, *conv_templates, odd.text(rng))), rng.choice((None, odd.text(rng)))
        ids: list[int] = []
        refused = odd.refusal_of(lambda: ids.extend(prompt_ids(CONFIG, TOKENIZER, asked, sizes, mode, answer)))
        assert refused or (ids.count(-200) == len(sizes) and max(ids) < len(TOKENIZER))
        odd.refusal_of(as_prompts, asked)

    all_cases(a_prompt, numbers)


@odd.cases(80, long=3000)
def test_options(numbers):
    def some_options(rng):
        def decoding(**numbers):
            options = generation_options(GenerationDefaults(), **numbers)
            assert options.output_capacity >= options.max_new_tokens > 0
            assert isinstance(options.sampling, Greedy | Sample)

        odd.refusal_of(decoding, **changed_options(rng, OPTIONS))
        sampling = Sample(**changed_options(rng, SAMPLE))
        odd.refusal_of(decoding, sampling=rng.choice((sampling, odd.value(rng))))
        odd.refusal_of(decoding, stop=rng.choice((odd.text(rng), odd.changed(rng, ["###", "</s>"]))))

    all_cases(some_options, numbers)


@odd.cases(80, long=3000)
def test_ids(numbers):
    def rows(rng):
        batch = odd.changed(rng, BATCH)
        batch = {name: batch.get(name) for name in BATCH} if isinstance(batch, dict) else BATCH
        if rng.random() < 0.5 and isinstance(batch["input_ids"], list):
            batch = dict.fromkeys(BATCH) | {"input_ids": [[1, rng.choice(IDS)], [rng.choice(IDS), 2]]}
        if rng.random() < 0.1:
            whole = rng.choice((np.int8, np.int32, np.uint16, np.uint64))
            batch = dict.fromkeys(BATCH) | {"input_ids": np.array([[1, 7, rng.randrange(99)]], whole)}
        packed = []

        def packing():
            ids, labels = as_rows(batch["input_ids"], batch["attention_mask"], batch["labels"])
            images = [ProcessedImage(np.zeros((5, 336, 336, 3), np.uint8), (600, 600))] * rng.randrange(2)
            packed.append(pack(ids, images, CONFIG, labels=labels))

        odd.refusal_of(packing)
        odd.refusal_of(lambda: packed.append(pack_text(*batch.values(), CONFIG)))
        for one in packed:
            assert one.text_ids.min() >= 0 and one.text_ids.max() < len(TOKENIZER)
            labels = np.zeros(0) if one.labels is None else one.labels
            assert np.all((labels == -100) | ((labels >= 0) & (labels < len(TOKENIZER))))

    all_cases(rows, numbers)


@odd.cases(30, long=600)
def test_chat_templates(tmp_path, numbers):
    template = "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }} {% endfor %}ASSISTANT:"

    def a_template(rng):
        file = rng.choice(("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
        content = odd.damaged(rng, template.encode())
        if file.endswith(".json"):
            content = odd.changed(rng, {"chat_template": template})
        odd.write(tmp_path / file, content)
        choice = choose_template(Path(tmp_path), odd.text(rng))
        assert choice.conv_mode in conv_templates and "\n" not in (choice.doubt or "")
        (tmp_path / file).unlink()

    all_cases(a_template, numbers)


@odd.cases(2, long=60)
def test_answers(numbers):
    """Compiles a few programs of a tiny model, at two seconds each."""
    llava, params = small_model()

    def an_answer(rng):
        asked = odd_prompt(rng)
        options = {**OPTIONS, "max_new_tokens": 4, rng.choice(list(OPTIONS)): rng.choice((0, 1, 4, 0.5, None, "x", -1))}
        said: list[str] = []
        refused = odd.refusal_of(lambda: said.append(llava.generate(params, None, asked, **options)))
        assert refused or isinstance(said[0], str)

    all_cases(an_answer, numbers)
