"""Prompts to text: what compiles, what stops, what a seed means, and that a batch gives what its rows give alone."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small import small_model

from llava_jax.compiling import LoggedJit
from llava_jax.inference.llava import Llava
from llava_jax.inference.sampling import Sample, said_words, validate

QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def llava():
    return small_model()


def picture(width, height, seed=0):
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def compilations():
    """Names of the programs that XLA compiles while the test runs."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


class Planned(Exception):
    """What a program would have been called with."""


def test_a_hundred_image_sizes_compile_at_most_six_programs(llava, compilations, monkeypatch):
    """Twelve are answered; for the others, the first program would be called with shapes that it was warmed up for."""
    model, params = llava
    known, call = set(), LoggedJit.__call__

    def shapes(program, args):
        leaves, tree = jax.tree.flatten(args)
        return program.name, tree, tuple((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves)

    def noted(program, *args):
        known.add(shapes(program, args))
        return call(program, *args)

    def planned(program, *args):
        raise Planned(shapes(program, args))

    with monkeypatch.context() as warming:
        warming.setattr(LoggedJit, "__call__", noted)
        model.warmup(params, QUESTION, max_new_tokens=2)
    assert 1 <= len(compilations) <= 6
    compilations.clear()
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (4000, 20), (20, 4000), (336, 336), (672, 672), (1008, 336), (640, 480), (480, 640)]
    sizes += [tuple(rng.integers(1, 1500, 2)) for _ in range(100 - len(sizes))]
    answers = {model.generate(params, picture(*size), QUESTION, max_new_tokens=2) for size in sizes[:12]}
    assert len(answers) > 1  # it does look at the pictures
    assert not compilations
    monkeypatch.setattr(LoggedJit, "__call__", planned)
    for size in sizes[12:]:
        with pytest.raises(Planned) as caught:
            model.generate(params, picture(*size), QUESTION, max_new_tokens=2)
        assert caught.value.args[0] in known, size


def test_compiling_is_announced_once(llava, capsys):
    model, params = llava
    for _ in range(2):
        model.generate_tokens(params, [[1, 2, 3, 4, 5]] * 5, max_new_tokens=3)
    lines = re.findall(r"compiling .*", capsys.readouterr().err)
    assert len(lines) == 1
    assert re.fullmatch(r"compiling generate for 0 tiles, 5 x 64 positions … \d+\.\d s", lines[0])


KEPT = """
import os, sys
import jax, llava_jax
from jax.experimental.compilation_cache import compilation_cache

for _ in range(2):
    llava, params = llava_jax.load(sys.argv[1])
    llava.generate(params, None, "Hi", max_new_tokens=2)
    os.environ.pop("LLAVA_JAX_CACHE_DIR", None)  # and once more without it, as in a new process
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.clear_caches()
"""


def test_compiled_programs_are_kept_on_disk(scenes_model, tmp_path):
    """Where the environment says, or else in the user's cache. Some 4 seconds."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"LLAVA_JAX_CACHE_DIR": str(tmp_path / "a"), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", KEPT, scenes_model], env=env, check=True, capture_output=True)
    for kept in ("a", "llava_jax"):
        assert [path for path in (tmp_path / kept).rglob("*") if path.is_file()], kept


def test_options_that_are_traced_compile_nothing(llava, compilations):
    model, params = llava
    ask = dict(image=picture(50, 40), prompt=QUESTION)
    model.generate(params, **ask, max_new_tokens=9, temperature=0.7)
    before = len(compilations)
    model.generate(params, **ask, max_new_tokens=7, temperature=1.3, top_p=0.9, top_k=5, seed=4)
    assert before and len(compilations) == before


def test_a_mixed_batch_gives_each_rows_own_tokens(llava):
    llava, params = llava
    pictures = [picture(*size) for size in ((300, 900), (64, 64), (500, 120))]
    rows = [[1, 100, -200, 13, 200], [1, 500, 600, 700], [1, -200, 5, 6, -200, 7]]
    options = dict(max_new_tokens=8)
    single = [
        llava.generate_tokens(params, [rows[0]], pictures[:1], **options)[0],
        llava.generate_tokens(params, [rows[1]], **options)[0],
        llava.generate_tokens(params, [rows[2]], pictures[1:], **options)[0],
    ]
    batch = llava.generate_tokens(params, rows, pictures, **options)
    assert batch.tolist() == np.stack(single).tolist()
    for left in (False, True):
        padded, mask = np.zeros((3, 6), int), np.zeros((3, 6), int)
        for b, row in enumerate(rows):
            here = slice(6 - len(row), None) if left else slice(0, len(row))
            padded[b, here], mask[b, here] = row, 1
        got = llava.generate_tokens(params, padded, pictures, attention_mask=mask, **options)
        assert got.tolist() == batch.tolist()


def test_rows_end_at_their_own_end_of_sequence_token(llava):
    model, params = llava
    rows = [[1, 40, 50], [1, 77, 99, 310]]
    free = model.generate_tokens(params, rows, max_new_tokens=12)
    eos = int(free[0][3])
    defaults = dataclasses.replace(model.config.generation, eos_token_ids=(eos, 1023), pad_token_id=7)
    stopping = Llava(model.config.replace(generation=defaults), model.tokenizer)
    got = stopping.generate_tokens(params, rows, max_new_tokens=12)
    for row, whole in zip(got, free, strict=True):
        end = list(whole).index(eos) + 1 if eos in whole else len(whole)
        assert row.tolist() == (whole[:end].tolist() + [7] * 12)[: got.shape[1]]
    alone = stopping.generate_tokens(params, rows[:1], max_new_tokens=12)
    assert alone.shape[1] == list(free[0]).index(eos) + 1


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 5}])
def test_stream_gives_what_generate_gives(llava, options):
    model, params = llava
    options = {"max_new_tokens": 40, **options}
    pieces = list(model.stream(params, picture(90, 60), QUESTION, **options))
    whole = model.generate(params, picture(90, 60), QUESTION, **options)
    assert whole and "".join(pieces) == whole
    assert len(pieces) > 2  # and not all at the end


def test_text_comes_before_the_work_is_done(llava, programs):
    model, params = llava

    def steps():
        return [int(arg) for name, args in programs if name == "decode" for arg in args if isinstance(arg, np.int32)]

    stream = model.stream(params, None, QUESTION, max_new_tokens=40, temperature=1.5, seed=5)
    assert next(stream) and next(stream) and 0 < max(steps()) < 20
    list(stream)
    assert max(steps()) == 40


def test_stop_strings_cut_the_answer_and_end_the_work(llava):
    model, params = llava
    options = dict(max_new_tokens=64, temperature=1.5, seed=5)
    whole = model.generate(params, None, QUESTION, **options)
    stop = whole[len(whole) // 2 :][:3]
    got = model.generate(params, None, QUESTION, stop=["not there", stop], **options)
    assert got == whole[: whole.index(stop)].strip()
    assert "".join(model.stream(params, None, QUESTION, stop=[stop], **options)) == got


def test_one_stop_string_may_be_given_alone(llava):
    model, params = llava
    options = dict(max_new_tokens=12, temperature=1.5, seed=5)
    stop = model.generate(params, None, QUESTION, **options)[3:6]
    wanted = model.generate(params, None, QUESTION, stop=[stop], **options)
    assert model.generate(params, None, QUESTION, stop=stop, **options) == wanted


def test_a_temperature_that_float32_cannot_divide_by_is_greedy(llava):
    model, params = llava
    options = dict(max_new_tokens=8, stop=None)
    greedy = model.generate(params, None, QUESTION, **options)
    for temperature in (1e-40, 1e-31, 1e-45, 5e-324):
        assert model.generate(params, None, QUESTION, temperature=temperature, seed=3, **options) == greedy
    almost = [Sample(temperature, 0, repetition_penalty=1.5) for temperature in (1e-40, 1e-20)]
    assert len({model.generate(params, None, QUESTION, sampling=sample, **options) for sample in almost}) == 1
    for temperature in (1e-29, 1e-38):  # the one is divided by, the other is not: neither gives NaN
        warped = validate(Sample(temperature, repetition_penalty=100)).warp(
            np.array([9e3, -8e3, 7.0, 0]), np.array([True, False, False, False])
        )
        assert np.argmax(warped) == 0 and not np.isnan(warped).any()


def test_numpys_numbers_are_numbers(llava):
    model, params = llava
    wanted = model.generate(params, None, QUESTION, max_new_tokens=5, temperature=0.5, top_k=7, seed=3)
    numbers = dict(max_new_tokens=np.int64(5), temperature=np.float32(0.5), top_k=np.int8(7), seed=np.uint32(3))
    assert model.generate(params, None, QUESTION, **numbers) == wanted
    assert model.generate(params, None, QUESTION, **{k: np.array(v) for k, v in numbers.items()}) == wanted
    assert model.forward(params, [[1, 2]], output_hidden_states=np.True_).hidden_states is not None


def test_a_seed_gives_one_answer_alone_and_in_a_batch(llava):
    model, params = llava
    options = dict(max_new_tokens=10, temperature=1.0, seed=11)
    row = [1, 40, 50, 60]
    alone = model.generate_tokens(params, [row], **options)[0]
    batch = model.generate_tokens(params, [[1, 3], row, [1, 9, 9, 9, 9, 9]], **options)
    assert batch[1].tolist() == alone.tolist()
    assert alone.tolist() != model.generate_tokens(params, [row], **{**options, "seed": 12})[0].tolist()


@pytest.mark.parametrize(
    "method",
    [
        Sample(0.7, 50, 0.6),
        Sample(1.3, 0, 0.9),
        Sample(0.2, 5, 1.0),
        Sample(1.0, 1, 0.1),
        Sample(0.8, 0, 1.0, min_p=0.1),
        Sample(0.9, 20, 0.8, 0.05, 1.7),
    ],
)
def test_warp_is_transformers_warpers(method):
    rng = np.random.default_rng(method.top_k)
    scores = torch.tensor(rng.normal(size=(3, 400)).astype(np.float32)) * 3
    said = torch.tensor(rng.integers(0, 400, (3, 9)))
    wanted = transformers.RepetitionPenaltyLogitsProcessor(method.repetition_penalty)(said[:, :6], scores)
    wanted = transformers.TemperatureLogitsWarper(method.temperature)(None, wanted)
    if method.top_k:
        wanted = transformers.TopKLogitsWarper(method.top_k)(None, wanted)
    if method.top_p < 1:
        wanted = transformers.TopPLogitsWarper(method.top_p)(None, wanted)
    if method.min_p:
        wanted = transformers.MinPLogitsWarper(method.min_p)(None, wanted)
    got = np.asarray(validate(method).warp(scores.numpy(), said_words(said.numpy()[:, :6], 400)))
    assert (np.isinf(got) == np.isinf(wanted.numpy())).all()
    kept = ~np.isinf(got)
    assert np.allclose(got[kept], wanted.numpy()[kept], atol=1e-5)


def test_sampling_follows_the_distribution(llava):
    model, params = llava
    logits = model.forward(params, [[1, 40, 50]]).logits[0, -1]
    wanted = np.asarray(jax.nn.softmax(logits))
    top = int(np.argmax(wanted))
    draws = [
        model.generate_tokens(params, [[1, 40, 50]], max_new_tokens=1, temperature=1.0, top_k=0, seed=s)[0, 0]
        for s in range(400)
    ]
    rate, spread = np.mean(np.array(draws) == top), np.sqrt(wanted[top] * (1 - wanted[top]) / 400)
    assert abs(rate - wanted[top]) < 5 * spread + 1e-3
    assert len(set(draws)) > 50


def test_images_in_every_form_give_one_answer(llava, tmp_path):
    model, params = llava
    image = picture(64, 48)
    path = tmp_path / "picture.png"
    image.save(path)
    forms = [
        image,
        path,
        str(path),
        path.read_bytes(),
        np.asarray(image),
        [image],
        jax.numpy.asarray(np.asarray(image)),
    ]
    answers = {model.generate(params, form, QUESTION, max_new_tokens=6) for form in forms}
    assert len(answers) == 1


def test_turns_images_and_placeholders_become_the_references_prompt(llava):
    model, _ = llava
    roles = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    roles += "detailed, and polite answers to the human's questions. "

    def prompt(*args):
        return model.conversation(*args).get_prompt()

    assert prompt("Hi", 0) == roles + "USER: Hi ASSISTANT:"
    assert prompt("Hi", 2) == roles + "USER: <image>\n<image>\nHi ASSISTANT:"
    assert prompt("See <image> here", 1) == roles + "USER: See <image> here ASSISTANT:"
    assert prompt(["Hi", "Yes?", "Why?"], 1) == roles + "USER: <image>\nHi ASSISTANT: Yes?</s>USER: Why? ASSISTANT:"
    assert (
        prompt(["Hi", "Yes?", "And <image>?"], 1) == roles + "USER: Hi ASSISTANT: Yes?</s>USER: And <image>? ASSISTANT:"
    )
    assert prompt("Hi", 1, "llava_llama_2").startswith("[INST] <<SYS>>")
    conversation = model.conversation("Hi", 0)
    assert model.conversation(conversation) is conversation


@pytest.mark.filterwarnings("ignore:the checkpoint ")
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt="<image> or <image>?"), "has 2 <image> but there are 1 images"),
        (dict(prompt=["one", "two"]), "got 2 turns"),
        (dict(prompt=["one", "two", "<image> <image>"]), "2 <image> in later turns, but there are 1 images"),
        (dict(prompt="word " * 5000), "tokenizer_model_max_length=4096; shorten it"),
        (dict(image="nowhere.jpg"), "nowhere.jpg.*no such file"),
        (dict(image=b"not a picture"), "13 bytes is not a picture"),
        (dict(image=np.zeros((3, 3), np.float32)), "uint8 array .* got ndarray of dtype float32"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=10**9), "max_new_tokens=1000000000 must be a whole number from 1 to"),
        (dict(max_new_tokens=2.0), r"max_new_tokens=2\.0 must be a whole number"),
        (dict(max_new_tokens=True), "max_new_tokens=True must be a whole number"),
        (dict(top_k=2**31), "top_k=2147483648 must be a whole number from 0 to 2147483647"),
        (dict(seed=-1), "seed=-1 must be a whole number from 0"),
        (dict(seed=2**32), "seed=4294967296 must be a whole number from 0 to 4294967295"),
        (dict(seed=0.5), "seed=0.5 must be a whole number"),
        (dict(temperature=float("nan")), "temperature=nan must be a finite number"),
        (dict(temperature=1.0, top_p=float("inf")), "top_p=inf must be a finite number"),
        (dict(temperature="0.2"), "temperature='0.2' must be a finite number"),
        (dict(sampling=Sample(min_p=float("nan"))), "min_p=nan must be a finite number"),
        (dict(sampling="greedy"), "sampling='greedy' must be a Greedy or a Sample"),
        (dict(stop=["a", ""]), "stop: an empty text would end every answer"),
        (dict(stop=3), "stop: expected a text, or a list of texts, got int"),
        (dict(stop=["a", 3]), r"stop\[1\]: expected a text, got int"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=1.0, top_p=1.5), "top_p=1.5"),
        (dict(temperature=1.0, top_k=-2), "top_k=-2"),
        (dict(sampling=Sample(min_p=2.0)), "min_p=2.0"),
        (dict(sampling=Sample(repetition_penalty=0)), "repetition_penalty=0"),
        (dict(sampling=Sample(), temperature=0.5), "two ways to say it"),
        (dict(conv_mode="vicuna"), "conv_mode='vicuna' is not known; use one of"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_work(llava, compilations, options, message):
    model, params = llava
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.stream(params, **{"image": picture(10, 10), "prompt": QUESTION, **options})
    assert not compilations


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(input_ids=[[1, -200]], images=[]), "got 0 for 1 <image> placeholders"),
        (dict(input_ids=[[1, -200]]), "none given, but input_ids have <image> placeholders"),
        (dict(input_ids=[[1, -200, 5], [1, 2, 3]], images=[picture(9, 9)] * 3), "got 3 for 1"),
        (dict(input_ids=[1, 2, 3]), r"expected \[B, L\]"),
        (dict(input_ids=[[1, 2], [1, 2, 3]]), "different lengths"),
        (dict(input_ids=[[1, 2, 3]], labels=[[1, 2]]), "labels: its rows"),
        (dict(input_ids=[[1, -200]], images=[picture(9, 9)], image_sizes=[(9, 9), (8, 8)]), "image_sizes: got 2 for 1"),
        (dict(input_ids=[[1, -200]], images=[picture(9, 9)], image_sizes=[(900, 900)]), "asks for 5 tiles"),
        (dict(input_ids=[[1, -200]], images=[picture(9, 9)], image_sizes=[(0, 9)]), "image_sizes=0 must be a whole"),
        (dict(input_ids=[[1, 2], [3, 10**6]]), "input_ids: row 1, position 1: 1000000 is not in the embedding table"),
        (dict(input_ids=[[-1, 2]]), r"row 0, position 0: -1 is not .* which has \d+ rows .* nor is it -200, an image"),
        (dict(input_ids=[[2**64 - 200]]), "row 0, position 0: .* is not in the embedding table"),
        (dict(input_ids=[[1, -100, 2]], images=[]), "row 0, position 1: -100 is not"),
        (
            dict(input_ids=[[1, 2]], labels=[[-100, 10**6]]),
            "labels: row 0, position 1: 1000000 is not .* -100, no label",
        ),
        (dict(input_ids=[[1, 2]], labels=[[-100, -200]]), "labels: row 0, position 1: -200 is not"),
        (dict(input_ids=[[1.5, 2]]), r"input_ids: expected \[B, L\]"),
        (dict(input_ids=[["1", "2"]]), r"input_ids: expected \[B, L\]"),
        (dict(input_ids=7), r"input_ids: expected \[B, L\]"),
        (dict(input_ids=[[1, 2]], labels=[[1.0, 2.0]]), r"labels: expected \[B, L\]"),
        (dict(input_ids=[[1, 2]], attention_mask=[[1]]), "attention_mask: its rows"),
        (dict(input_ids=[[1, 2]], attention_mask=[["x", "y"]]), r"attention_mask: expected \[B, L\]"),
    ],
)
def test_forward_names_what_does_not_fit(llava, arguments, message):
    model, params = llava
    with pytest.raises(ValueError, match=message):
        model.forward(params, **arguments)
