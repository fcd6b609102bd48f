"""Training data on the host: the file, the checks, the order of the samples, one sample, and the loader."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inputs import workers
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.image import process_images
from llava_jax.inputs.tokenizer import LlamaTokenizer
from llava_jax.training import checks
from llava_jax.training.checks import check_examples
from llava_jax.training.data import (
    Loaded,
    get_modality_length_grouped_indices,
    load_example,
    load_examples,
    modality_lengths,
    sample_order,
)
from llava_jax.training.loader import Loader
from llava_jax.training.preprocess import preprocess, preprocess_multimodal, training_tokenizer

HERE = Path(__file__).parent / "golden"
GOLDEN = dict(np.load(HERE / "preprocess.npz"))
PROTO = (HERE / "tokenizers" / "llama" / "tokenizer.model").read_bytes()
TOKENIZER = LlamaTokenizer(PROTO, legacy=False).add_tokens(["<s>", "</s>", "<unk>"])
CONFIG = LlavaConfig(
    vision=VisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14
    ),
    mm_hidden_size=8,
    image_aspect_ratio="anyres",
    mm_patch_merge_type="spatial_unpad",
    image_grid_pinpoints=((28, 56), (56, 28)),
    tokenizer_model_max_length=256,
)


def sample(*values, image=None, first="human", **keys):
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    turns = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
    return {**({} if image is None else {"image": image}), "conversations": turns, **keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes: 0.png … 5.png, and sub/6.png."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"{i}.png" for i in range(6)), "sub/6.png"]):
        pixels = rng.integers(0, 256, (20 + 9 * i, 60 - 7 * i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def examples():
    """21 samples, two thirds with an image, of different lengths."""
    return [
        sample(
            ("<image>\n" if i % 3 else "") + "What? " * (1 + i % 5),
            f"Answer {i}.",
            image=f"{i % 6}.png" if i % 3 else None,
            id=f"s{i}",
        )
        for i in range(21)
    ]


def loaded_by(examples, folder, steps, start_step=0, tokenizer=TOKENIZER, template="v1", **keys):
    keys = dict(batch_size=4, seed=1) | keys
    with Loader(examples, folder, CONFIG, tokenizer, template, start_step=start_step, **keys) as batches:
        return [batch for batch, _ in zip(batches, range(steps), strict=False)]


def same(a: Loaded, b: Loaded) -> bool:
    pairs = [(a.ids, b.ids), (a.labels, b.labels)]
    pairs += [(x.tiles, y.tiles) for x, y in zip(a.images, b.images, strict=True)]
    return all(np.array_equal(x, y) for x, y in pairs) and (sizes(a), a.mismatch) == (sizes(b), b.mismatch)


def sizes(loaded: Loaded) -> list[tuple[int, int]]:
    return [image.size for image in loaded.images]


# ---- the file


def test_json_and_jsonl(tmp_path, examples):
    (tmp_path / "a.json").write_text(json.dumps(examples))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n\n")
    assert load_examples(tmp_path / "a.json") == load_examples(str(tmp_path / "a.jsonl")) == examples


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[{", "a.json': not JSON"),
        ("a.jsonl", '{}\n{"a"', "a.jsonl', line 2: not JSON"),
        ("a.json", "{}", "expected a list of samples, got dict"),
        ("a.json", "[]", "expected a list of samples, got an empty one"),
    ],
)
def test_a_file_that_is_not_data(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none.json': no such file"):
        load_examples(tmp_path / "none.json")


# ---- checks


def test_good_samples_pass(folder, examples):
    check_examples(examples, folder, "v1")
    more = [
        sample("<image>\n<image>\nA?", "B", image="0.png"),  # one image: one placeholder, as in the reference
        sample("<image> <image>", "See <image>", image=["0.png", "sub/6.png", str(folder / "1.png")]),
        sample("Is <image> a tag?", "B", image=None),  # text, as in the reference
        sample("B", "A?", "B", first="gpt"),
    ]
    check_examples(more, folder, "v1")
    check_examples([sample("<image>\n<image>x", "A cat.", image="0.png")], folder, "plain")
    check_examples([sample("A", "B")], "", "llama_2")


GOOD = sample("A", "B", id="good")
CASES = {
    "missing image file: 2: id='x' (number 1) 'none.png', id='y' (number 2) 'sub/none.png'": (
        "v1",
        [
            GOOD,
            sample("<image>", "B", image="none.png", id="x"),
            sample("<image>", "B", image=["sub/none.png"], id="y"),
        ],
    ),
    "an image but no <image>: 1: id=7 (number 0)": ("v1", [sample("A", "B", image="0.png", id=7)]),
    "the number of <image> is not that of the images: 3": (
        "v1",
        [
            sample("<image>", "B", "<image>", "B", image="0.png"),
            sample("<image>", "B", image=["0.png", "1.png"]),
            sample("<image><image><image>", "B", image=["0.png", "1.png"]),
        ],
    ),
    "<image> but no image: 2": ("v1", [sample("<image>\nA", "B"), sample("A\n<image> ", "B")]),
    "unknown role 'bot' (known: human, gpt): 1": ("v0", [{"conversations": [{"from": "bot", "value": "A"}]}]),
    "empty conversation: 3": ("v1", [sample(), sample(" ", ""), GOOD, sample("")]),
    "human and gpt do not alternate: 1": ("mpt", [{"conversations": [*GOOD["conversations"][:1]] * 2}]),
    "not an image and two turns, the first with <image>, as a plain template takes them: 3": (
        "plain",
        [
            GOOD,
            sample("<image>", "B", "C", "D", image="0.png"),
            sample("A", "<image>", image="0.png"),
        ],
    ),
    "the number of <image> is not that of the images: 1: id='two'": (
        "plain",
        [sample("<image><image>", "B", image=["0.png", "1.png"], id="two")],  # plain shows one
    ),
    "the first question is empty, which the LLAMA_2 style does not take: 1": ("llama_2", [sample("", "B")]),
    "not {id, image, conversations: [{from, value}, …]}: 5: number 0, id='a' (number 1), id=None (number 2), …": (
        "v1",
        [
            "text",
            {"id": "a"},
            sample("A", "B", image=3),
            {"conversations": [{"from": "human"}]},
            {"conversations": {}},
        ],
    ),
}


@pytest.mark.parametrize("said", CASES)
def test_problems_are_counted_and_named(folder, said):
    template, samples = CASES[said]
    with pytest.raises(ValueError) as error:
        check_examples(samples, folder, template)
    assert said in str(error.value) and str(error.value).count("\n") == 1
    assert f"out of {len(samples)} " in str(error.value)


def test_all_problems_come_at_once(folder):
    samples = [s for template, samples in CASES.values() if template == "v1" for s in samples]
    with pytest.raises(ValueError) as error:
        check_examples(samples * 2, folder, "v1")
    lines = str(error.value).splitlines()
    assert len(lines) == 7 and f"out of {2 * len(samples)} " in lines[0]
    want = (
        f"  missing image file: 4: id='x' (number 1) 'none.png', id='x' (number {len(samples) + 1}) 'none.png', id='y'"
    )
    assert any(line.startswith(want) for line in lines)


def test_each_picture_is_opened_once(folder, monkeypatch):
    opened, image_size = [], checks.image_size
    monkeypatch.setattr(checks, "image_size", lambda source: opened.append(source) or image_size(source))
    samples = [sample("<image>", "B", image=f"{i % 6}.png") for i in range(50)]
    sizes = check_examples([*samples, sample("<image>", "B", image="sub/6.png")], folder, "v1")
    assert len(opened) == len(sizes) == 7 and sizes["3.png"] == (39, 47)


def test_folder_and_template_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image_folder '.*none': no such directory"):
        check_examples([sample("<image>", "B", image="0.png")], tmp_path / "none", "v1")
    with pytest.raises(ValueError, match="'llava_llama_3': LLaVA does not train with the LLAMA_3 style"):
        check_examples([GOOD], folder, "llava_llama_3")


# ---- the order


class Recorded:
    """Stands for a NumPy Generator and gives the permutations that torch gave."""

    def __init__(self, permutations):
        self.permutations = list(permutations)

    def permutation(self, n):
        assert len(self.permutations[0]) == n
        return self.permutations.pop(0)


def test_grouped_orders_equal_the_references():
    orders = json.loads(str(GOLDEN["inputs"]))["orders"]
    drawn = json.loads(str(GOLDEN["orders/drawn"]))
    permutations, results, sizes = GOLDEN["orders/permutations"], GOLDEN["orders/results"], []
    for order, counts in zip(orders, drawn, strict=True):
        rng = Recorded(np.split(permutations, np.cumsum(counts))[: len(counts)])
        want, n = results[: len(order["lengths"])].tolist(), len(order["lengths"])
        assert get_modality_length_grouped_indices(**order, rng=rng) == want and not rng.permutations
        permutations, results = permutations[sum(counts) :], results[n:]
        sizes.append(len(counts))
    assert {1, 3} == set(sizes) and not len(results)


def test_modality_lengths_and_a_sample_without_words():
    assert modality_lengths([sample("<image>\nA b", "c", image="x"), sample("A b", " c d\n")]) == [4, -4]
    with pytest.raises(ValueError, match="sample number 1 has no words"):
        get_modality_length_grouped_indices([3, 0], 1, 1, np.random.default_rng(0))


def test_order_depends_on_seed_and_epoch_alone():
    lengths = [(-1) ** i * (1 + i % 13) for i in range(50)]
    for keys in ({}, dict(lengths=lengths, batch_size=2, world_size=3)):
        orders = [sample_order(50, seed=seed, epoch=epoch, **keys) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
        assert all(sorted(order) == list(range(50)) for order in orders)
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert orders[1] == sample_order(50, seed=0, epoch=1, **keys)
        pure = [len({lengths[i] > 0 for i in orders[0][start : start + 6]}) == 1 for start in range(0, 48, 6)]
        assert all(pure) == bool(keys)


# ---- one sample


@pytest.mark.parametrize("aspect", ["anyres", "pad", "square"])
def test_a_sample_with_an_image(folder, aspect):
    config = CONFIG.replace(image_aspect_ratio=aspect)
    example = sample("What is it? <image>", "A cat.", image="3.png")
    got = load_example(example, folder, config, training_tokenizer(TOKENIZER), "v1")
    turns = preprocess_multimodal(example["conversations"], conv_templates["v1"])
    want = preprocess(turns, training_tokenizer(TOKENIZER), conv_templates["v1"], has_image=True, max_length=256)
    assert np.array_equal(got.ids, want.ids) and np.array_equal(got.labels, want.labels) and got.mismatch is None
    with Image.open(folder / "3.png") as image:
        assert sizes(got) == [image.size] == [(39, 47)]
        assert np.array_equal(got.images[0].tiles, process_images([image], config)[0])
    tiles = got.images[0].tiles
    assert tiles.shape == (3 if aspect == "anyres" else 1, 28, 28, 3) and tiles.dtype == np.uint8


def test_several_images_none_and_wrapped(folder):
    tokenizer = training_tokenizer(TOKENIZER.add_tokens(["<im_start>", "<im_end>"]))
    example = sample("Compare <image> and <image>.", "No.", image=["0.png", "1.png"])
    config = CONFIG.replace(mm_use_im_start_end=True)
    got = load_example(example, folder, config, tokenizer, "v1")
    assert np.sum(got.ids == IMAGE_TOKEN_INDEX) == np.sum(got.ids == 32000) == np.sum(got.ids == 32001) == 2
    assert sizes(got) == [(60, 20), (53, 29)]
    text = load_example(sample("<image>" * 3, "no " * 300, image=None), folder, config, tokenizer, "v1")
    assert len(text.ids) == 256 and IMAGE_TOKEN_INDEX not in text.ids and text.images == []


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    example = sample("<image>", "B", image="turned.jpg")
    assert sizes(load_example(example, tmp_path, CONFIG, training_tokenizer(TOKENIZER), "v1")) == [(40, 20)]


def test_placeholders_that_do_not_match(folder):
    example = sample("<image>", "B", "<image>", "C", image="0.png")
    with pytest.raises(ValueError, match="2 <image> for 1 images"):
        load_example(example, folder, CONFIG, training_tokenizer(TOKENIZER), "v1")


# ---- the loader


def numbers(batches):
    """Which samples came, told by their answers' last number."""
    tokenizer = training_tokenizer(TOKENIZER)
    texts = [[tokenizer.decode(s.labels[s.labels >= 0]) for s in batch] for batch in batches]
    return [[int(text.split()[-1].rstrip(".")) for text in batch] for batch in texts]


def flat(batches):
    return [number for batch in batches for number in batch]


def test_epochs_follow_each_other_and_end_short(folder, examples):
    got = numbers(loaded_by(examples, folder, 13))
    assert [len(batch) for batch in got] == [4, 4, 4, 4, 4, 1] * 2 + [4]
    for epoch in (0, 1):
        assert flat(got[6 * epoch : 6 * epoch + 6]) == sample_order(21, seed=1, epoch=epoch)


def test_grouping(folder, examples):
    keys = dict(group_by_modality_length=True, num_devices=2, gradient_accumulation_steps=2)
    got = numbers(loaded_by(examples, folder, 6, **keys))
    lengths = modality_lengths(examples)
    assert flat(got) == sample_order(21, seed=1, epoch=0, lengths=lengths, batch_size=2, world_size=4)
    assert got != numbers(loaded_by(examples, folder, 6))


def test_workers_and_resumption_give_the_same(folder, examples):
    want = loaded_by(examples, folder, 14)
    for start in (5, 6, 8):
        again = loaded_by(examples, folder, 14 - start, start_step=start)
        assert numbers(again) == numbers(want[start:])
    from_workers = loaded_by(examples, folder, 9, start_step=5, num_workers=2)
    assert len(from_workers) == 9
    for batch, other in zip(from_workers, want[5:], strict=True):
        assert len(batch) == len(other) and all(map(same, batch, other))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_fails_is_named(folder, examples, num_workers):
    (folder / "broken.png").write_bytes(b"no picture")
    broken = [*examples[:5], sample("<image>", "B", image="broken.png", id="bad")]
    with pytest.raises(
        ValueError, match=r"sample id='bad' \(number 5\): ValueError: image '.*broken.png' is not a pic"
    ):
        loaded_by(broken, folder, 2, num_workers=num_workers)


def test_workers_work_ahead_but_not_far(folder, examples, monkeypatch):
    """Without processes: what is asked for is counted, the answers are the sample numbers."""
    asked = []

    class Worker:
        def __init__(self, load):
            self.process = self.pipe = self

        def ask(self, task):
            _, number = task
            asked.append(number)
            return Loaded(np.array([number]), np.array([number]), [], None)

        kill = stop = lambda self: None

        def is_alive(self):
            return True

    monkeypatch.setattr(workers, "Worker", Worker)
    with Loader(examples, folder, CONFIG, TOKENIZER, "v1", batch_size=4, seed=1, num_workers=5) as batches:
        order = sample_order(21, seed=1, epoch=0) + sample_order(21, seed=1, epoch=1)
        got = []
        for step, batch in enumerate(batches):
            got += [int(s.ids[0]) for s in batch]
            deadline = time.monotonic() + 60
            while len(asked) < 16 + 4 * step and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(asked) == 16 + 4 * step  # this step and three more: at least two samples for each worker
            if step == 1:
                break
    assert got == order[:8] and sorted(asked) == sorted(order[:20])


class Deadly:
    """An image folder that kills the process that looks into it, unless it is this one."""

    def __init__(self):
        self.pid = os.getpid()

    def __fspath__(self):
        if os.getpid() != self.pid:
            os.kill(os.getpid(), signal.SIGKILL)
        return "nowhere"


def test_a_worker_that_is_killed(folder, examples):
    with Loader(examples, folder, CONFIG, TOKENIZER, "v1", batch_size=4, seed=1, num_workers=1) as batches:
        steps = iter(batches)
        next(steps)
        for number in (signal.SIGINT, signal.SIGTERM):  # what a preemption sends to everybody
            os.kill(batches.workers.pids[0], number)
        next(steps)
    with Loader(examples, Deadly(), CONFIG, TOKENIZER, "v1", batch_size=4, seed=1, num_workers=1) as batches:
        with pytest.raises(RuntimeError, match="a data worker died: killed, perhaps for memory"):
            for _ in zip(range(9), batches, strict=False):
                pass


KILLED = """
import weakref  # made before multiprocessing is imported, its end comes after: nothing may hang on that
weakref.finalize(weakref, int)
import json, sys, time
sys.path.insert(0, sys.argv[1])
import test_train_data as t
if __name__ == "__main__":
    examples = json.loads(sys.argv[3])
    loader = t.Loader(examples, sys.argv[2], t.CONFIG, t.TOKENIZER, "v1", batch_size=4, seed=1, num_workers=2)
    next(iter(loader))
    print("loading", *loader.workers.pids, flush=True)
    time.sleep(60 * (sys.argv[4] == "wait"))
"""


@pytest.mark.parametrize("end", ["wait", "exit"])
def test_workers_do_not_outlive_the_parent(folder, examples, tmp_path, end):
    """Killed, or at its end without having closed the loader. The pipe ends when the last process that has it does."""
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent), str(folder)]
    with subprocess.Popen([*command, json.dumps(examples), end], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline().split()
            assert line[0] == "loading" and len(line) == 3
            if end == "wait":
                process.kill()
            rest, _ = process.communicate(timeout=30)
            assert not rest and process.returncode == (-signal.SIGKILL if end == "wait" else 0)
        finally:
            for pid in map(int, line[1:]):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


def test_too_many_mismatches_stop(folder):
    good, bad = sample("A", "B", id="good"), sample("A", "B</s>C", id="bad")
    tokenizer = replace(TOKENIZER, legacy=True)
    with pytest.raises(
        ValueError, match=r"mismatch in 4 of the first 4 samples.*\(id='bad' \(number \d\): \d+ vs. \d+"
    ):
        loaded_by([bad] * 5, folder, 3, tokenizer=tokenizer)
    assert len(loaded_by([bad, *[good] * 3], folder, 40)) == 40  # a quarter, but too few seen to tell
    message = r"mismatch in 50 of the first 200 samples.*template 'v1' and legacy=False.*look at --version"
    with pytest.raises(ValueError, match=message):
        loaded_by([bad, *[good] * 3], folder, 60)
    two_turns = [sample("A", "B", "C", "D")] * 4  # any mismatch with a tokenizer that is not the slow one
    assert len(loaded_by(two_turns, folder, 3, tokenizer=replace(TOKENIZER, fast=True))) == 3
    loaded = loaded_by([bad, *[good] * 200], folder, 60)
    assert sum(s.mismatch is not None for batch in loaded for s in batch) == 1
