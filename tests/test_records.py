"""Other people's JSON: what it says, or one line that names the place; and files that are there whole or not at all."""

import errno
import os

import pytest

from llava_jax.fields import problem_of
from llava_jax.files import write_atomically
from llava_jax.records import check_objects, parse_json, read_file, read_json_object, read_lines, read_objects


def error_of(function, *arguments, kind=ValueError):
    with pytest.raises(kind) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (
        tmp_path / "none",
        tmp_path,
        str(tmp_path / "a\0b"),
        "gs://bucket/none.json",
    ):  # no gcsfs, or no bucket
        assert error_of(read_file, path, kind=FileNotFoundError).startswith(f"{path}: cannot be read (")


def test_lines(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"a\r\n\r\nb\rc\x0b\xe2\x80\xa8d\n \n\n")
    assert read_lines(path) == [b"a", b"", b"b", "c\x0b\u2028d".encode()]
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes('{"a": 1}\n'.encode(encoding))
        assert error_of(read_lines, path) == f"{path}: is UTF-16 or UTF-32; save it as UTF-8"


@pytest.mark.parametrize("data", [b"", b'{"a', b"\xff\xfe\xff", b"[" * 100_000, b'{"a":' * 100_000, "1" * 5000])
def test_what_is_not_json(data):
    assert error_of(parse_json, data, "q.json, line 3", "get it again").startswith("q.json, line 3: not JSON (")


def test_an_object_is_expected(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert "a.json: a JSON object was expected, not list; x" in error_of(read_json_object, tmp_path / "a.json", "x")


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"id": "1", "people": [{"name": "x"}], "kind": {"of": None}, "more": 1}, None),
        ([], "expected an object with id, people, kind, got list"),
        ({"id": 1}, "has no 'people', 'kind'"),
        ({"id": True, "people": [], "kind": {"of": None}}, "id=True must be a text"),
        ({"id": None, "people": [], "kind": {"of": None}}, "id=None must be a text"),
        ({"id": 1, "people": {}, "kind": {"of": None}}, "people={} must be a list"),
        (
            {"id": 1, "people": [{"name": "x"}, 7], "kind": {"of": None}},
            "people[1]=7 must be an object",
        ),
        ({"id": 1, "people": [{"name": 7}], "kind": {"of": None}}, "people[0].name=7 must be a text"),
        ({"id": 1, "people": [], "kind": "x"}, "kind='x' must be an object"),
        ({"id": 1, "people": [], "kind": {"of": 1.5}}, "kind.of=1.5 must be null"),
    ],
)
def test_kinds(entry, problem):
    kinds = {"id": (str, int), "people": [{"name": (str,)}], "kind": {"of": (type(None),)}}
    assert problem_of(entry, kinds) == problem


def test_a_deep_or_long_value_is_shown_short():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10_000, 10**4000, [1] * 10_000):
        problem = problem_of({"id": value}, {"id": (bytes,)})
        assert problem.endswith(" must be bytes") and len(problem) < 200


def test_objects_name_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id": "2"}\n')
    assert read_objects(path, {"id": (int, str)}) == [{"id": 1}, {"id": "2"}]
    assert error_of(read_objects, path, {"id": (int,)}) == f"{path}, line 2: id='2' must be a whole number"
    path.write_text('{"id": 1}\n\n')
    assert read_objects(path, {"id": (int,)}) == [{"id": 1}]
    path.write_text('{"id": 1}\n{"id"')
    assert f"{path}, line 2: not JSON" in error_of(read_objects, path, {"id": (int,)})
    assert (
        error_of(check_objects, {}, {}, "x.json", "take all") == "x.json: expected a list of entries, got {}; take all"
    )
    assert error_of(check_objects, [{}], {"a": (int,)}, "x.json", "", "entry") == "x.json, entry 1: has no 'a'"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    write_atomically(path, b"before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
