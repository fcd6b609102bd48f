"""The whole path with the bundled model: converted, loaded, shown scenes that it has never seen, and asked."""

from __future__ import annotations

import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_jax.demo.model import converted
from llava_jax.demo.questions import Question
from llava_jax.demo.scenes import draw
from llava_jax.demo.score import held_out_scene, is_right, questions_about

SHEET = "llava-jax-demo.png"
MARGIN, LINE, COLUMNS, CELL = 20, 19, 3, 380
RIGHT, WRONG, TEXT = (24, 120, 60), (190, 40, 40), (40, 42, 54)


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
    shown = []
    for number in range(scenes):
        scene = held_out_scene(seed, number)
        image, rng = draw(scene), np.random.default_rng((seed, number))
        asked = questions_about(scene, seed, number)
        asked = [asked[i] for i in sorted(rng.permutation(len(asked) - 1)[:3])] + asked[-1:]
        print(f"\n   picture {number + 1}, {scene.width} x {scene.height}")
        answers = [_ask(llava, params, image, question) for question in asked]
        shown.append((image, list(zip(asked, answers, strict=True))))
    draw_sheet(shown).save(SHEET)
    print(f"\n4. saved {SHEET}; {time.perf_counter() - began:.0f} s in all")


def _ask(llava, params, image: Image.Image, question: Question) -> str:
    print(f"   {question.text} ", end="", flush=True)
    answer = ""
    for piece in llava.stream(params, image, question.text, max_new_tokens=48):
        answer += piece
        print(piece, end="", flush=True)
    print("" if is_right(question, answer) else f"   (wrong: {question.answer})")
    return answer


def draw_sheet(shown: list[tuple[Image.Image, list[tuple[Question, str]]]]) -> Image.Image:
    """Pictures in columns, each with its questions and answers under it, wrong ones in red."""
    cells = [_cell(image, asked) for image, asked in shown]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = COLUMNS * (CELL + MARGIN) + MARGIN, sum(heights) + MARGIN * (len(rows) + 1)
    sheet = Image.new("RGB", size, "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + column * (CELL + MARGIN), top))
        top += height + MARGIN
    return sheet


def _cell(image: Image.Image, asked: list[tuple[Question, str]]) -> Image.Image:
    font = ImageFont.load_default(14)
    lines = []
    for question, answer in asked:
        color = RIGHT if is_right(question, answer) else WRONG
        lines += [(text, TEXT) for text in _wrapped(question.text, font)]
        lines += [(text, color) for text in _wrapped(answer, font)]
    cell = Image.new("RGB", (CELL, image.height + 8 + LINE * len(lines)), "white")
    cell.paste(image, (0, 0))
    pen = ImageDraw.Draw(cell)
    for i, (text, color) in enumerate(lines):
        pen.text((0, image.height + 8 + LINE * i), text, fill=color, font=font)
    return cell


def _wrapped(text: str, font) -> list[str]:
    """Lines that fit a cell."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
