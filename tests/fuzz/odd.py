"""Odd inputs from a seed: half characters, damaged bytes, JSON with a value of another kind somewhere in it.

A fuzz test asks of each input that it is either taken or refused with one clear line: see `refusal_of`.
"""

import copy
import json
import math
import os
import random

import pytest

TEXTS = (
    "", " ", "\n", "\0", "\ud83d", "a\udc80b", "\ufeff", "\u202e", "é" * 3, "👩‍👩‍👧", "</s>", "<s>", "<pad>", "###",
    "<image>", "<image>\n<image>", "[INST]", "<|im_end|>", "USER: ASSISTANT:", "{}", "nan", "None", "-1", "1e999",
    "../../etc/passwd", "%s%n", "a" * 5000,
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 10**30, 0.5, -0.0, 1e308, math.inf, math.nan, "", "x", "128", "true", "\ud83d",
    [], [1], [[1, 2]], {}, {"a": 1},
)  # fmt: skip


def generator(name: str, number: int) -> random.Random:
    """The generator of one case; the same each time."""
    return random.Random(f"{name} {number}")


def cases(count: int, long: int):
    """Parametrizes a test over `numbers`: `count` cases day by day, and `long` more behind the marker."""
    rest = pytest.param(range(count, count + long), marks=pytest.mark.long, id="long")
    return pytest.mark.parametrize("numbers", [pytest.param(range(count), id="short"), rest])


def text(rng: random.Random) -> str:
    """A few odd texts and characters, one after another."""
    parts = [rng.choice(TEXTS), chr(rng.randrange(0x110000)), rng.choice(("word", " ", "<image>", "\t"))]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(4)))


def value(rng: random.Random):
    """A JSON value that is probably of another kind than the one it stands for."""
    return rng.choice((*VALUES, text(rng)))


def changed(rng: random.Random, valid):
    """A copy of a JSON value in which one thing, anywhere, is replaced, taken out, doubled or put in."""
    whole = [copy.deepcopy(valid)]
    holder, key = whole, 0
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(5)
    if kind == 0 and holder is not whole:
        del holder[key]
    elif kind == 1 and isinstance(holder[key], dict):
        holder[key][text(rng)] = value(rng)
    elif kind == 2 and isinstance(holder[key], list):
        holder[key].append(copy.deepcopy(holder[key][0]) if holder[key] and rng.random() < 0.5 else value(rng))
    else:
        holder[key] = value(rng)
    return whole[0]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A file's bytes cut off, with a flipped bit, zeroed for a stretch, doubled, or replaced."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    if kind == 3:
        return data[:at] + data
    if kind == 4:
        return rng.randbytes(rng.randrange(200))
    return data[:at] + rng.choice((b"\xff\xfe", b"[" * 100_000, b"\0", b"\r", b'"', b"{")) + data[at:]


def refusal_of(function, *arguments, **keywords) -> Exception | None:
    """The error that a function refuses its input with, one clear line; None if it takes it.

    Any other exception than a ValueError or an OSError goes through, and the test fails.
    """
    try:
        function(*arguments, **keywords)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "\n" not in message.strip() and len(message) < 2000, f"not one clear line: {message!r:.500}"
        return error
    return None


def dump(content) -> str:
    """JSON with whatever is in it, halves of characters too."""
    return json.dumps(content)


def write(path, content) -> str:
    """Writes bytes, or else JSON, and gives the path as a text."""
    data = content if isinstance(content, bytes) else dump(content).encode()
    with open(path, "wb") as file:
        file.write(data)
    return os.fspath(path)
