"""The server with its engine and the bundled model: OpenAI's own client gets what `generate` gives. 30 s, nearly all of
which is compiling."""

import asyncio
import base64
import contextlib
import io
import os
import random
import time
from dataclasses import dataclass

import jax
import openai
import pytest
from PIL import Image
from served import served
from test_serve_app import serving, wait_for

from llava_jax.demo.held_out import held_out_scene
from llava_jax.demo.scenes import draw
from llava_jax.inference.batch_shape import BatchShape, PoolShape, RowClass
from llava_jax.inference.continuous_batch import ContinuousBatch
from llava_jax.inference.engine_loop import EngineLoop

SHAPE = BatchShape(1, 4, (PoolShape(512, (RowClass(2, 96), RowClass(1, 192))),), 64, 1, 4, 128, 512)
QUESTIONS = ("What color is the heart?", "How many shapes are there?", "Describe the picture.")


@pytest.fixture(scope="module")
def loop(bundled):
    llava, params = bundled
    loop = EngineLoop.start(ContinuousBatch(llava.engine, params, SHAPE))
    assert loop.wait_until_ready(300)
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def address(bundled, loop):
    with serving(loop, tokenizer=bundled[0].tokenizer, name="served") as url:
        yield url


@pytest.fixture(scope="module")
def scenes():
    return [draw(held_out_scene(0, number)) for number in range(3)]


@dataclass(frozen=True)
class Asked:
    """A request, and how the server is to be asked."""

    pictures: tuple[int, ...]
    question: str
    new: int
    seed: int | None
    stream: bool

    def messages(self, scenes):
        parts = [{"type": "image_url", "image_url": {"url": data_uri(scenes[n])}} for n in self.pictures]
        return [{"role": "user", "content": [{"type": "text", "text": self.question}, *parts]}]

    @property
    def sampling(self):
        return dict(temperature=0.0) if self.seed is None else dict(temperature=1.2, seed=self.seed)


def data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def mixed(count, seed=0):
    rng = random.Random(seed)
    pictures = [(), (0,), (1,), (0, 1), (2, 1, 0)]
    return [
        Asked(
            rng.choice(pictures),
            rng.choice(QUESTIONS),
            rng.choice([1, 2, 5, 20, 60, 140]),
            rng.choice([None, 1, 2]),
            rng.random() < 0.5,
        )
        for _ in range(count)
    ]


async def answer(client, asked, scenes):
    """(text, new tokens)"""
    fields = dict(model="served", messages=asked.messages(scenes), max_tokens=asked.new, **asked.sampling)
    if not asked.stream:
        whole = await client.chat.completions.create(**fields)
        return whole.choices[0].message.content, whole.usage.completion_tokens
    text, usage = "", None
    stream = await client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields)
    async for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    return text, usage.completion_tokens


def all_at_once(address, asked, scenes):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(answer(client, one, scenes) for one in asked))

    return asyncio.run(run())


@contextlib.contextmanager
def nothing_compiles():
    """Not even what JAX compiles without our asking."""
    compiled = []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def check(bundled, address, scenes, asked):
    llava, params = bundled
    with nothing_compiles():
        answers = all_at_once(address, asked, scenes)
    known = {}  # one call each for all lengths: an answer begins as a longer one does
    longest = max(one.new for one in asked)
    for one, (text, new) in zip(asked, answers, strict=True):
        key = one.pictures, one.question, one.seed
        if key not in known:
            shown = [scenes[n] for n in one.pictures]
            ids = llava.prompt_ids(one.question, [picture.size for picture in shown])
            tokens = llava.generate_tokens(params, [ids], shown or None, max_new_tokens=longest, **one.sampling)
            known[key] = tokens[0]
        assert text.strip() == llava.decode(known[key][: one.new]), one
        assert 1 <= new <= one.new


def test_many_at_once_get_what_generate_gives(bundled, loop, address, scenes):
    asked = [one for one in mixed(60) if len(one.pictures) < 2 and one.new < 60]
    assert len(asked) > 20
    check(bundled, address, scenes, asked)
    assert loop.stats().prefix_hits > 0 and loop.stats().prefix_slots_used == 0


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data=2", "tensor=2"])
def test_two_devices_answer_as_one(bundled, scenes_model, scenes, mesh, monkeypatch, capfd):
    """Costs 30 s each: a process that compiles."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    with served(scenes_model, "--mesh", mesh, "--max-num-seqs", "8") as server:
        until_ready = capfd.readouterr().err
        check(bundled, server.url, scenes, mixed(40, seed=3))
        assert server.metric("vllm:request_success_total") == 40
        assert server.metric("vllm:prefix_cache_hits_total") > 0 and server.metric("vllm:num_requests_running") == 0
        assert server.metric("vllm:kv_cache_usage_perc") == 0
    afterwards = capfd.readouterr().err
    assert f"mesh    {mesh}" in until_ready and "Finished XLA compilation" in until_ready
    assert "Finished XLA compilation" not in afterwards


@pytest.mark.long
def test_two_hundred_at_once_get_what_generate_gives(bundled, loop, address, scenes):
    check(bundled, address, scenes, mixed(200))


def test_the_next_turn_of_a_chat_finds_what_was_said(bundled, address, scenes):
    llava, params = bundled
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        messages, turns, cached = Asked((0,), QUESTIONS[2], 9, None, False).messages(scenes), [QUESTIONS[2]], []
        for question in (QUESTIONS[0], QUESTIONS[1], None):
            said = client.chat.completions.create(model="served", messages=messages, max_tokens=40, temperature=0)
            text = said.choices[0].message.content
            assert text.strip() == llava.generate(params, scenes[0], turns, max_new_tokens=40)
            cached.append(said.usage.prompt_tokens_details.cached_tokens)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
            turns += [text.strip(), question]
    assert cached[1] >= 48 and cached[2] > cached[1]


def test_the_likeliest_of_given_answers(bundled, address, scenes):
    llava, params = bundled
    choices = ["red", "orange", "a blue one"]
    messages = Asked((1,), QUESTIONS[0], 9, None, False).messages(scenes)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        extra = {"structured_outputs": {"choice": choices}}
        said = client.chat.completions.create(model="served", messages=messages, extra_body=extra)
    scores = llava.score(params, scenes[1], QUESTIONS[0], choices)
    assert said.choices[0].message.content == choices[int(scores.argmax())]


def test_who_goes_away_frees_the_row(loop, address, scenes, monkeypatch):
    running, cancel = [], loop.cancel
    monkeypatch.setattr(loop, "cancel", lambda request: (running.append(loop.stats().running), cancel(request)))
    extra = {"ignore_eos": True}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        messages = Asked((), QUESTIONS[2], 9, None, True).messages(scenes)
        stream = client.chat.completions.create(
            model="served", messages=messages, max_tokens=1900, stream=True, extra_body=extra
        )
        next(iter(stream))
        assert loop.stats().running == 1
        began = time.monotonic()
        stream.close()
        wait_for(lambda: loop.stats().running == 0)
    assert time.monotonic() - began < 2
    assert running[0] == 1  # it did not end by itself
