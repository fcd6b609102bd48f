"""What clients send, taken or refused with one line that names the field; and what the engine is asked for it."""

import json

import pytest

from llava_jax.config import GenerationDefaults
from llava_jax.inference.requests import MOST_END_IDS
from llava_jax.inference.sampling import Greedy, Sample, validate
from llava_jax.serve.decoding import row_options
from llava_jax.serve.protocol import (
    MOST_ANSWERS,
    MOST_MESSAGES,
    MOST_STOP,
    NOT_HERE,
    ApiError,
    parse_chat,
    parse_completion,
)

HI = {"messages": [{"role": "user", "content": "Hi"}]}
DEFAULTS = GenerationDefaults(top_p=0.9, top_k=40)


def chat(**fields):
    return parse_chat(json.dumps(HI | fields).encode())


def refused(parse, body):
    with pytest.raises(ApiError) as error:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert error.value.status == 400 and "\n" not in error.value.message
    assert error.value.param is None or error.value.message.startswith(error.value.param)
    return error.value


def options(room=100, **fields):
    return row_options(chat(**fields), DEFAULTS, room)


# ---- fields


def test_null_and_what_is_not_known_change_nothing():
    nothing = dict.fromkeys(["temperature", "n", "stop", "seed", "max_tokens", "logprobs", "stream", *NOT_HERE])
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True}
    assert chat() == chat(**nothing) == chat(**ignored) == chat(nobody={"knows": [1]}, tools=[{}], tool_choice="none")
    assert chat(frequency_penalty=0, logit_bias={}, response_format={"type": "text"}, best_of=1) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": MOST_ANSWERS + 1}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * (MOST_STOP + 1)}, "stop"),
        ({"stop": "a" * 1000}, "stop"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [1] * (MOST_END_IDS + 1)}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"choice": ["a"]}, "n": 2}, "n"),
        ({"structured_outputs": {"choice": ["a"]}, "logprobs": True}, "logprobs"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": HI["messages"] * (MOST_MESSAGES + 1)}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
        ),
    ],
)
def test_a_wrong_field_is_named_as_openai_names_it(fields, param):
    assert refused(parse_chat, HI | fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "a", "format": "wav"}}, "audio"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused(fields, param):
    error = refused(parse_chat, HI | fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b'"a"', b"null", b"\xff", b'{"a": "\x01"}', b'{"a": NaN}', b'{"a": 1e999',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"n": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1e999}',
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    refused(parse_chat, body)
    refused(parse_completion, body)


def test_prompts_are_a_text_or_ids_or_several():
    def prompts(prompt):
        return parse_completion(json.dumps({"prompt": prompt}).encode()).prompts

    assert prompts("a") == ["a"] and prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]] and prompts([[1], [2]]) == [[1], [2]]
    wrongs = {"prompt": ([], {}, 5), "prompt[1]": ([1, "a"], ["a", 5], [[1], 2]), "prompt[0]": ([[]], [True], [-200])}
    for param, bad in wrongs.items():
        assert [refused(parse_completion, {"prompt": prompt}).param for prompt in bad] == [param] * len(bad)
    assert refused(parse_completion, {"prompt": ["a"] * MOST_ANSWERS, "n": 2}).param == "n"
    assert refused(parse_completion, {}).code == "missing_required_parameter"


# ---- decoding


def test_answers_are_clamped_to_the_context():
    def most(**fields):
        return [row.max_new_tokens for row in options(**fields)]

    assert most() == [100] and most(max_tokens=7) == [7] and most(max_tokens=10**30) == [100]
    assert most(max_tokens=9, max_completion_tokens=7, n=2) == [7, 7]
    assert [row.min_new_tokens for row in options(min_tokens=500)] == [100]
    assert row_options(parse_completion(b'{"prompt": "a"}'), DEFAULTS, 100)[0].max_new_tokens == 16


def test_sampling_is_the_checkpoints_where_nothing_is_said():
    (row,) = options(seed=5)
    assert row.sampling == validate(Sample(1.0, 40, 0.9, seed=5)) and row.end_ids == DEFAULTS.eos_token_ids
    fields = dict(temperature=0.5, top_k=-1, top_p=0.3, min_p=0.1, repetition_penalty=1.2)
    assert options(seed=5, **fields)[0].sampling == validate(Sample(0.5, 0, 0.3, 0.1, 1.2, 5))
    assert options(temperature=0)[0].sampling == Greedy()
    assert options(temperature=0, repetition_penalty=2, seed=0)[0].sampling.top_k == 1
    assert 0 < options(top_p=0)[0].sampling.top_p < 1e-6


def test_each_answer_has_a_seed_of_its_own():
    assert [row.sampling.seed for row in options(seed=2**32 - 1, n=3)] == [2**32 - 1, 0, 1]
    assert [row.sampling.seed for row in options(seed=-1)] == [2**32 - 1]
    assert len({int(row.sampling.seed) for row in options(n=20)}) > 15


def test_what_ends_an_answer():
    assert options(stop_token_ids=[7, 2])[0].end_ids == (2, 7)
    assert options(ignore_eos=True, stop_token_ids=[7])[0].end_ids == (7,)
    with pytest.raises(ApiError, match="stop_token_ids"):
        options(stop_token_ids=list(range(3, 3 + MOST_END_IDS)))


def test_log_probabilities():
    assert [options(**fields)[0].top_logprobs for fields in ({}, {"logprobs": True})] == [None, 0]
    assert options(logprobs=True, top_logprobs=5)[0].top_logprobs == 5
    assert parse_completion(b'{"prompt": "a", "logprobs": 3}').most_likely == 3
