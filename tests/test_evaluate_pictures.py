"""Pictures of a question file from anywhere, and every way in which one of them fails: it costs its own questions."""

import base64
import http.server
import io
import threading
from concurrent.futures import Future
from functools import partial

import numpy as np
import pytest
import scenes
from PIL import Image, features

from llava_jax.cli import main
from llava_jax.evaluation import pictures
from llava_jax.evaluation.evaluate_options import EvaluateOptions
from llava_jax.evaluation.run import prepare
from llava_jax.inputs.groups import Group
from llava_jax.inputs.types import ProcessedImage
from llava_jax.inputs.workers import WorkerDied


class InThisProcess:
    """Stands for `Workers`, which test_workers.py tests: processes take their time to start."""

    def __init__(self, work, count):
        self.work = work

    def submit(self, source):
        future = Future()
        try:
            if str(source).endswith("deadly.png"):
                raise WorkerDied("a data worker died")
            future.set_result(self.work(source))
        except (ValueError, WorkerDied) as error:
            future.set_exception(error)
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Changing(http.server.SimpleHTTPRequestHandler):
    """changing.png is another picture each time."""

    width = 20

    def do_GET(self):
        if self.path != "/changing.png":
            return super().do_GET()
        Changing.width += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(saved(Image.new("RGB", (Changing.width, 20)), "PNG"))

    def log_message(self, *_):
        pass


def saved(image, format):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def flipped(data, *places):
    """With other bytes there."""
    data = bytearray(data)
    for place in places:
        data[place] ^= 255
    return bytes(data)


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(Changing, directory=str(tmp_path / "images"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_picture_from_anywhere_costs_no_more_than_its_question(
    scenes_model, load_once, tmp_path, monkeypatch, capsys, address
):
    monkeypatch.setattr(pictures, "Workers", InThisProcess)
    flags, (question, *_) = scenes.write(tmp_path, 1, scenes_model)
    images = tmp_path / "images"
    good = images / "0.png"
    (images / "deadly.png").write_bytes(good.read_bytes())
    (tmp_path / "outside.png").write_bytes(good.read_bytes())
    dds = bytearray(saved(Image.new("RGBA", (8, 8)), "DDS"))
    dds[76:124] = bytes(48)  # the pixel format
    (images / "a.dds").write_bytes(dds)
    rows = {
        "0.png": None,
        f"{address}/0.png": None,
        "data:image/png;base64," + base64.b64encode(good.read_bytes()).decode(): None,
        str(good): None,
        f"file://{good}": None,
        f"{address}/missing.png": "could not be fetched: HTTP Error 404",
        "http://127.0.0.1:1/0.png": "could not be fetched: Connection refused",
        "foo://0.png": "the scheme 'foo' is not known",
        "data:image/png;base64,AAAA": "is not a picture that Pillow can read",
        f"{address}/changing.png": "at first, and is [(22, 20)] now",
        "../outside.png": "leads out of the image folder",
        "deadly.png": "deadly.png': the process that read it died, perhaps for memory",
        "a.dds": "is damaged: ",
        "\ud83d.png": "no such file",
        "\0.png": "no such file",
        "a" * 5000: "no such file",
    }
    if features.check("avif"):
        avif = saved(Image.effect_noise((64, 64), 50).convert("RGB"), "AVIF")
        (images / "a.avif").write_bytes(flipped(avif, *range(avif.rindex(b"mdat") + 8, len(avif), 7)))
        rows["a.avif"] = "is damaged: "
    entries = [{**question, "question_id": n, "image": image} for n, image in enumerate(rows)]
    scenes.write_lines(tmp_path / "questions.jsonl", entries)
    assert main(scenes.command(flags, answers_file=tmp_path / "answers.jsonl")) == 3
    answers = scenes.read_lines(tmp_path / "answers.jsonl")
    assert answers[0]["text"]
    for (image, problem), answer in zip(rows.items(), answers, strict=True):
        if problem is None:
            assert answer["text"] == answers[0]["text"] and not answer["metadata"], image[:100]
        else:
            assert problem in answer["metadata"]["error"] and len(answer["metadata"]["error"]) < 700, image[:100]
    assert f"{sum(map(bool, rows.values()))} questions could not be asked" in capsys.readouterr().err

    # No image of these is looked up in the folder, so it need not be there.
    scenes.write_lines(tmp_path / "questions.jsonl", [e for e in entries if "://" in e["image"]])
    places = dict(question_file=str(flags["--question-file"]), answers_file=str(tmp_path / "b.jsonl"))
    assert prepare(EvaluateOptions(str(flags["--model-path"]), image_folder="/nowhere", **places)).file.questions


def test_a_picture_of_several_groups_is_loaded_once(monkeypatch):
    loaded = []

    def load(config, rgb, source):
        loaded.append(source)
        return ProcessedImage(np.zeros(0, np.uint8), (4, 4))

    monkeypatch.setattr(pictures, "Workers", InThisProcess)
    monkeypatch.setattr(pictures, "load_picture", load)
    one, other, none = pictures.Picture("a", ((4, 4),)), pictures.Picture("b", ((4, 4),)), pictures.Picture(None)
    asked = [Group(np.zeros(1), (), (), picture, 1) for picture in (one, none, one, other, one)]
    with pictures.load_ahead_in_processes(None, False, asked) as ahead:
        found = list(ahead)
    assert [len(images) for _, images in found] == [1, 0, 1, 1, 1] and loaded == ["a", "b"]
    assert all(group is expected for (group, _), expected in zip(found, asked, strict=True))
