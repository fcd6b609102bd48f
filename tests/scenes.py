"""A little benchmark in the files of LLaVA's eval folder: the bundled model and the scenes that it knows."""

import json

from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.scenes import draw


def write(folder, count, model):
    """Writes images and questions.jsonl.

    Returns:
        (the command's flags without --answers-file, the questions)
    """
    (folder / "images").mkdir()
    questions = []
    for n in range(count):
        scene = held_out_scene(0, n)
        draw(scene).save(folder / "images" / f"{n}.png")
        for question in questions_about(scene, 0, n):
            entry = {"question_id": len(questions) % 50, "image": f"{n}.png", "text": question.text}
            questions.append(entry | {"answer": question.answer})
    questions = questions[::2] + questions[1::2]  # an image's questions are not side by side
    write_lines(folder / "questions.jsonl", questions)
    flags = {"--model-path": model, "--question-file": folder / "questions.jsonl"}
    flags |= {"--image-folder": folder / "images", "--max_new_tokens": 24}
    return flags, questions


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(flags, **others):
    """`llava-jax evaluate` with these flags; a dash in a name is an underscore here."""
    flags = flags | {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    out = ["evaluate"]
    for flag, value in flags.items():
        out += [flag] if value is True else [flag, str(value)]
    return out
