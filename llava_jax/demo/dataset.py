"""Scenes as a training set in LLaVA's own form: a folder of pictures and a JSON of conversations about them."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.demo.scene_questions import Question, caption_sample, conversation, describe, sample, statements
from llava_jax.demo.scenes import FORMS, SQUARE, Scene, draw, make_scene
from llava_jax.files import write_atomically
from llava_jax.inputs.anyres import image_length
from llava_jax.inputs.workers import Workers

DATA, IMAGES = "data.json", "images"
PICTURES_PER_FOLDER = 1000
SIGN_SHARE = 0.7  # the share of the scenes that have a sign

# name: (forms of the pictures, the share of those in which no two shapes are alike)
PICTURES = {"square": ((SQUARE,), 0.0), "all": (FORMS, 0.0), "various": (FORMS, 0.7), "mixed": (FORMS, 0.25)}


def make_sample(style: str, pictures: str, length: int, config: LlavaConfig, folder: str, seed: int, i: int):
    """Sample number `i`, its picture written into `folder`.

    Args:
        style: "captions" (a description, or statements) or "questions".
        pictures: one of PICTURES.
        length: positions that the sample may take, so that rows fill what they are padded to.
    """
    forms, various = PICTURES[pictures]
    scene, rng = make_scene((seed, i), forms, SIGN_SHARE, various), np.random.default_rng((seed, i, 1))
    name = f"{i:07d}"
    file = f"{i // PICTURES_PER_FOLDER:03d}/{name}.png"
    draw(scene).save(os.path.join(folder, file))
    room = length - image_length(scene.width, scene.height, config)
    if style == "captions":
        text = describe(scene) if rng.random() < 0.5 else statements(scene, rng, room - 4)
        return caption_sample(name, file, text)
    return sample(name, file, _fitting(scene, rng, room))


def _fitting(scene: Scene, rng, room: int) -> list[Question]:
    """As many questions as there is room for; what begins a conversation takes 12."""
    *asked, last = conversation(scene, rng, turns=20)
    ends = last.kind == "description"  # what would answer all questions after it
    if not ends:
        asked.append(last)
    questions: list[Question] = []
    left = room - 12 - ends * _question_cost(last)
    for question in asked:
        left -= _question_cost(question)
        if left < 0 and (questions or ends):
            break
        questions.append(question)
    return questions + [last] * ends


def _question_cost(question: Question) -> int:
    return _cost(question.text) + _cost(question.answer) + 3


def _cost(text: str) -> int:
    """At most how many tokens a text is: words, marks, and a sign's characters."""
    words = text.split()
    return len(words) + sum(text.count(mark) for mark in "?.,") + sum(2 for word in words if word.isupper())


def write_dataset(
    directory: Path, count: int, *, style: str, pictures: str, length: int, config: LlavaConfig, seed: int
) -> Path:
    """`count` samples: data.json and images/. What is there already, whole, is kept."""
    data, images = directory / DATA, directory / IMAGES
    if data.exists():
        return directory
    for number in range(-(-count // PICTURES_PER_FOLDER)):
        (images / f"{number:03d}").mkdir(parents=True, exist_ok=True)
    make = partial(make_sample, style, pictures, length, config, str(images), seed)
    with Workers(make, os.cpu_count() or 1) as workers:
        samples = list(workers.map(((number,) for number in range(count)), ahead=count))
    write_atomically(data, json.dumps(samples))
    return directory
