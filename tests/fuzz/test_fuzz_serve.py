"""Odd requests to the server: each is answered, or refused with one clear line; never a 500, a fetch or a leak."""

import base64
import copy
import io
import json
import re
import socket
from functools import partial

import httpx
import odd
import pytest
from fake_loop import FakeLoop
from PIL import Image
from test_prompt import CONFIG, TOKENIZER

from llava_jax.serve.api import build_app
from llava_jax.serve.jobs import Served
from llava_jax.serve.media import MediaPolicy, load_picture

STATUSES = {200, 400, 404, 413}
LEAK = re.compile(r'Traceback|File "|/home/|/root/|/tmp/|/etc/|0x[0-9a-f]{6}|169\.254|127\.0\.0|\[::1\]')


def file(kind, size=(30, 20)):
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind)
    return out.getvalue()


def uri(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PNG = file("PNG")
FITS = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2720)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HUGE = PNG[:16] + (60000).to_bytes(4, "big") * 2 + PNG[24:]  # says that it is 60000 x 60000
URLS = (
    "http://127.0.0.1/", "http://localhost:22/a.png", "http://[::1]/", "http://169.254.169.254/latest/meta-data/",
    "http://0.0.0.0/", "http://2130706433/", "http://10.0.0.1/a.png", "https://example.com@127.0.0.1/", "//127.0.0.1/a",
    "file:///etc/passwd", "file://localhost/etc/shadow", "/etc/passwd", "../../etc/passwd", "gs://bucket/a", "ftp://a/b",
    "data:", "data:,", "data:;base64,", "data:image/png;base64,====", "data:image/png,%00%ff", "javascript:alert(1)",
    "", uri(PNG), uri(file("JPEG"), "image/jpeg"), uri(FITS, "image/fits"), uri(SVG, "image/svg+xml"), uri(HUGE),
    uri(file("TIFF"), "image/tiff"), uri(file("PPM")), uri(PNG[:40]), uri(file("PNG", (3000, 1))),
)  # fmt: skip
CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": uri(PNG), "detail": "auto"}},
            ],
        },
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Where?"},
    ],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 1,
    "n": 2,
    "stop": ["###", "</s>"],
    "stop_token_ids": [5],
    "min_tokens": 1,
    "ignore_eos": False,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
}
CHOICE = {"messages": CHAT["messages"], "structured_outputs": {"choice": ["red", "blue"]}}
TEXT = {"model": "m", "prompt": ["Hello", "Bye"], "max_tokens": 3, "logprobs": 2, "n": 1, "stop": "x"}


@pytest.fixture(scope="module")
def app():
    loop = FakeLoop(CONFIG, TOKENIZER)
    served = Served("m", loop, TOKENIZER, partial(load_picture, policy=MediaPolicy()))
    yield build_app(served)
    assert loop.stats().running == 0


@pytest.fixture
def no_network(monkeypatch):
    """Nothing is looked up or connected to."""

    def refuse(*args, **keywords):
        pytest.fail(f"the server wanted to connect: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def odd_url(rng):
    return rng.choice((rng.choice(URLS), uri(PNG), uri(odd.damaged(rng, PNG))))


def odd_body(rng):
    """(path, body)"""
    path, valid = rng.choice(
        [("chat/completions", CHAT), ("chat/completions", CHOICE), ("completions", TEXT), ("chat/completions", CHAT)]
    )
    kind = rng.randrange(10)
    if kind == 0:
        return path, odd.damaged(rng, odd.dump(valid).encode())
    body = copy.deepcopy(odd.changed(rng, valid))  # it may be one of `odd.VALUES` itself
    if kind < 4 and isinstance(body, dict):
        body[odd.text(rng) if kind == 1 else rng.choice(list(CHAT))] = odd.value(rng)
    elif kind < 8:
        words = rng.choice(("What is it?", odd.text(rng)))
        parts = [{"type": "image_url", "image_url": {"url": odd_url(rng)}} for _ in range(rng.randint(1, 2))]
        body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]}
        body |= {"max_tokens": 2, "stream": rng.random() < 0.5}
    if kind == 8:
        for _ in range(rng.choice((5, 100, 500))):
            body = rng.choice(([body], {"messages": body}))
    return path, odd.dump(body).encode()


async def asked(app, bodies):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
        for path, body in bodies:
            headers = {"content-type": "application/json"}
            yield await client.post(f"/v1/{path}", content=body, headers=headers)


def problems(response):
    """What is wrong with a response."""
    if response.status_code not in STATUSES:
        return f"status {response.status_code}"
    if leak := LEAK.search(response.text):
        return f"it tells of {leak[0]!r}"
    if response.status_code != 200:
        error = json.loads(response.text)["error"]
        whole = set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        return None if whole and "\n" not in error["message"] and len(error["message"]) < 1000 else "no clear line"
    streamed = response.headers["content-type"].startswith("text/event-stream")
    return "it is cut off" if streamed and not response.text.endswith("data: [DONE]\n\n") else None


@odd.cases(500, long=5000)  # 500 in 5 s
def test_requests(numbers, app, no_network):
    import anyio

    cases = [odd_body(odd.generator("requests", number)) for number in numbers]
    statuses = []

    async def all_of_them():
        async for response in asked(app, cases):
            found = problems(response)
            assert not found, f"case {numbers[len(statuses)]}: {found}: {cases[len(statuses)]!r:.2000}: {response.text}"
            statuses.append(response.status_code)

    anyio.run(all_of_them)
    assert statuses.count(200) > len(numbers) // 10 and statuses.count(400) > len(numbers) // 4
