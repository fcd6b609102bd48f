"""VLMEvalKit evaluates a served model: what it records is what `generate` answers. Costs 21 s: half of that is the
server's start, and most of the rest compiles `generate`.

Requests, pictures and the reading of replies are as in VLMEvalKit of August 2026 and ms-vlmeval 0.0.20: `--base-url`
makes an `LMDeployAPI`; a --config file may name a `GPT4V`, whose requests are a little different.
"""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
from PIL import Image
from served import served

from llava_jax.demo.held_out import held_out_scene
from llava_jax.demo.scenes import draw

pytestmark = pytest.mark.long

FAILED = "Failed to obtain answer via API."
KEY = "sk-admin"  # what it gives if --key says nothing
POSITIONS = 512  # of the model's context
DESCRIBE, COUNT, COLOR = "Describe the picture.", "How many shapes are there?", "What color is the star?"
MODES = ("RGB", "RGBA", "L")  # of the pictures' files


@dataclass(frozen=True)
class VLMEvalKit:
    """Its client for one model; only that what fails is asked once here, and six times there.

    A message is texts and paths of pictures, in any order.
    """

    url: str
    model: str = "served"
    key: str = KEY
    system: str | None = None
    local_media: bool = False
    detail: str | None = None  # of pictures
    plain_text: bool = False  # a message without pictures is a text and no list
    fields: dict = field(default_factory=lambda: {"n": 1, "max_tokens": 32768, "temperature": 0.0})

    def generate(self, message):
        return self._answer([{"role": "user", "content": self._content(message)}])

    def chat(self, messages):
        """The answers to a user's turns, one after the other."""
        turns, answers = [], []
        for message in messages:
            turns.append({"role": "user", "content": self._content(message)})
            answers.append(self._answer(turns))
            turns.append({"role": "assistant", "content": self._content([answers[-1]])})
        return answers

    def ask(self, messages):
        """The server's reply."""
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {"model": self.model, "messages": told + messages, **self.fields}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, content=json.dumps(body), headers=headers, timeout=60)

    def _answer(self, messages):
        reply = self.ask(messages)
        if not reply.is_success:
            return FAILED
        return (streamed if self.fields.get("stream") else whole)(reply.text) or FAILED

    def _content(self, message):
        if not any(isinstance(part, Path) for part in message):
            text = "\n".join(message)
            return text if self.plain_text else [{"type": "text", "text": text}]
        return [self._picture(part) if isinstance(part, Path) else {"type": "text", "text": part} for part in message]

    def _picture(self, path):
        url = f"file://{path}" if self.local_media else data_uri(path)
        detail = {} if self.detail is None else {"detail": self.detail}
        return {"type": "image_url", "image_url": {"url": url, **detail}}


def as_jpeg(path):
    """A picture as it is sent; those with a side under 100 pixels, of which there is none here, are enlarged."""
    file = io.BytesIO()
    with Image.open(path) as picture:
        (picture.convert("RGB") if picture.mode in ("RGBA", "P", "LA") else picture).save(file, "JPEG")
    return file.getvalue()


def data_uri(path):
    return "data:image/jpeg;base64," + base64.b64encode(as_jpeg(path)).decode()


def whole(text):
    return json.loads(text)["choices"][0]["message"]["content"].strip()


def streamed(text):
    events = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    choices = [json.loads(event)["choices"] for event in events[: events.index("[DONE]")]]
    return "".join(some[0]["delta"].get("content") or "" for some in choices if some).strip()


LMDEPLOY = {}
STREAM = {"fields": {"n": 1, "max_tokens": 32768, "temperature": 0.0, "stream": True}}  # --stream
GPT4V = {"fields": {"temperature": 0, "max_tokens": 2048}, "detail": "low", "plain_text": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("LMUData")


@pytest.fixture(scope="module")
def paths(folder):
    """Pictures that the model has not seen, one of each of MODES."""
    paths = [folder / f"{mode}.png" for mode in MODES]
    for number, path in enumerate(paths):
        draw(held_out_scene(0, number)).convert(path.stem).save(path)
    return paths


@pytest.fixture(scope="module")
def client(scenes_model, folder):
    flags = ["--api-key", KEY, "--allowed-media-path", str(folder), "--max-num-seqs", "8"]
    with served(scenes_model, *flags) as server:
        yield VLMEvalKit(server.url)


@pytest.fixture(scope="module")
def generate(bundled):
    """(pictures, prompt) → what the model answers in this process."""
    llava, params = bundled
    return lambda pictures, prompt: llava.generate(params, pictures, prompt, max_new_tokens=100)


@pytest.mark.parametrize("kind", [LMDEPLOY, STREAM, GPT4V], ids=["LMDeployAPI", "stream", "GPT4V"])
def test_a_benchmark_is_answered_as_generate_answers_it(client, generate, paths, kind):
    questions = [[path, question] for question in (DESCRIBE, COUNT, COLOR) for path in paths]
    with ThreadPoolExecutor(32) as threads:  # --api-nproc
        answers = list(threads.map(replace(client, **kind).generate, questions))
    assert answers == [generate(as_jpeg(path), question) for path, question in questions]
    assert len(set(answers)) > 3


@pytest.mark.parametrize("kind", [LMDEPLOY, GPT4V], ids=["LMDeployAPI", "GPT4V"])
def test_pictures_among_words_go_to_the_front(client, generate, paths, kind):
    client, shown = replace(client, **kind), [as_jpeg(path) for path in paths[:2]]
    assert client.generate(["Look:", paths[0], DESCRIBE, paths[1], "Now."]) == generate(shown, f"Look: {DESCRIBE} Now.")
    assert client.generate(["Look.", COUNT]) == generate(None, f"Look.\n{COUNT}")


def test_a_system_prompt(client, generate, paths):
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DESCRIBE}]
    answer = replace(client, system="Be brief.").generate([paths[0], DESCRIBE])
    assert answer == generate(as_jpeg(paths[0]), told) != generate(as_jpeg(paths[0]), DESCRIBE)


def test_a_chat(client, generate, paths):
    answers = client.chat([[paths[0], DESCRIBE], [COUNT], [paths[1], COLOR]])
    turns, shown = [DESCRIBE, answers[0], COUNT, answers[1], f"<image>\n{COLOR}"], [as_jpeg(path) for path in paths[:2]]
    expected = [generate(shown[:1], turns[:1]), generate(shown[:1], turns[:3]), generate(shown, turns)]
    assert answers == expected


def test_files_are_sent_as_they_are(client, generate, paths):
    """--local-media."""
    client = replace(client, local_media=True)
    assert [client.generate([path, DESCRIBE]) for path in paths] == [generate(str(path), DESCRIBE) for path in paths]


def test_more_tokens_than_there_is_room_for(client, paths):
    """--extra-body '{"ignore_eos": true}'."""
    asked = replace(client, fields=client.fields | {"ignore_eos": True})
    said = asked.ask([{"role": "user", "content": COUNT}]).json()
    assert said["choices"][0]["finish_reason"] == "length" and said["usage"]["total_tokens"] == POSITIONS


def test_a_failure_is_recorded_as_one_and_the_server_goes_on(client, generate, paths, folder):
    unreadable, cut = folder / "unreadable.png", folder / "cut.png"
    unreadable.write_bytes(b"no picture")
    cut.write_bytes(paths[0].read_bytes()[:300])
    local = replace(client, local_media=True)
    failed = [local.generate([path, DESCRIBE]) for path in (unreadable, cut, Path("/elsewhere.png"))]
    failed += [replace(client, model="another").generate([COUNT]), replace(client, key="another").generate([COUNT])]
    failed += [client.generate([COUNT * POSITIONS])]  # too long
    assert failed == [FAILED] * 6
    assert client.generate([paths[0], DESCRIBE]) == generate(as_jpeg(paths[0]), DESCRIBE)
