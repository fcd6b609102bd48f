"""Thousands of requests with random cancels against `llava-jax serve`: answers right, memory flat, nothing left behind.

    python tests/soak_serve.py                      # 2,000 requests to the bundled model
    python tests/soak_serve.py --requests 500 --seed 1

By the `openai` client over loopback. A question about a picture has one right answer for each seed: the first that came
whole. Every later one must be equal to it, and what came of a cancelled one must begin it. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from openai import AsyncOpenAI
from served import Server, scene_uri, served

from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.model import BUNDLED, NAME, convert_published

PICTURES = 24
AT_ONCE = 32
CANCELLED = 0.35  # of all requests
LOOKS = 20  # at the memory, evenly over the requests
GROWTH = 32 << 20  # bytes that the second half may add at most
SETTLES_WITHIN = 10.0  # seconds


@dataclass(frozen=True)
class Question:
    """One of which the answer is always the same."""

    picture: int
    text: str
    seed: int | None  # None is greedy
    max_tokens: int


@dataclass
class Seen:
    """What has come so far."""

    right: dict[Question, str] = field(default_factory=dict)
    begun: list[tuple[Question, str]] = field(default_factory=list)  # of cancelled ones
    counts: Counter = field(default_factory=Counter)

    def whole(self, question: Question, answer: str) -> None:
        if self.right.setdefault(question, answer) != answer:
            raise AssertionError(f"{question}: {answer!r} instead of {self.right[question]!r}")


def question(rng: random.Random) -> Question:
    number = rng.randrange(PICTURES)
    asked = rng.choice(questions_about(held_out_scene(0, number), 0, number)).text
    return Question(number, asked, rng.choice((None, 1)), rng.choice((4, 48)))


async def ask(client: AsyncOpenAI, model: str, asked: Question, rng: random.Random, seen: Seen) -> None:
    """One request: streamed or not, and perhaps left before its end."""
    content = [
        {"type": "image_url", "image_url": {"url": scene_uri(0, asked.picture)}},
        {"type": "text", "text": asked.text},
    ]
    options = {"temperature": 0.0} if asked.seed is None else {"temperature": 1.0, "seed": asked.seed}
    request = dict(model=model, messages=[{"role": "user", "content": content}], max_tokens=asked.max_tokens, **options)
    cancelled = rng.random() < CANCELLED
    if rng.random() < 0.5:
        limit = rng.uniform(0, 0.5) if cancelled else None
        with contextlib.suppress(TimeoutError):
            reply = await asyncio.wait_for(client.chat.completions.create(**request), limit)
            seen.whole(asked, reply.choices[0].message.content)
            seen.counts["whole"] += 1
            return
        seen.counts["cancelled"] += 1
        return
    pieces, most = [], rng.randrange(1, 6) if cancelled else None
    async with await client.chat.completions.create(stream=True, **request) as stream:
        async for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            if most is not None and len(pieces) >= most:
                seen.begun.append((asked, "".join(pieces)))
                seen.counts["left while streaming"] += 1
                return
    seen.whole(asked, "".join(pieces))
    seen.counts["streamed"] += 1


async def soak(server: Server, requests: int, seed: int) -> Seen:
    """Asks, and looks at the server's memory as it goes.

    Raises:
        AssertionError: a wrong answer, memory that grows, or requests that are left in the server.
    """
    rng, seen, resident = random.Random(seed), Seen(), []
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        for share in range(LOOKS):
            todo = requests * (share + 1) // LOOKS - requests * share // LOOKS
            await in_turns(client, server.model, [question(rng) for _ in range(todo)], rng, seen)
            resident.append(server.resident())
            print(f"{share + 1}/{LOOKS}: {resident[-1] / 2**20:.0f} MiB, {dict(seen.counts)}", flush=True)
    for asked, text in seen.begun:
        if asked in seen.right and not seen.right[asked].startswith(text):
            raise AssertionError(f"{asked}: {text!r} does not begin {seen.right[asked]!r}")
    settle(server)
    grown = max(resident[LOOKS // 2 :]) - resident[LOOKS // 2 - 1]
    if grown > GROWTH:
        raise AssertionError(f"the second half added {grown / 2**20:.1f} MiB, more than {GROWTH >> 20}")
    print(f"{len(seen.right)} answers, each always the same; the second half added {grown / 2**20:.1f} MiB")
    return seen


async def in_turns(client, model: str, questions: list[Question], rng: random.Random, seen: Seen) -> None:
    """So many at once, each beginning as another ends."""
    waiting = iter(questions)

    async def worker() -> None:
        for asked in waiting:
            await ask(client, model, asked, rng, seen)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())


def settle(server: Server) -> None:
    """Nothing runs or waits soon after the last request."""
    until = time.monotonic() + SETTLES_WITHIN
    while left := {name: n for name in ("running", "waiting") if (n := server.metric(f"vllm:num_requests_{name}"))}:
        if time.monotonic() > until:
            raise AssertionError(f"left in the server: {left}")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-path", type=Path, help="a converted checkpoint (the bundled model)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model_path or convert_published(BUNDLED, Path(folder) / NAME)
        with served(model) as server:
            asyncio.run(soak(server, args.requests, args.seed))


if __name__ == "__main__":
    main()
