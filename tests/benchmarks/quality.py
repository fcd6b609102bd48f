"""What int8 costs in answers, and what it saves: the bundled model in each of its forms (minutes on 2 cores).

    python tests/benchmarks/quality.py [--scenes 500] [--seed 0]

Right: of all questions on held-out scenes, the mean over their kinds, and those that a form moves by more than a
point. KL and same token: of the next token at each position of float32's own descriptions, given what came before.
Disk: the Orbax parameters. Cache: of one position of a prompt. Time: of one answer, in turns. XLA on a CPU has
no int8 products and converts the kernels first, so that what int8 saves in time shows on a GPU or a TPU alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import llava_jax
from llava_jax.checkpoint import PARAMS
from llava_jax.conversion.from_hf import convert
from llava_jax.demo.held_out import held_out_scene, score
from llava_jax.demo.model import BUNDLED, NAME, TOWER
from llava_jax.demo.scenes import draw
from llava_jax.inference.generate import prefill_questions
from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import pack_questions
from llava_jax.inputs.tokenizer import tokenizer_image_token

FORMS = {  # how it is converted, and loaded
    "float32": (dict(dtype="float32"), dict(dtype="float32")),
    "bfloat16": (dict(dtype="bfloat16"), dict(dtype="bfloat16")),
    "int8, float32 arithmetic": (dict(quantize="int8"), dict(dtype="float32")),
    "int8, bfloat16 arithmetic": (dict(quantize="int8"), dict(dtype="bfloat16")),
    "the same and int8 prefix": (dict(quantize="int8"), dict(dtype="bfloat16", int8_prefix=True)),
    "int8, int8 activations": (dict(quantize="int8"), dict(dtype="bfloat16", int8_activations=True)),
    "all three": (dict(quantize="int8"), dict(dtype="bfloat16", int8_prefix=True, int8_activations=True)),
}
DESCRIBE = "Describe the image."
TOKENS, TURNS = 48, 7


def load(form: str, folder: Path):
    """(llava, params, bytes on disk)"""
    conversion, loading = FORMS[form]
    directory = folder / form.replace(", ", "-").replace(" ", "-") / NAME
    convert(BUNDLED, output=directory, vision_tower=str(BUNDLED / TOWER), progress=False, **conversion)
    disk = sum(file.stat().st_size for file in (directory / PARAMS).rglob("*") if file.is_file())
    return *llava_jax.load(directory, **loading), disk


def next_tokens(llava, params, scenes, texts) -> list[np.ndarray]:
    """For each scene the log-probabilities [tokens, V] of its description's tokens, over the cached prompt."""

    @jax.jit
    def log_probs(params, prefix, questions):
        _, hidden = prefill_questions(llava.engine.model, 0, params, prefix, questions)
        return jax.nn.log_softmax(llava.engine.model.apply({"params": params}, hidden, method="logits"))

    out = []
    for scene, text in zip(scenes, texts, strict=True):
        images = llava.load_images(draw(scene))
        prompt = np.asarray(llava.prompt_ids(DESCRIBE, [images[0].size]))
        said = llava.conversation(DESCRIBE, 1)
        said = said.replace_last(said.messages[-1][0], text).get_prompt()
        ids = np.asarray(tokenizer_image_token(said, llava.tokenizer))  # </s> at its end
        answer = ids[len(prompt) - 1 : -1]
        prefix, _ = llava.engine.prefill(params, pack([prompt[:-1]], images, llava.config))
        given = log_probs(params, prefix, pack_questions([[answer]], 1, 1))
        out.append(np.asarray(given)[0, 0, : len(answer)])
    return out


def differences(ours: list[np.ndarray], exact: list[np.ndarray]) -> tuple[float, float]:
    """(mean KL in nats, share of positions with the same most likely token)"""
    ours, exact = np.concatenate(ours), np.concatenate(exact)
    kl = np.sum(np.exp(exact) * (exact - ours), axis=-1)
    return float(kl.mean()), float(np.mean(ours.argmax(-1) == exact.argmax(-1)))


def cache_bytes(llava, params) -> int:
    """Of one position of a prefix."""
    prefix, _ = llava.engine.prefill(params, pack([np.zeros(64, np.int64)], [], llava.config))
    return sum(x.nbytes for x in jax.tree.leaves(prefix.keys_values)) // prefix.capacity


def seconds(llava, params) -> float:
    """Of TOKENS tokens after a picture, none of which ends it."""
    began = time.perf_counter()
    llava.generate(params, draw(held_out_scene(0, 0)), DESCRIBE, max_new_tokens=TOKENS)
    return time.perf_counter() - began


def endless(llava):
    generation, model = dataclasses.replace(llava.config.generation, eos_token_ids=()), llava.engine.model
    int8 = dict(int8_prefix=model.int8_prefix, int8_activations=model.int8_activations)
    return llava_jax.Llava(llava.config.replace(generation=generation), llava.tokenizer, **int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scenes = [held_out_scene(args.seed, number) for number in range(min(args.scenes, 100))]
    texts = exact = first = None
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {form: load(form, Path(folder)) for form in FORMS}
    print(
        "| | right | KL, nats | same token | disk | parameters | cache |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for form, (llava, params, disk) in loaded.items():
        if texts is None:
            texts = llava.generate_batch(params, [(draw(s), [DESCRIBE]) for s in scenes], max_new_tokens=TOKENS)
        given = next_tokens(llava, params, scenes, texts)
        exact = exact or given
        kl, same = differences(given, exact)
        scores = score(llava, params, args.scenes, args.seed)
        first = first or scores
        moved = [f"{kind} {100 * x:.1f}" for kind, x in scores.items() if abs(x - first[kind]) > 0.01]
        right = 100 * statistics.mean(scores.values())
        parameters = sum(x.nbytes for x in jax.tree.leaves(params))
        cells = [
            form,
            f"{right:.2f} %" + (f" ({', '.join(moved)})" if moved else ""),
            f"{kl:.1e}",
            f"{100 * same:.2f} %",
        ]
        cells += [f"{disk / 1e6:.2f} MB", f"{parameters / 1e6:.2f} MB", f"{cache_bytes(llava, params)} B"]
        print(f"| {' | '.join(cells)} |", flush=True)
    timed = {form: (endless(llava), params) for form, (llava, params, _) in loaded.items()}
    for turn in range(TURNS + 1):
        for form, (llava, params) in timed.items():
            took = seconds(llava, params)
            if turn:  # the first compiles
                times[form].append(took)
    base = times["float32"]
    for form, took in times.items():
        ratios = [a / b for a, b in zip(took, base, strict=True)]
        print(
            f"time of {TOKENS} tokens, {form}: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        )


if __name__ == "__main__":
    main()
