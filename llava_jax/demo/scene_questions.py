"""Questions about a scene, and their answers: none that a careful person could answer in two ways."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from llava_jax.constants import DEFAULT_IMAGE_TOKEN
from llava_jax.demo.scenes import CHARACTERS, COLORS, SHAPES, SIGN, Item, Scene, pick

KINDS = ("colour", "shape", "count", "yes_no", "place", "position", "reading", "description")
# Of what a conversation is drawn: its first questions, which many others would give away, and those after them.
FIRST_KINDS = ("colour", "colour", "colour", "shape")
LATER_KINDS = ("shape", "count", "count", "count", "yes_no", "place", "position", "position", "position", "reading")
NUMBERS = ("one", "two", "three", "four")
DIRECTIONS = ("left", "right", "above", "below")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
CAPTION = "Describe the image."
SMALL_FROM = 1.8  # the aspect from which a sign is too small for the base tile alone


class Question(NamedTuple):
    """`needs` are facts, any of which said before would give the answer away; `gives` are those that it says."""

    kind: str  # one of KINDS
    text: str
    answer: str
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()


def is_detail(scene: Scene, question: Question) -> bool:
    """Whether only the tiles of the grid show the answer: a small text in a wide or tall picture."""
    return question.kind == "reading" and scene.aspect >= SMALL_FROM


def ask(scene: Scene, kind: str, rng) -> Question | None:
    """A question of one of KINDS, drawn with a NumPy Generator; None where the scene has none."""
    return _ASK[kind](scene, rng)


def describe(scene: Scene) -> str:
    """One sentence: every item, from left to right, or from the top in a tall picture."""
    ordered = sorted(scene.items, key=lambda item: item.y if scene.height > scene.width * 1.25 else item.x)
    *others, last = [_with_article(item) for item in ordered]
    text = f"{', '.join(others)} and {last}" if others else last
    return f"{text[0].upper()}{text[1:]}."


def described(text: str) -> Counter:
    """The items that a description names, in any order: to compare two."""
    parts = text.strip().rstrip(".").replace(" and ", ", ").lower().split(", ")
    return Counter(part.removeprefix("an ").removeprefix("a ") for part in parts)


def conversation(scene: Scene, rng, turns: int = 10) -> list[Question]:
    """Up to `turns` different questions, none of them answered by what was said before; a description may end it."""
    questions: list[Question] = []
    said: set[str] = set()
    for attempt in range(2 * turns):
        question = ask(scene, pick(rng, FIRST_KINDS if attempt < 8 else LATER_KINDS), rng)
        if question is None or question.needs & said or any(question.text == other.text for other in questions):
            continue
        questions.append(question)
        said |= question.gives
        if len(questions) == turns - 1:
            break
    if rng.random() < 0.3 or not questions:
        questions.append(_description(scene, rng))
    return questions


def sample(name: str, image: str, questions: list[Question]) -> dict:
    """One entry of LLaVA's JSON, about the picture file `image`."""
    first, *texts = [text for question in questions for text in (question.text, question.answer)]
    return _entry(name, image, [f"{DEFAULT_IMAGE_TOKEN}\n{first}", *texts])


def statements(scene: Scene, rng, length: int = 90) -> str:
    """True sentences about the scene, of about so many words and marks: what questions would ask, said outright."""
    said: list[str] = []
    for question in conversation(scene, rng, turns=20):
        sentence = _stated(question)
        if sentence and sum(len(text.split()) + 3 for text in (*said, sentence)) <= length:
            said.append(sentence)
    return " ".join(said) or describe(scene)


def _stated(question: Question) -> str | None:
    """A question and its answer as one sentence; None for those that say what is not there."""
    words = question.text.rstrip("?.").split()
    if question.kind == "colour":
        return f"The {words[-1]} is {question.answer}."
    if question.kind == "shape":
        return f"The {words[-1]} shape is a {question.answer}."
    if question.kind == "count":
        return f"The number of {' '.join(words[2:-2])} is {question.answer}."
    if question.kind == "place":
        return f"The {' '.join(words[8:])} is in the {question.answer}."
    if question.kind == "position":
        a, b = question.text[len("Where is the ") : -1].split(" relative to the ")
        return f"Relative to the {b} the {a} is {question.answer}."
    if question.kind == "reading":
        return f"The sign says {question.answer}."
    return None


def caption_sample(name: str, image: str, text: str) -> dict:
    """One entry for a plain template: a picture and a text about it."""
    return _entry(name, image, [DEFAULT_IMAGE_TOKEN, text])


def _entry(name: str, image: str, texts: list[str]) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "image": image, "conversations": turns}


# ---- one function for each kind


def _colour(scene: Scene, rng) -> Question | None:
    item = _alone(scene, "kind", rng)
    return _of_item("colour", f"What color is the {item.kind}?", item.color, item) if item else None


def _shape(scene: Scene, rng) -> Question | None:
    item = _alone(scene, "color", rng)
    return _of_item("shape", f"What shape is {item.color}?", item.kind, item) if item else None


def _alone(scene: Scene, attribute: str, rng) -> Item | None:
    """One of the shapes that no other item has the attribute of."""
    counts = Counter(getattr(item, attribute) for item in scene.items)
    items = [item for item in scene.items if item.kind != SIGN and counts[getattr(item, attribute)] == 1]
    return pick(rng, items) if items else None


def _of_item(kind: str, text: str, answer: str, item: Item) -> Question:
    return Question(kind, text, answer, frozenset([item.name]), _facts(item))


def _count(scene: Scene, rng) -> Question | None:
    """Of a shape or a color that is there; where some are there more often, rather of those: they are rarer."""
    shapes = Counter(item.kind for item in scene.items if item.kind != SIGN)
    colors = Counter(item.color for item in scene.items if item.kind != SIGN)
    named = [(PLURALS[kind], kind, n) for kind, n in shapes.items()]
    named += [(f"{color} shapes", color, n) for color, n in colors.items()]
    named = [entry for entry in named if entry[2] <= len(NUMBERS)]
    if not named:
        return None
    most = max(n for _, _, n in named)
    if rng.random() < 0.75:
        named = [entry for entry in named if entry[2] == most]
    plural, value, number = pick(rng, named)
    return Question("count", f"How many {plural} are there?", NUMBERS[number - 1], gives=frozenset([value]))


def _yes_no(scene: Scene, rng) -> Question | None:
    """In POPE's words. Half are there; of those that are not, most have the color and the shape, but not together."""
    there = [item for item in scene.items if item.kind != SIGN]
    names = {item.name for item in there}
    kinds, colors = {item.kind for item in there}, {item.color for item in there}
    yes = rng.random() < 0.5
    form = rng.random()
    if form < 0.15:
        found = [item for item in scene.items if item.kind == SIGN]
        thing = SIGN if bool(found) == yes else ""
    elif form < 0.4:
        thing = pick(rng, sorted(kinds) if yes else [shape for shape in SHAPES if shape not in kinds])
    elif yes:
        thing = pick(rng, sorted(names))
    else:
        pairs = [(color, shape) for color in COLORS for shape in SHAPES if f"{color} {shape}" not in names]
        both = [pair for pair in pairs if pair[0] in colors and pair[1] in kinds]
        either = [pair for pair in pairs if (pair[0] in colors) != (pair[1] in kinds)]
        thing = " ".join(pick(rng, both if both and rng.random() < 0.7 else either))
    if not thing:
        return None
    needs = frozenset([thing]) if yes else frozenset()
    gives = frozenset().union(*(_facts(item) for item in there if item.name == thing)) | needs
    return Question("yes_no", f"Is there {_a(thing)} in the image?", "Yes" if yes else "No", needs, gives)


def _place(scene: Scene, rng) -> Question | None:
    """Of an item that lies clearly in one quarter of the picture."""
    counts = Counter(item.name for item in scene.items)
    found = [(item, where) for item in scene.items if counts[item.name] == 1 and (where := quarter(item, scene))]
    if not found:
        return None
    item, where = pick(rng, found)
    text, fact = f"In which part of the image is the {item.name}?", f"{item.name} in the picture"
    return Question("place", text, where, frozenset([fact]), _facts(item) | {fact})


def quarter(item: Item, scene: Scene) -> str | None:
    """Where an item is in the picture; None near the lines between the quarters."""
    x, y = item.x / scene.width - 0.5, item.y / scene.height - 0.5
    if min(abs(x), abs(y)) < 0.06:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _position(scene: Scene, rng) -> Question | None:
    """Of two items, one of which lies clearly beside, above or below the other."""
    counts = Counter(item.name for item in scene.items)
    unique = [item for item in scene.items if counts[item.name] == 1]
    pairs = [(a, b, where) for a in unique for b in unique if a is not b and (where := direction(a, b))]
    if not pairs:
        return None
    beside = [pair for pair in pairs if pair[2] in DIRECTIONS[:2]]
    over = [pair for pair in pairs if pair not in beside]
    a, b, where = pick(rng, (beside if rng.random() < 0.5 else over) or pairs)
    text = f"Where is the {a.name} relative to the {b.name}?"
    both = frozenset([" and ".join(sorted([a.name, b.name]))])
    return Question("position", text, where, both, both | _facts(a) | _facts(b))


def direction(a: Item, b: Item) -> str | None:
    """Where `a` is, seen from `b`; None where neither way is clearly the longer."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= 1.7 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 1.7 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _reading(scene: Scene, rng) -> Question | None:
    signs = [item for item in scene.items if item.kind == SIGN]
    if len(signs) != 1:
        return None
    text = signs[0].text
    return Question("reading", "What does the sign say?", text, frozenset([text]), frozenset([SIGN, text]))


def _description(scene: Scene, rng) -> Question:
    return Question("description", CAPTION, describe(scene))


_ASK = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "yes_no": _yes_no,
    "place": _place,
    "position": _position,
    "reading": _reading,
    "description": _description,
}


# ---- words


def _facts(item: Item) -> frozenset[str]:
    return frozenset([item.name, item.kind, item.color] if item.color else [item.kind])


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _said(item: Item) -> str:
    return item.name if item.kind != SIGN else f"sign that says {item.text}"


def _with_article(item: Item) -> str:
    return _a(_said(item))


def vocabulary() -> list[str]:
    """Every word that the questions and the answers are made of, and each sign character."""
    frames = "What color is the What shape is How many shapes are there Is there a an in the image Where is the"
    frames += " relative to the What does the sign say Describe the image and a sign that says Yes No"
    frames += " The number of Relative In which part is in top bottom"
    words = [*frames.split(), *SHAPES, *PLURALS.values(), *COLORS, *NUMBERS, *DIRECTIONS, "A", "An", *CHARACTERS]
    return list(dict.fromkeys(words))
