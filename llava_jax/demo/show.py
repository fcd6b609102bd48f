"""The whole path with the bundled model: converted, loaded, shown scenes that it has never seen, and asked."""

from __future__ import annotations

import time

import numpy as np
from PIL import Image

from llava_jax.demo.held_out import held_out_scene, is_right, questions_about
from llava_jax.demo.model import converted
from llava_jax.demo.scene_questions import Question
from llava_jax.demo.scenes import draw
from llava_jax.plots.visualize import draw_answers

SHEET = "llava-jax-demo.png"


def run(model: str | None, output: str | None, scenes: int, seed: int) -> None:
    """Convert a checkpoint, load it, ask with the answers streamed, and save pictures and answers as SHEET.

    Args:
        model, output: see `converted`.
    """
    import llava_jax

    began = time.perf_counter()
    print("1. converting the checkpoint, which is in the layout of liuhaotian/llava-v1.6-vicuna-7b")
    with converted(model, output) as directory:
        print("2. loading it")
        llava, params = llava_jax.load(directory)
        print(f"3. asking about {scenes} pictures that it was not trained on (the first answers wait for the compiler)")
        shown = [_show(llava, params, number, seed) for number in range(scenes)]
        draw_answers(shown).save(SHEET)
    print(f"\n4. saved {SHEET}; {time.perf_counter() - began:.0f} s in all")


def _show(llava, params, number: int, seed: int):
    """One picture, and (question, answer, whether it is right) for some questions about it, as `draw_answers` takes
    them."""
    scene = held_out_scene(seed, number)
    image, rng = draw(scene), np.random.default_rng((seed, number))
    asked = questions_about(scene, seed, number)
    asked = [asked[i] for i in sorted(rng.permutation(len(asked) - 1)[:3])] + asked[-1:]
    print(f"\n   picture {number + 1}, {scene.width} x {scene.height}")
    answers = [_ask(llava, params, image, question) for question in asked]
    return image, [(q.text, a, is_right(q, a)) for q, a in zip(asked, answers, strict=True)]


def _ask(llava, params, image: Image.Image, question: Question) -> str:
    print(f"   {question.text} ", end="", flush=True)
    answer = ""
    for piece in llava.stream(params, image, question.text, max_new_tokens=48):
        answer += piece
        print(piece, end="", flush=True)
    print("" if is_right(question, answer) else f"   (wrong: {question.answer})")
    return answer
