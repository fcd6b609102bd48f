"""How well the bundled model answers on scenes that it was not trained on, kind by kind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np

from llava_jax.demo.model import converted
from llava_jax.demo.scene_questions import KINDS, Question, ask, described, is_detail
from llava_jax.demo.scenes import Scene, draw, make_scene

HELD_OUT = 7_000_003  # no training seed begins with it
DETAIL = "detail"  # the readings that only the grid's tiles show
SCENES_PER_BATCH = 50  # scenes asked at a time
CHANCE = {
    "colour": 1 / 6,
    "shape": 1 / 6,
    "count": 1 / 4,
    "yes_no": 1 / 2,
    "place": 1 / 4,
    "position": 1 / 4,
    "reading": 1 / 144,
}


def held_out_scene(seed: int, number: int) -> Scene:
    return make_scene((HELD_OUT, seed, number))


def questions_about(scene: Scene, seed: int, number: int) -> list[Question]:
    """One question of each kind that the scene has."""
    rng = np.random.default_rng((HELD_OUT, seed, number, 1))
    return [question for kind in KINDS if (question := ask(scene, kind, rng)) is not None]


def is_right(question: Question, answer: str) -> bool:
    """The whole answer, to the letter; of a description, the same items in any order."""
    if question.kind == "description":
        return described(answer) == described(question.answer)
    return answer == question.answer


def answered(llava, params, scenes: int, seed: int) -> Iterator[tuple[Scene, Question, str]]:
    """(scene, question, answer) for held-out scenes number 0, 1, …"""
    for start in range(0, scenes, SCENES_PER_BATCH):
        numbers = range(start, min(start + SCENES_PER_BATCH, scenes))
        shown = [held_out_scene(seed, number) for number in numbers]
        asked = [questions_about(scene, seed, number) for scene, number in zip(shown, numbers, strict=True)]
        requests = [(draw(scene), [q.text for q in questions]) for scene, questions in zip(shown, asked, strict=True)]
        answers = iter(llava.generate_batch(params, requests, max_new_tokens=48))
        for scene, questions in zip(shown, asked, strict=True):
            for question in questions:
                yield scene, question, next(answers)


def score(llava, params, scenes: int = 500, seed: int = 0) -> dict[str, float]:
    """The share answered right of each of KINDS, and of the details; a kind that was never asked is missing.

    Args:
        llava: with its config's image_aspect_ratio at "anyres", or at "pad" to see the base tile alone.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for scene, question, answer in answered(llava, params, scenes, seed):
        for name in [question.kind] + [DETAIL] * is_detail(scene, question):
            total[name] += 1
            right[name] += isinstance(answer, str) and is_right(question, answer)
    return {name: right[name] / total[name] for name in (*KINDS, DETAIL) if total[name]}


def table(scores: dict[str, float]) -> str:
    lines = [f"{'':<12} {'right':>6} {'chance':>7}"]
    for name, value in scores.items():
        chance = CHANCE.get(name)
        lines.append(f"{name:<12} {value:>6.1%} {'' if chance is None else f'{chance:.0%}':>7}")
    return "\n".join(lines)


def run(model: str | None, output: str | None, scenes: int, seed: int, anyres: bool, as_json: bool) -> None:
    """Convert a checkpoint (None: the bundled one), score it, and print the table, or JSON."""
    import llava_jax

    with converted(model, output) as directory:
        llava, params = llava_jax.load(directory)
        if not anyres:
            llava = llava_jax.Llava(llava.config.replace(image_aspect_ratio="pad"), llava.tokenizer)
        scores = score(llava, params, scenes, seed)
    if as_json:
        print(json.dumps({**scores, "scenes": scenes, "seed": seed, "anyres": anyres}))
    else:
        print(table(scores))
