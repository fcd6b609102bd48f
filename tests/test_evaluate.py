"""Question files to answer files in one process: what is written, what cannot be asked, what a stopped run leaves."""

import base64
import json
import re
import resource
import shutil
from concurrent.futures import Future

import fsspec
import pytest
import scenes
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import llava_jax
from llava_jax.checkpoint import fingerprint
from llava_jax.cli import main
from llava_jax.demo.model import BUNDLED, NAME, convert_published
from llava_jax.evaluation import pictures
from llava_jax.evaluation.answers import AnswerFile, AnswerShard, answer_line, failure_of
from llava_jax.evaluation.evaluate_options import EvaluateOptions
from llava_jax.evaluation.questions import Question
from llava_jax.evaluation.run import by_image, described, prepare

pytestmark = pytest.mark.usefixtures("load_once")
ASKED = Question(1, "?", "?", None, answer_id="x" * 22)


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory, scenes_model):
    """(flags, questions, the finished answer file)"""
    folder = tmp_path_factory.mktemp("benchmark")
    flags, questions = scenes.write(folder, 5, scenes_model)
    assert main(scenes.command(flags, answers_file=folder / "answers.jsonl")) == 0
    return flags, questions, folder / "answers.jsonl"


def test_answers_are_those_of_one_question_at_a_time(benchmark):
    flags, questions, answers = benchmark
    answers = scenes.read_lines(answers)
    assert [a["question_id"] for a in answers] == [q["question_id"] for q in questions]
    assert [a["prompt"] for a in answers] == [q["text"] for q in questions]
    assert list(answers[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert all(a["model_id"] == "llava-v1.6-scenes" and a["metadata"] == {} for a in answers)
    assert len({a["answer_id"] for a in answers}) == len(answers) and all(len(a["answer_id"]) == 22 for a in answers)
    llava, params = llava_jax.load(flags["--model-path"])
    for question, answer in list(zip(questions, answers, strict=True))[::7]:
        picture = flags["--image-folder"] / question["image"]
        assert answer["text"] == llava.generate(params, picture, question["text"], max_new_tokens=24)
    right = [q["answer"] == a["text"] for q, a in zip(questions, answers, strict=True)]
    assert sum(right) > 0.8 * len(right)


def test_a_chunk_is_answered_to_a_file_of_its_own(benchmark, tmp_path):
    flags, questions, answers = benchmark
    out = tmp_path / "new" / "1.jsonl"
    assert main(scenes.command(flags, answers_file=out, num_chunks=4, chunk_idx=1)) == 0
    size = -(-len(questions) // 4)
    texts = [a["text"] for a in scenes.read_lines(answers)]
    assert [a["text"] for a in scenes.read_lines(out)] == texts[size : 2 * size]


@pytest.fixture
def damaged(benchmark, tmp_path):
    """A question of every kind that cannot be asked, among those that can."""
    flags, questions, _ = benchmark
    images = tmp_path / "images"
    shutil.copytree(flags["--image-folder"], images)
    (images / "no_picture.png").write_text("no picture")
    whole = (images / "0.png").read_bytes()
    (images / "cut_off.png").write_bytes(whole[: len(whole) // 2])
    entries = [dict(questions[0]) for _ in range(6)]
    entries[1]["image"], entries[2]["image"], entries[3]["image"] = "missing.png", "no_picture.png", "cut_off.png"
    entries[4]["text"] = "Is it? " * 400
    lines = [json.dumps(entry) for entry in entries] + ['{"question_id": 7, "image": "0.png"}', '{"question_id"']
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return flags | {"--image-folder": images, "--question-file": tmp_path / "questions.jsonl"}


def test_what_cannot_be_asked_is_listed_and_the_order_stays(damaged, benchmark, tmp_path, capsys):
    wanted = scenes.read_lines(benchmark[2])[0]["text"]
    out = tmp_path / "answers.jsonl"
    assert main(scenes.command(damaged, answers_file=out)) == 3
    answers = scenes.read_lines(out)
    assert [a["text"] for a in answers] == [wanted, "", "", "", "", wanted, "", ""]
    problems = ["missing.png': no such file", "no_picture.png' is not a picture", "cut_off.png' is damaged"]
    problems += ["more than this model's tokenizer_model_max_length=512", "line 7: has no 'text'", "line 8: not JSON"]
    listed = capsys.readouterr().err.splitlines()
    assert listed[-1] == "6 questions could not be asked; metadata.error says why"
    failed = [a["metadata"]["error"] for a in answers if a["metadata"]]
    for problem, error, line in zip(problems, failed, listed[-7:-1], strict=True):
        assert problem in error and problem in line
    assert answers[6]["question_id"] == 7 and answers[7]["question_id"] is None

    shutil.copy(damaged["--image-folder"] / "0.png", damaged["--image-folder"] / "missing.png")
    before = out.read_text().splitlines()
    assert main(scenes.command(damaged, answers_file=out)) == 3  # asks again what could not be asked, and nothing else
    after = out.read_text().splitlines()
    assert [n for n in range(8) if before[n] != after[n]] == [1] and json.loads(after[1])["text"] == wanted
    assert sorted(path.name for path in tmp_path.glob("answers*")) == ["answers.jsonl"]


def test_strict_stops_before_the_model_is_loaded(damaged, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llava_jax, "load", lambda *args: pytest.fail("loaded"))
    assert main(scenes.command(damaged, answers_file=tmp_path / "answers.jsonl", strict=True)) == 1
    assert "question 0: image " in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--image-folder": "/nowhere"}, "--image-folder '/nowhere': no such directory"),
        ({"--question-file": "/nowhere.jsonl"}, "/nowhere.jsonl: cannot be read"),
        ({"--model-path": "/nowhere"}, "/nowhere: no such directory"),
        ({"--max_new_tokens": 0}, "--max_new_tokens 0 must be at least 1"),
        ({"--temperature": -1}, "temperature=-1.0 "),
        ({"--num-chunks": 2, "--chunk-idx": 2}, "chunk 2 of 2"),
        ({"--mesh": "fsdp=2"}, "--mesh: fsdp is none of data, tensor"),
        ({"--task": "pope", "--lang": "cn"}, "--lang cn: pope has en"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(benchmark, tmp_path, capsys, change, message):
    assert main(scenes.command(benchmark[0] | change, answers_file=tmp_path / "answers.jsonl")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and lines[-1].startswith("llava-jax: error: ")
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_goes_on_where_it_was(benchmark, tmp_path, capsys):
    flags, _, answers = benchmark
    lines, out = answers.read_bytes().splitlines(keepends=True), tmp_path / "answers.jsonl"
    (tmp_path / "answers.jsonl.part-0").write_bytes(b"".join(lines[3:9]) + lines[9][:20])  # cut off within a line
    (tmp_path / "answers.jsonl.part-3").write_bytes(lines[20] + lines[21][:-1])  # of a run on more hosts
    assert main(scenes.command(flags, answers_file=out)) == 0
    assert out.read_bytes() == answers.read_bytes() and len(list(tmp_path.iterdir())) == 1
    assert f"{len(lines) - 7} questions on" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(benchmark, tmp_path, monkeypatch):
    flags, _, answers = benchmark
    out = tmp_path / "answers.jsonl"
    shutil.copy(answers, out)
    monkeypatch.setattr(llava_jax, "load", lambda *args: pytest.fail("loaded"))
    assert main(scenes.command(flags, answers_file=out)) == 0
    assert out.read_bytes() == answers.read_bytes() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.part-0"])
def test_answers_of_another_run_are_not_touched(benchmark, tmp_path, capsys, name):
    flags, _, answers = benchmark
    shutil.copy(answers, tmp_path / name)
    other = scenes.command(flags, answers_file=tmp_path / "answers.jsonl", conv_mode="llava_v0")
    assert main(other) == 1
    assert f"{name}, line 1: not an answer to these questions by this model" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == answers.read_bytes()


@pytest.fixture(scope="module")
def tuned(benchmark, tmp_path_factory):
    """The same model under the same name, but for one bit of one weight."""
    folder = tmp_path_factory.mktemp("tuned")
    published = folder / "published" / NAME
    shutil.copytree(BUNDLED, published)
    weights = published / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    return convert_published(published, folder / NAME)


def _copied(source, directory, **changes):
    """A checkpoint's copy whose manifest is changed; None takes a key out."""
    shutil.copytree(source, directory)
    path = directory / "llava_jax.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))
    return directory


@pytest.mark.parametrize("changes", [{}, {"fingerprint": None}])
def test_answers_of_other_weights_are_refused(benchmark, tuned, tmp_path, capsys, monkeypatch, changes):
    """By a model of the same name, whether or not its fingerprint was written down."""
    flags, _, answers = benchmark
    other = _copied(tuned, tmp_path / "other", **changes)
    monkeypatch.setattr(llava_jax, "load", lambda *args, **keywords: pytest.fail("loaded"))
    out = tmp_path / "answers" / "a.jsonl"
    out.parent.mkdir()
    shutil.copy(answers, out)
    assert main(scenes.command(flags | {"--model-path": other}, answers_file=out)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out}, line 1: not an answer to these questions by this model" in error
    assert f"(it is by '{NAME}', with other weights than this checkpoint's" in error and "name another" in error
    assert main(scenes.command(flags, answers_file=out, conv_mode="v0")) == 1
    assert f"(it is by '{NAME}', with these weights, but with another template" in capsys.readouterr().err
    assert out.read_bytes() == answers.read_bytes() and len(list(out.parent.iterdir())) == 1


def test_weights_are_known_wherever_they_are(benchmark, tuned, tmp_path):
    """Converted once more: the same. Of what was converted before there were fingerprints, a copy is the same."""
    first = benchmark[0]["--model-path"]
    again = convert_published(BUNDLED, tmp_path / "again")
    assert fingerprint(again) == fingerprint(first) != fingerprint(tuned)
    older, copied = (_copied(first, tmp_path / name, fingerprint=None) for name in ("older", "copied"))
    others = (
        _copied(again, tmp_path / "older again", fingerprint=None),
        _copied(tuned, tmp_path / "t", fingerprint=None),
    )
    assert fingerprint(older) == fingerprint(copied)
    assert len({fingerprint(path) for path in (first, older, tuned, *others)}) == 5


def test_another_config_over_the_same_weights_is_another_model(benchmark, tmp_path, capsys):
    flags, _, answers = benchmark
    shutil.copytree(flags["--model-path"], tmp_path / NAME)
    config = json.loads((tmp_path / NAME / "config.json").read_text()) | {"image_aspect_ratio": "pad"}
    (tmp_path / NAME / "config.json").write_text(json.dumps(config))
    shutil.copy(answers, tmp_path / "answers.jsonl")
    flags = flags | {"--model-path": tmp_path / NAME}
    assert main(scenes.command(flags, answers_file=tmp_path / "answers.jsonl")) == 1
    assert "not an answer to these questions by this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, origin",
    [
        (b"[" * 100_000, "it is no JSON object"),
        (b"\xff\xfe", "it is no JSON object"),
        (b'{"answer_id": ["x"], "model_id": {}}', "it is by {}, with other weights"),
        (b'{"question_id": 1, "text": "x"}', "it is by None, with other weights"),
    ],
)
def test_a_line_that_is_no_answer_is_named(tmp_path, line, origin):
    (tmp_path / "a.jsonl.part-0").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="line 1: not an answer to these questions") as error:
        AnswerFile(epath.Path(tmp_path / "a.jsonl"), [ASKED]).answered()
    assert origin in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", [None, [], "x", {"error": {}}, {"error": 0}, {"error": ["why"]}, {"error": 7}])
def test_answers_with_odd_metadata_are_gone_on_with(tmp_path, metadata):
    answer = {"answer_id": "x" * 22} | ({"metadata": metadata} if metadata is not None else {})
    path = epath.Path(tmp_path / "a.jsonl")
    path.write_text(json.dumps(answer) + "\n")
    ((answer_id, line),) = AnswerFile(path, [ASKED]).answered().items()
    assert answer_id == ASKED.answer_id and failure_of(line) in (None, "['why']", "7")


def test_a_full_disk_is_named_and_what_is_answered_stays(tmp_path):
    """Every file of this process may have a kilobyte here."""
    questions = [Question(n, "?", "x" * 100, None, answer_id=f"{n:022}") for n in range(8)]
    lines = [answer_line(question, "y", "model") for question in questions]
    file = AnswerFile(epath.Path(tmp_path / "a.jsonl"), questions)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    part = AnswerShard(file.part(0))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        part.append(lines[:3])
        with pytest.raises(
            OSError, match=r"a.jsonl.part-0: cannot be written \(File too large\); what is answered is kept"
        ):
            part.append(lines[3:])
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        part = AnswerShard(file.part(0))
        assert set(file.answered()) >= {q.answer_id for q in questions[:3]} and len(file.answered()) < 8
        part.append(line for q, line in zip(questions, lines, strict=True) if q.answer_id not in file.answered())
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match=r"a.jsonl: cannot be written \(File too large\); what is answered is kept"):
            file.merge()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.part-0"]
    file.merge()
    assert (tmp_path / "a.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize("name", ["a[1].jsonl", "*.jsonl", "a b\nc?.jsonl", "é\udc80.jsonl"])
def test_parts_are_found_whatever_the_file_is_called(tmp_path, name):
    file = AnswerFile(epath.Path(tmp_path / name), [ASKED])
    AnswerShard(epath.Path(tmp_path / "b.jsonl.part-0")).append(["{}\n"])  # of another file, whose name * would match
    AnswerShard(file.part(0)).append([answer_line(ASKED, "yes", "model")])
    assert list(file.answered()) == [ASKED.answer_id]
    file.merge()
    assert {path.name for path in tmp_path.iterdir()} == {name, "b.jsonl.part-0"}


def test_a_line_about_a_question_is_one_line():
    assert described(Question("a/b c.jpg", "", "", None), "why") == "question a/b c.jpg: why"
    assert described(Question("a\n\ud83d", "", "", None), "why") == r"question 'a\n\ud83d': why"


def test_a_bucket_that_takes_nothing_is_named(in_memory, monkeypatch):
    part = AnswerShard(epath.Path("gs://full/a.jsonl.part-0"))

    def refuse(*_, **__):
        raise RuntimeError("429, rate limit")  # of a kind of its own, as gcsfs'

    monkeypatch.setattr(_Bucket, "_open", refuse)
    with pytest.raises(
        OSError, match=r"^gs://full/a.jsonl.part-0: cannot be written \(RuntimeError: 429, rate limit\); what is answ"
    ):
        part.append(["{}\n"])


def test_nothing_is_loaded_where_nothing_can_be_asked(benchmark, tmp_path, capsys, monkeypatch):
    flags, questions, _ = benchmark
    scenes.write_lines(
        tmp_path / "questions.jsonl", [questions[0] | {"image": "missing.png"}, questions[1] | {"text": 1}]
    )
    monkeypatch.setattr(llava_jax, "load", lambda *args, **keywords: pytest.fail("loaded"))
    flags = flags | {"--question-file": tmp_path / "questions.jsonl"}
    assert main(scenes.command(flags, answers_file=tmp_path / "a.jsonl")) == 3
    assert [bool(a["metadata"]["error"]) for a in scenes.read_lines(tmp_path / "a.jsonl")] == [True, True]


def test_damaged_annotations_are_told_before_anything_is_asked(benchmark, tmp_path, capsys):
    (tmp_path / "val.json").write_text('{"data": [{"image_id": 5}]}')
    flags = benchmark[0] | {"--task": "textvqa", "--annotations": tmp_path / "val.json"}
    assert main(scenes.command(flags, answers_file=tmp_path / "a.jsonl")) == 1
    assert "val.json, entry 1: has no 'question', 'answers'" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_options_that_are_not_asked_are_told(benchmark, tmp_path, capsys):
    flags, _, _ = benchmark
    table = "index\tquestion\thint\tA\tB\tC\tD\timage\n"
    table += "".join(f"{n}\tWhich?\t\tred\tNone\tblue\t\t\n" for n in range(25))  # no picture: nothing is asked
    (tmp_path / "q.tsv").write_text(table)
    out = tmp_path / "a.jsonl"
    assert main(scenes.command(flags | {"--question-file": tmp_path / "q.tsv"}, answers_file=out)) == 3
    told = [line for line in capsys.readouterr().err.splitlines() if "counts as empty" in line]
    assert len(told) == 20 and told[0] == (
        f"{tmp_path}/q.tsv, line 2, column B: 'None' counts as empty, as in the original; not asked: B, C"
    )
    assert told[-1].endswith("; and 5 more rows")


def _stop_after(append, times):
    """Ctrl-C after so many appends of anything."""

    def stopping(part, lines):
        nonlocal times
        lines = list(lines)
        append(part, lines)
        times -= bool(lines)
        if not times:
            raise KeyboardInterrupt

    return stopping


def test_ctrl_c_keeps_what_is_answered(benchmark, tmp_path, capsys, monkeypatch):
    flags, _, answers = benchmark
    monkeypatch.setattr(AnswerShard, "append", _stop_after(AnswerShard.append, 1))
    out = tmp_path / "answers.jsonl"
    assert main(scenes.command(flags, answers_file=out)) == 130
    assert "start it again" in capsys.readouterr().err
    kept = (tmp_path / "answers.jsonl.part-0").read_text().splitlines()
    assert kept and set(kept) < set(answers.read_text().splitlines())


def test_one_command_gives_the_answers_and_the_score(benchmark, tmp_path, capsys):
    flags, questions, _ = benchmark
    asked = [q for q in questions if q["answer"] in ("Yes", "No", "yes", "no")]
    labels = [{"image": q["image"], "label": q["answer"].lower()} for q in asked]
    scenes.write_lines(
        tmp_path / "pope.jsonl", [{**q, "question_id": n, "category": "random"} for n, q in enumerate(asked)]
    )
    (tmp_path / "coco").mkdir()
    scenes.write_lines(tmp_path / "coco" / "coco_pope_random.json", labels)
    flags = flags | {"--question-file": tmp_path / "pope.jsonl", "--task": "pope"}
    assert main(scenes.command(flags, answers_file=tmp_path / "a.jsonl", annotations=tmp_path / "coco")) == 0
    answers = scenes.read_lines(tmp_path / "a.jsonl")
    right = sum(a["text"].lower() == label["label"] for a, label in zip(answers, labels, strict=True))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["wrote", str(tmp_path / "a.jsonl")] and lines[1][:3] == ["pope,", str(len(asked)), "answers"]
    assert ["random", "accuracy", f"{100 * right / len(asked):.2f}"] in [line[:3] for line in lines]
    assert main(scenes.command(flags, answers_file=tmp_path / "b.jsonl", annotations=tmp_path / "none")) == 1
    assert "none: not there; pope needs the folder" in capsys.readouterr().err and not (tmp_path / "b.jsonl").exists()


@pytest.mark.long  # every day test_questions.py reads what these read, and asks nothing
def test_science_and_mmbench(benchmark, tmp_path, capsys):
    """Text alone, and a picture within the file; the bundled model has nothing to say to either."""
    flags, _, _ = benchmark
    picture = flags["--image-folder"] / "0.png"
    asked = [{"id": "a", "conversations": [{"from": "human", "value": "<image>\nWhat color is the heart?"}]}] * 2
    asked[1] = asked[1] | {"image": "0.png"}
    (tmp_path / "science.json").write_text(json.dumps(asked))
    science = flags | {"--question-file": tmp_path / "science.json", "--task": "scienceqa"}
    assert main(scenes.command(science, answers_file=tmp_path / "science.jsonl")) == 0
    alone, shown = scenes.read_lines(tmp_path / "science.jsonl")
    assert alone["prompt"].startswith("What color is the heart?\nAnswer with the option's letter")
    assert shown["prompt"] == "<image>\n" + alone["prompt"] and shown["question_id"] == "a"
    llava, params = llava_jax.load(flags["--model-path"])
    assert shown["text"] == llava.generate(params, picture, alone["prompt"], max_new_tokens=24)

    encoded = base64.b64encode(picture.read_bytes()).decode()
    table = f"index\tquestion\thint\tA\tB\tC\tD\timage\n5\tWhich?\t\tred\tblue\t\t\t{encoded}\n"
    (tmp_path / "mmbench.tsv").write_text(table)
    mmbench = flags | {"--question-file": tmp_path / "mmbench.tsv", "--all-rounds": True}
    assert main(scenes.command(mmbench, answers_file=tmp_path / "mmbench.jsonl")) == 0
    first, second = scenes.read_lines(tmp_path / "mmbench.jsonl")
    keys = ["question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata"]
    assert list(first) == keys and first["prompt"] == "Which?\nA. red\nB. blue"
    assert second["round_id"] == 1 and second["options"] == ["blue", "red"] and second["option_char"] == ["B", "A"]


def test_pictures_are_seen_as_the_references_programs_see_them(model, tmp_path):
    """No EXIF; science and mmbench in the file's own mode."""
    config = model("vicuna")[0].config
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.load_picture(config, True, str(tmp_path / "turned.jpg")).size == (40, 20)
    glass = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    glass.paste((0, 0, 255, 255), (0, 0, 20, 20))
    glass.save(tmp_path / "glass.png")
    seen = [pictures.load_picture(config, rgb, str(tmp_path / "glass.png")) for rgb in (True, False)]
    smooth, sharp = (picture.tiles for picture in seen)
    assert 100 < smooth[0, 0, 168, 0] < 155 and sharp[0, 0, 168, 0] < 20


def test_questions_on_one_image_are_together_and_text_in_sixteens():
    images = ["a", "b", "a", b"c", None, b"c", *[None] * 20]
    questions = [Question(n, "?", "?", image) for n, image in enumerate(images)]
    together = [[question.question_id for question in share] for share in by_image(questions)]
    assert together == [[0, 2], [1], [3, 5], [4, *range(6, 21)], [*range(21, 26)]]


def test_a_plain_model_gets_the_mmtag_template(benchmark, tmp_path):
    flags, _, _ = benchmark
    plain = tmp_path / "llava-plain"
    shutil.copytree(flags["--model-path"], plain)
    manifest = json.loads((plain / "llava_jax.json").read_text())
    (plain / "llava_jax.json").write_text(json.dumps(manifest | {"name": "llava-plain"}))
    others = dict(question_file=str(flags["--question-file"]), image_folder=str(flags["--image-folder"]))
    options = EvaluateOptions(str(plain), answers_file=str(tmp_path / "a.jsonl"), conv_mode="v1", **others)
    assert prepare(options).conv_mode == "v1_mmtag"


class _NoProcesses:
    def __init__(self, work, count):
        self.work = work

    def submit(self, *task):
        future = Future()
        future.set_result(self.work(*task))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def in_memory():
    """gs:// is a file system in memory, from here on in this process."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Bucket, clobber=True)


class _Bucket(MemoryFileSystem):
    """As gcsfs names things: without a slash in front."""

    protocol = "gs"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub("^gs://", "", str(path)))

    def glob(self, path, **kwargs):
        return [found.lstrip("/") for found in super().glob(path, **kwargs)]


def test_files_in_a_bucket(benchmark, in_memory, tmp_path, monkeypatch):
    """Questions, pictures, tokenizer, config and answers of an object store; its weights Orbax reads by itself."""

    flags, _, answers = benchmark
    bucket = fsspec.filesystem("gs")
    bucket.put(str(flags["--image-folder"]), "gs://bucket/images", recursive=True)
    bucket.put(str(flags["--question-file"]), "gs://bucket/questions.jsonl")
    flags = flags | {"--image-folder": "gs://bucket/images", "--question-file": "gs://bucket/questions.jsonl"}
    monkeypatch.setattr(pictures, "Workers", _NoProcesses)  # they would not know this bucket
    out = "gs://bucket/out/answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(AnswerShard, "append", _stop_after(AnswerShard.append, 2))
        assert main(scenes.command(flags, answers_file=out)) == 130
    assert len(bucket.ls("gs://bucket/out")) == 3  # the part's beginning, and what was answered
    assert main(scenes.command(flags, answers_file=out)) == 0
    assert bucket.cat("gs://bucket/out/answers.jsonl") == answers.read_bytes()
    assert [path.split("/")[-1] for path in bucket.ls("gs://bucket/out", detail=False)] == ["answers.jsonl"]
