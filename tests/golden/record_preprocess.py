"""Records preprocess.npz: ids and labels of the reference's training preprocessing, and its grouped orders of samples.

Runs where the original LLaVA is installed (setup.sh makes such an environment):

    python tests/golden/record_preprocess.py

It reads tokenizers/*/tokenizer.model and writes preprocess.npz, both beside this file. The keys:

    inputs                JSON: settings, samples (as in LLaVA's data files, with "image" or not), templates (name → the
                          first name of the same template), orders (lengths, batch size, world size)
    multimodal            JSON: {template: {sample's id: the values of its turns after `preprocess_multimodal`}}
    {setting}/ids         ids of all the samples of all the first templates, one after another; /ends: where each ends
    {setting}/labelled    bits, big-endian: which positions have a label (always their own id)
    {setting}/outcome     JSON: for each of them null, [x, y] of "tokenization mismatch: x vs. y.", or an exception's
                          name (it then has no ids)
    orders/permutations   what `torch.randperm` gave for all orders, one after another; /drawn: JSON, their lengths
    orders/results        the orders of samples, one after another

A setting takes every n-th sample only (`every`), to keep the file small.
"""

import contextlib
import copy
import io
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from llava import conversation
from llava.train import llava_trainer, train
from transformers import LlamaTokenizer

HERE = Path(__file__).parent
SETTINGS = {
    "new": dict(legacy=False),
    "legacy": dict(legacy=True),
    "mistral": dict(model="mistral", legacy=True, every=3),
    "start_end": dict(legacy=False, mm_use_im_start_end=True, every=4),
    # <|im_start|> and <|im_end|> are tokens, as in the 34B's tokenizer, which has no BOS either
    "chatml": dict(legacy=True, chatml=True, add_bos_token=False, every=3),
    "chatml_new": dict(legacy=False, chatml=True, add_bos_token=False, every=4),
    "chatml_bos": dict(legacy=True, chatml=True),
    "short": dict(legacy=False, max_length=192, every=2),
    "short_legacy": dict(legacy=True, max_length=192, every=3),
}
DEFAULTS = dict(model="llama", max_length=2048, mm_use_im_start_end=False, chatml=False, add_bos_token=True, every=1)
WORDS = (  # parted by bars
    "Hello|a cat|the|What is it?|\n|\n\n| |  |\t|.|é|你好|🦙|<image>|</s>|<s>|<unk>|ASSISTANT:| ASSISTANT: |USER:|"
    "[INST]| [/INST] |<|im_end|>|### |Human: |Received.|▁|1234|don't|<Image>|</Image>|\ufeff|"
)


def turns(*values, first="human"):
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def chosen_samples():
    question, answer = "What is shown in this image?", "It is a cat."
    for image, front in ((False, ""), (True, "<image>\n")):
        for count in range(1, 6):
            values = [
                (question, answer, "What colour is it?", "Black.", "And now?", "Still\nblack.")[i % 6]
                for i in range(2 * count)
            ]
            yield image, turns(front + values[0], *values[1:])
        yield image, turns(front + question)  # no answer
        yield image, turns(front + question, answer, "And?")
        yield image, turns(front + question, "")
        yield image, turns(front + question, answer, "", "Yes.")
        yield image, turns(front + question, answer, "And?", "", "So?", "Yes.")
        yield image, turns(front, answer)
        yield image, turns("", "")
        yield image, turns(answer, front + question, answer, first="gpt")
        yield image, turns(answer, first="gpt")
        yield image, turns(front + "  Déjà vu — 你好 🦙\t\tok  \n", "\n x \n\n", " y ", "z\n")
        yield image, turns(front + "a", " b")
        yield image, turns(front + "a ", "b ")
        yield image, turns(front + "a\n", "\nb\n")
        yield image, turns(front + "Write </s> now", "</s>", "b", "c")
        yield image, turns(front + "a", "b</s>c", "d", "e")
        yield image, turns(front + "Say ASSISTANT: x", "USER: ASSISTANT: y", "d", "e")
        yield image, turns(front + "Say [INST] x [/INST] y", "[/INST] z", "d", "e")
        yield image, turns(front + "<|im_start|>user", "<|im_end|>", "d<|im_end|><|im_start|>assistant\ne", "f")
        yield image, turns(front + "### Human: x", "### Assistant: y\n###", "d", "e")
        yield image, turns(front + "<unk> a", "b <unk>", "<s>", "d")
        yield image, turns(front + "Count. " * 40, "One two three. " * 30, "More?", "No. " * 20)
        yield image, turns(front + "Short.", "Long answer, it goes on. " * 60)
        yield image, [{"from": "human", "value": front + "a"}, {"from": "human", "value": "b"}]
        yield image, [{"from": "system", "value": "Be kind."}, *turns(front + "a", "b")]
        yield image, [{"from": "Human", "value": front + "a"}, {"from": "GPT", "value": "b"}]
    yield True, turns("What is it?\n<image>", answer)
    yield True, turns("Look at <image> and say why.", answer, "And then?", "Nothing.")
    yield True, turns("<image>", answer)
    yield True, turns("<image>\n<image>\nCompare.", "Both <image> are cats.")
    yield True, turns("<image>\nOne.", "Yes.", "Two: <image>", "Yes.")
    yield True, turns("Hello", "See <image>")
    yield False, turns("What is <image> in HTML?", "A tag <image>.")


def random_samples(rng, count):
    words = WORDS.split("|")
    for _ in range(count):
        values = ["".join(rng.choice(words) for _ in range(rng.randint(0, 6))) for _ in range(2 * rng.randint(1, 4))]
        image = rng.random() < 0.5
        yield image, turns("<image>\n" * image + values[0], *values[1:], first=rng.choice(["human", "human", "gpt"]))


def tokenizer_of(model, legacy, max_length, mm_use_im_start_end, chatml, add_bos_token, every):
    path = str(HERE / "tokenizers" / model / "tokenizer.model")
    tokenizer = LlamaTokenizer(path, legacy=legacy, add_bos_token=add_bos_token, model_max_length=max_length)
    tokenizer.pad_token = tokenizer.unk_token
    if mm_use_im_start_end:
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    if chatml:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def multimodal(sample, start_end):
    arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=start_end)
    return train.preprocess_multimodal(copy.deepcopy([sample["conversations"]]), arguments)


def preprocessed(sample, tokenizer, start_end):
    """(ids, labels, outcome) of one sample, as `LazySupervisedDataset.__getitem__` gives them."""
    image, printed = "image" in sample, io.StringIO()
    sources = multimodal(sample, start_end) if image else copy.deepcopy([sample["conversations"]])
    try:
        with contextlib.redirect_stdout(printed):
            out = train.preprocess(sources, tokenizer, has_image=image)
    except (AssertionError, KeyError, IndexError, TypeError) as error:
        return [], [], type(error).__name__
    said = re.search(r"mismatch: (\d+) vs\. (\d+)\.", printed.getvalue())
    return out["input_ids"][0].numpy(), out["labels"][0].numpy(), said and [int(x) for x in said.groups()]


def record_setting(samples, templates, setting):
    tokenizer, rows = tokenizer_of(**setting), []
    for template in templates:
        conversation.default_conversation = template
        rows += [preprocessed(s, tokenizer, setting["mm_use_im_start_end"]) for s in samples[:: setting["every"]]]
    ids, labels = (np.concatenate([np.array(row[i], np.int64) for row in rows]) for i in (0, 1))
    assert np.all((labels == ids) | (labels == -100)) and ids.max() < 32768
    yield "ids", ids.astype(np.int16)
    yield "ends", np.cumsum([len(row[0]) for row in rows], dtype=np.int32)
    yield "labelled", np.packbits(labels != -100)
    yield "outcome", json.dumps([row[2] for row in rows])


def random_orders(rng):
    """Lengths (negative without an image), batch size and world size: both modalities, one, and few samples."""
    for count, share, batch_size, world_size in (
        (97, 0.5, 4, 2),
        (96, 0.7, 2, 4),
        (41, 1.0, 4, 3),
        (40, 0.0, 3, 2),
        (5, 0.5, 8, 2),
        (64, 0.25, 1, 8),
        (200, 0.9, 16, 1),
    ):
        lengths = [rng.randint(1, 60) * (1 if rng.random() < share else -1) for _ in range(count)]
        yield {"lengths": lengths, "batch_size": batch_size, "world_size": world_size}


def record_order(order):
    """The permutations that were drawn, and the result."""
    drawn, randperm = [], torch.randperm

    def recorded(n, generator=None):
        drawn.append(randperm(n, generator=generator))
        return drawn[-1]

    torch.randperm = recorded
    try:
        return drawn, llava_trainer.get_modality_length_grouped_indices(**order)
    finally:
        torch.randperm = randperm


def record_orders(orders):
    drawn, results = zip(*map(record_order, orders), strict=True)
    yield "permutations", np.concatenate([p for permutations in drawn for p in permutations]).astype(np.int16)
    yield "drawn", json.dumps([[len(p) for p in permutations] for permutations in drawn])
    yield "results", np.concatenate(results).astype(np.int16)


def values_after_multimodal(samples, template):
    conversation.default_conversation = template
    return {s["id"]: [turn["value"] for turn in multimodal(s, False)[0]] for s in samples if "image" in s}


def main():
    rng = random.Random(0)
    torch.manual_seed(0)
    samples = [
        {"id": str(i), **({"image": "x.jpg"} if image else {}), "conversations": said}
        for i, (image, said) in enumerate([*chosen_samples(), *random_samples(rng, 40)])
    ]
    templates, orders = conversation.conv_templates, list(random_orders(rng))
    first = {name: next(n for n in templates if templates[n] is templates[name]) for name in templates}
    settings = {name: DEFAULTS | setting for name, setting in SETTINGS.items()}
    out = {
        "inputs": json.dumps({"settings": settings, "samples": samples, "templates": first, "orders": orders}),
        "multimodal": json.dumps({n: values_after_multimodal(samples, templates[n]) for n in ("v1", "v1_mmtag")}),
    }
    distinct = [templates[name] for name in dict.fromkeys(first.values())]
    for name, setting in settings.items():
        out |= {f"{name}/{key}": value for key, value in record_setting(samples, distinct, setting)}
    out |= {f"orders/{key}": value for key, value in record_orders(orders)}
    np.savez_compressed(HERE / "preprocess.npz", **{key: np.array(value) for key, value in out.items()})


if __name__ == "__main__":
    main()
