"""The server, asked by OpenAI's own client over a loopback port; the engine's tokens are scripted."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fake_loop import FakeLoop
from PIL import Image
from test_prompt import CONFIG, TOKENIZER

from llava_jax.inference.requests import ScoreRequest
from llava_jax.serve import handling
from llava_jax.serve.api import build_app
from llava_jax.serve.jobs import Served
from llava_jax.serve.media import MediaPolicy, load_picture

SAID = "A red star, and a blue one."
NAME, KEY = "llava/scenes", "a secret"
TOKENS = len(TOKENIZER.encode(SAID)[1:]) + 1  # with the end's


def picture(colour="red", size=(50, 40)):
    """A message's part."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": uri, "detail": "auto"}}


ASKED = [{"role": "user", "content": [{"type": "text", "text": "What is <image>?"}, picture()]}]
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def loop():
    made = FakeLoop(CONFIG, TOKENIZER, SAID)
    yield made
    made.going.set()
    made.close()


@contextlib.contextmanager
def serving(loop, key=None, tokenizer=TOKENIZER, name=NAME):
    """The address of a server in a thread."""
    served = Served(name, loop, tokenizer, partial(load_picture, policy=MediaPolicy()), api_key=key)
    config = uvicorn.Config(build_app(served), port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def address(loop):
    with serving(loop) as url:
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def wait_for(what, seconds=10):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def ask(client, messages=HI, **fields):
    return client.chat.completions.create(model=NAME, messages=messages, **fields)


def post(address, body, path="/v1/chat/completions", **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(address + path, content=content, headers=headers, **options)


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert "Traceback" not in response.text and str(Path(__file__).parents[1]) not in response.text
    return error


# ---- answers


def test_an_answer(client, loop):
    answer = ask(client, ASKED)
    assert answer._request_id == answer.id
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (SAID, "assistant", "stop")
    assert (answer.model, answer.object, choice.logprobs) == (NAME, "chat.completion", None)
    prompt = loop.seen[0].prompt
    positions = len(prompt.ids) - prompt.shared + loop.stats().prefix_queries
    assert answer.usage.prompt_tokens == positions and answer.usage.completion_tokens == TOKENS
    assert prompt.images[0].size == (50, 40) and prompt.ids[prompt.shared - 1] == -200
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    again = ask(client, ASKED, max_tokens=2)
    assert (again.choices[0].finish_reason, again.usage.completion_tokens) == ("length", 2)
    assert again.usage.prompt_tokens_details.cached_tokens == loop.stats().prefix_hits > 1000


def test_an_answer_as_it_comes(client):
    chunks = list(ask(client, ASKED, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == TOKENS
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.usage for chunk in chunks[:-1]} == {None}
    assert all(chunk.usage is None and chunk.choices for chunk in ask(client, stream=True))


def test_events_are_written_as_openai_writes_them(address):
    body = {"messages": HI, "stream": True, "max_tokens": 2}
    response = post(address, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] in response.text
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk" and "usage" not in lines[0]


def test_several_answers(client, loop):
    loop.script = lambda request: TOKENIZER.encode(f"star {request.options.sampling.seed}")[1:]
    answer = ask(client, n=3, seed=7)
    assert [choice.message.content for choice in answer.choices] == ["star 7", "star 8", "star 9"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == len(loop.seen[0].prompt.ids)  # once
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    said = ["", "", ""]
    for chunk in ask(client, n=3, seed=7, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == ["star 7", "star 8", "star 9"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_frees_its_row(client, loop, stream):
    loop.stalls_at = TOKENS - 1  # so that it cannot have ended by itself
    answer = ask(client, stop=[", and", "never"], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        said, finish = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        said, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens < TOKENS
    assert (said, finish) == ("A red star", "stop")
    wait_for(lambda: loop.cancelled == loop.seen)


def test_characters_come_whole(client, loop):
    loop.script = lambda request: TOKENIZER.encode("é€ 👩‍👩‍👧 ok")[1:]
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)]
    assert "".join(pieces) == "é€ 👩‍👩‍👧 ok" and "\ufffd" not in "".join(pieces)


def test_log_probabilities_of_a_chat(client):
    (choice,) = ask(client, logprobs=True, top_logprobs=2, max_tokens=3).choices
    told = choice.logprobs.content
    assert "".join(one.token for one in told).strip() == choice.message.content == "A red"
    assert [bytes(one.bytes).decode() for one in told] == [one.token for one in told]
    assert [[top.logprob for top in one.top_logprobs] for one in told] == [[-0.5, -1.5]] * 3
    streamed = [chunk.choices[0] for chunk in ask(client, logprobs=True, max_tokens=3, stream=True)]
    told = [one for chunk in streamed if chunk.logprobs for one in chunk.logprobs.content]
    assert [one.token for one in told] == [" A", " re", "d"] and told[0].top_logprobs == []


def test_completions(client, loop):
    answer = client.completions.create(model=NAME, prompt=["Hello", "Bye"], logprobs=1, n=2, max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["A red"] * 4
    assert [request.prompt.ids.tolist() for request in loop.seen[::2]] == list(map(TOKENIZER.encode, ("Hello", "Bye")))
    told = answer.choices[0].logprobs
    assert (told.tokens, told.text_offset, told.token_logprobs) == ([" A", " re", "d"], [0, 2, 5], [-0.5] * 3)
    assert told.top_logprobs == [{" A": -0.5}, {" re": -0.5}, {"d": -0.5}] and answer.object == "text_completion"
    ids = TOKENIZER.encode("Hello")
    chunks = list(client.completions.create(model=NAME, prompt=ids, stream=True, max_tokens=99, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == SAID
    assert [o for chunk in chunks for o in chunk.choices[0].logprobs.text_offset][:3] == [0, 2, 5]


def test_the_likeliest_of_some_answers(client, loop):
    loop.likely = lambda request: np.array([-3, -1, -2], np.float32)
    fields = {"extra_body": {"structured_outputs": {"choice": ["red", "blue", "green"]}}}
    answer = ask(client, ASKED, **fields)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("blue", "stop")
    (request,) = loop.seen
    assert isinstance(request, ScoreRequest) and len(request.candidates) == 3
    assert answer.usage.completion_tokens == len(request.candidates[1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **fields)) == "blue"


def test_many_at_once(address, loop):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:

            async def one(i):
                messages = ASKED if i % 3 else HI
                answer = await client.chat.completions.create(
                    model=NAME, messages=messages, max_tokens=1 + i, stream=i % 2 == 0
                )
                if i % 2:
                    return answer.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return await asyncio.gather(*map(one, range(40)))

    ids = TOKENIZER.encode(SAID)[1:]
    assert asyncio.run(all_of_them()) == [TOKENIZER.decode(ids[: 1 + i]).strip() for i in range(40)]
    assert loop.stats().running == 0


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == (NAME, 4096) and client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.models.retrieve("gpt")


# ---- errors


def test_wrong_requests_name_their_field(client, address, loop):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt", messages=HI)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    cases = {
        "n": dict(n=0),
        "messages[0].role": dict(messages=[{"role": "tool", "content": "a"}]),
        "tool_choice": dict(tool_choice="required", tools=[{"type": "function", "function": {"name": "f"}}]),
    }
    for param, fields in cases.items():
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, **fields)
        assert error.value.param == param
    with pytest.raises(openai.BadRequestError, match="the context has 4096 positions") as error:
        ask(client, [{"role": "user", "content": "word " * 9000}])
    assert error.value.code == "context_length_exceeded" and not loop.seen


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "http://127.0.0.1/a.png", "file:///etc/passwd", "a.png"])
def test_a_picture_that_cannot_be_read_costs_its_own_request(client, url):
    parts = [picture(), {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, [{"role": "user", "content": parts}])
    assert (error.value.param, error.value.code) == ("messages[0].content[1].image_url.url", "invalid_image")
    assert "passwd" not in str(error.value) and "127.0.0.1" not in error.value.message
    assert ask(client, ASKED).choices[0].message.content == SAID


def test_every_error_has_openais_form(address, monkeypatch):
    assert error_of(httpx.get(f"{address}/v1/nothing")) and httpx.get(f"{address}/nothing").status_code == 404
    response = httpx.get(f"{address}/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST" and error_of(response)
    assert httpx.post(f"{address}/health").status_code == 405
    response = post(address, b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415 and error_of(response)
    response = post(address, b"{")
    assert response.status_code == 400 and error_of(response)["code"] == "invalid_json"
    monkeypatch.setattr(handling, "MOST_BODY_BYTES", 100)
    for content in (b" " * 101, iter([b" " * 60] * 2)):  # the second does not say how long it is
        response = httpx.post(
            f"{address}/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 413 and error_of(response)["code"] == "request_too_large"
        assert response.headers["connection"] == "close"  # the rest is not read
    monkeypatch.setattr(handling, "MOST_OPENING", 0)
    assert post(address, {"messages": HI}).status_code == 429


def test_a_slow_body_is_given_up(address, monkeypatch):
    monkeypatch.setattr(handling, "BODY_SECONDS", 0.3)

    def slowly():
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    assert post(address, {}).status_code == 400
    with contextlib.suppress(httpx.WriteError):
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{address}/v1/completions", content=slowly(), headers=headers)
        assert response.status_code == 408 and error_of(response)


def test_who_sends_slowly_keeps_nobody_out(address, monkeypatch):
    monkeypatch.setattr(handling, "MOST_OPENING", 1)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    host, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(head)
        assert post(address, {"messages": HI}).status_code == 200
        monkeypatch.setattr(handling, "MOST_BODIES_BYTES", 25)
        response = post(address, {"messages": HI})
        assert response.status_code == 429 and "too much comes in" in error_of(response)["message"]
    monkeypatch.setattr(handling, "MOST_BODIES_BYTES", 100)
    assert [post(address, {"messages": HI}).status_code for _ in range(5)] == [200] * 5  # nothing is counted twice


def test_a_full_queue_asks_to_come_again(address, loop):
    loop.full = True
    response = post(address, {"messages": HI})
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert error_of(response)["type"] == "rate_limit_error"
    threading.Timer(0.3, setattr, (loop, "full", False)).start()
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=2) as client:
        assert ask(client).choices[0].message.content == SAID


def test_a_key_opens_all_but_health(loop):
    with serving(loop, KEY) as address:
        for given in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}, {"Authorization": b"Bearer \xff"}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                response = httpx.get(address + path, headers=given)
                assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
            assert post(address, {"messages": HI}, headers=given).status_code == 401
            assert httpx.get(f"{address}/health", headers=given).status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            assert ask(client).choices[0].message.content == SAID
        with openai.OpenAI(base_url=f"{address}/v1", api_key="no") as client, pytest.raises(openai.AuthenticationError):
            ask(client)


def test_health_says_why_not(address, loop):
    assert httpx.get(f"{address}/health").json() == {"status": "ready"}
    loop.ready, loop.starting = False, "compiling decode (3 of 12)"
    for response in (httpx.get(f"{address}/health"), post(address, {"messages": HI})):
        assert response.status_code == 503 and "compiling decode (3 of 12)" in error_of(response)["message"]
    loop.ready, loop.failed = True, "/a/path and an address"
    response = httpx.get(f"{address}/health")
    assert response.status_code == 503 and "/a/path" not in response.text


def test_an_engine_that_fails_fails_what_runs_and_goes_on(address, client, loop):
    loop.failing = RuntimeError("/a/path")
    response = post(address, {"messages": HI, "stream": True})  # before its first token
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"
    loop.failing = RuntimeError("/a/path")
    with pytest.raises(openai.InternalServerError):
        ask(client)
    loop.stalls_at = 3
    stream = ask(client, stream=True)
    next(stream)
    wait_for(lambda: not loop.going.is_set())
    loop.failing, loop.stalls_at = RuntimeError("/a/path"), None
    loop.going.set()
    with pytest.raises(openai.APIError, match="could not answer"):
        list(stream)
    assert ask(client).choices[0].message.content == SAID


def test_what_nobody_expected_is_a_500_without_a_word_of_it(address, loop, monkeypatch, caplog):
    monkeypatch.setattr(loop, "submit", lambda request: 1 / 0)
    response = post(address, {"messages": HI})
    assert response.status_code == 500 and "division" not in response.text and error_of(response)
    wait_for(lambda: "ZeroDivisionError" in caplog.text)  # after the response


# ---- clients that go away


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [False, True])
def test_a_client_that_goes_away_is_worked_for_no_more(address, loop, stream, choice):
    loop.going.clear()
    body = {"messages": ASKED, "stream": stream, "n": 1 if choice else 2}
    if choice:
        body["structured_outputs"] = {"choice": ["a", "b"]}
    host, port = address.removeprefix("http://").split(":")
    with contextlib.closing(HTTPConnection(host, int(port))) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        wait_for(lambda: loop.seen)
    wait_for(lambda: loop.cancelled == loop.seen)


def test_a_client_that_goes_away_in_the_middle(address, loop, client):
    loop.stalls_at = 5
    stream = ask(client, stream=True)
    said = [next(stream), next(stream), next(stream)]
    stream.close()
    wait_for(lambda: loop.cancelled == loop.seen)
    assert not any(chunk.choices[0].finish_reason for chunk in said)
    loop.stalls_at = None
    loop.going.set()
    assert ask(client).choices[0].message.content == SAID


# ---- what is told of it


def test_metrics_have_vllms_names(address, client, loop):
    ask(client, ASKED)
    ask(client, ASKED, max_tokens=2)
    text = httpx.get(f"{address}/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}

    def value(name, labels=f'{{model_name="{NAME}"}}'):
        return values[f"vllm:{name}{labels}"]

    assert value("generation_tokens_total") == TOKENS + 2 and value("num_requests_running") == 0
    assert value("prompt_tokens_total") == value("request_prompt_tokens_sum") > 2000
    assert value("prefix_cache_queries_total") == 2 * value("prefix_cache_hits_total") > 2000
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert value(f"{name}_count") == 2
    assert value("inter_token_latency_seconds_count") == TOKENS - 1 + 1
    assert value("kv_cache_usage_perc") == 0.25 and value("num_requests_waiting") == 0
    assert value("num_preemptions_total") == 0
    for reason in ("stop", "length"):
        assert value("request_success_total", f'{{finished_reason="{reason}",model_name="{NAME}"}}') == 1


def test_a_line_is_logged_for_each_request(address, client, caplog):
    caplog.set_level(logging.INFO, "llava_jax.serve")
    answer = ask(client, ASKED)
    wrong = post(address, b"{")
    unknown = post(address, json.dumps({"model": "a\nb", "messages": []}).encode())
    wait_for(lambda: len([r for r in caplog.records if r.name == "llava_jax.serve"]) == 3)
    good, bad, other = [r.getMessage() for r in caplog.records if r.name == "llava_jax.serve"]
    assert bad.startswith(wrong.headers["x-request-id"]) and bad.endswith(wrong.json()["error"]["message"])
    assert unknown.json()["error"]["message"] in other and "\n" not in other
    assert good.startswith(f"{answer.id} 200 prompt={answer.usage.prompt_tokens} cached=0 new={TOKENS} first=0.")
    assert " 400 prompt=0" in bad and "first=- tokens/s=-" in bad


def test_what_a_request_brought_is_not_kept(address, client, loop):
    """Memory does not grow with what was asked."""
    for _ in range(5):
        ask(client, ASKED)
    loop.seen.clear()
    loop.cancelled.clear()
    wait_for(lambda: gc.collect() is not None and not [o for o in gc.get_objects() if isinstance(o, handling.Job)])


# ---- the process


def test_sigterm_finishes_what_runs_and_exits_with_0(tmp_path):
    """Costs 4 s: a process that imports JAX, and an answer of a second."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from fake_loop import FakeLoop
        from test_prompt import CONFIG, TOKENIZER
        from llava_jax.serve.jobs import Served
        from llava_jax.serve.server import ServeOptions, asked_to_stop, run_server
        loop = FakeLoop(CONFIG, TOKENIZER, {SAID!r})
        loop.pace = 0.1
        with asked_to_stop() as stop:
            run_server(Served("m", loop, TOKENIZER, None), ServeOptions(port={(port := free_port())}), stop)
    """
    script = tmp_path / "serve.py"
    script.write_text(textwrap.dedent(code))
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == f"m at http://127.0.0.1:{port}/v1 (Ctrl-C ends)\n"
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(address))
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model="m", messages=HI, stream=True)
            said = next(stream).choices[0].delta.content
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not answers(address))
            assert said + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == SAID
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.stderr.close()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def answers(address):
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False
