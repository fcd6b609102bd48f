"""Drawn scenes as the data sets of tasks/*.yaml, and the same questions in the files of LLaVA's eval folder."""

import datasets
import scenes

from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.scene_questions import DIRECTIONS, NUMBERS
from llava_jax.demo.scenes import COLORS, SHAPES, draw

CHOICES = {
    "colour": tuple(COLORS),
    "shape": tuple(SHAPES),
    "count": NUMBERS,
    "position": DIRECTIONS,
    "place": ("top left", "top right", "bottom left", "bottom right"),
}


def write(folder, pictures, seed=0):
    """Data sets `pope` and `choice`, and pope.jsonl, choice.jsonl and their images, about so many pictures.

    A task names its data set by a relative path: lmms-eval is to run in this folder.

    Returns:
        {data set: its rows, in order}
    """
    (folder / "images").mkdir(parents=True)
    tables = {"pope": [], "choice": []}
    for number in range(pictures):
        scene = held_out_scene(seed, number)
        picture = draw(scene)
        picture.save(folder / "images" / f"{number}.png")
        for question in questions_about(scene, seed, number):
            row = {"image": picture, "image_source": f"{number}.png", "question": question.text}
            if question.kind == "yes_no":
                row |= {"question_id": str(len(tables["pope"])), "answer": question.answer.lower(), "category": "drawn"}
                tables["pope"].append(row)
            elif question.kind in CHOICES:
                choices = _four(CHOICES[question.kind], question.answer, number)
                tables["choice"].append(row | {"choices": choices, "answer": choices.index(question.answer)})
    tables = {name: rows[::2] + rows[1::2] for name, rows in tables.items()}  # a picture's are not side by side
    for name, rows in tables.items():
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        datasets.DatasetDict(test=table).save_to_disk(str(folder / name))
        asked = [{"question_id": n, "image": r["image_source"], "text": r["question"]} for n, r in enumerate(rows)]
        scenes.write_lines(folder / f"{name}.jsonl", asked)
    return tables


def _four(kinds, answer, number):
    """The answer among three others, in an order that changes from picture to picture."""
    others = [kind for kind in kinds if kind != answer][:3]
    return [*others[: number % 4], answer, *others[number % 4 :]]
