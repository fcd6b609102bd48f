"""Damage, before a conversion, during it and after it: one clear error, and nothing that looks finished."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from make_7b import ROOT, write_shards
from published import Checkpoint, check_values

from llava_jax.conversion import checksums, orbax_reader
from llava_jax.conversion.checksums import check
from llava_jax.conversion.from_hf import convert
from llava_jax.conversion.to_hf import export

# What Orbax's threads still had to say when a write of theirs had failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def fails(kind, message, tiny, tmp_path):
    with pytest.raises(kind, match=message) as error:
        convert(tiny.path, tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def flip(file, at, bit=0x10):
    content = bytearray(file.read_bytes())
    content[at] ^= bit
    file.write_bytes(content)


# ---- the source


@pytest.fixture
def sharded(tiny):
    """Its weights in shards, with an index."""
    (tiny.path / "model.safetensors").unlink()
    write_shards(tiny.path, {name: t.shape for name, t in tiny.tensors.items()}, 4000)
    return tiny


def test_shard_truncated_damaged_or_missing(sharded, tmp_path):
    shard = sorted(sharded.path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    fails(ValueError, rf"{shard.name}: truncated: {len(whole) - 2} bytes of {len(whole)}; download", sharded, tmp_path)
    shard.write_bytes(whole + b"\0\0")
    fails(ValueError, rf"{shard.name}: damaged: {len(whole) + 2} bytes of {len(whole)}; download", sharded, tmp_path)
    shard.unlink()
    fails(FileNotFoundError, rf"lists {shard.name}, absent; download it again", sharded, tmp_path)


def test_index_that_lies(sharded, tmp_path):
    index = sharded.path / "model.safetensors.index.json"
    honest = json.loads(index.read_text())["weight_map"]
    other = next(file for file in honest.values() if file != honest["model.norm.weight"])

    def lies(message, weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        fails(ValueError, f"index.json: {message}.*; download it and its files again", sharded, tmp_path)

    lies(rf"lists tensors .* hold: model.norm.weight \({other}\)", {**honest, "model.norm.weight": other})
    lies(rf"lists tensors .* hold: nothing \({other}\)", {**honest, "nothing": other})
    home = honest.pop("model.norm.weight")
    lies(rf"leaves out tensors: model.norm.weight \({home}\)", honest)


def test_every_flipped_byte_in_a_header_is_found(tiny, tmp_path):
    """It is an error, or the names, shapes and bytes that are read are the same (a bit of a tensor's name is another
    name, and then the config is not fulfilled)."""
    tiny.tensors = {name: tiny.tensors[name] for name in sorted(tiny.tensors)}
    file = tiny.path / "model.safetensors"
    whole = file.read_bytes()
    digits = [n for n in range(8, 8 + int.from_bytes(whole[:8], "little")) if whole[n : n + 1].isdigit()]
    for at in (*range(8), *digits[:: len(digits) // 15]):
        flip(file, at, 0x01)  # 0 ↔ 1, 2 ↔ 3, …
        with pytest.raises(ValueError, match=r"download it again|does not fit its config\.json"):
            convert(tiny.path, tmp_path / "out", progress=False)
        file.write_bytes(whole)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moved", ["both", "border"])
def test_offsets_that_leave_a_gap_or_do_not_fit_the_shape(tiny, tmp_path, moved):
    file = tiny.path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first, second = sorted(e["data_offsets"] for e in header.values() if "data_offsets" in e)[3:5]
    first[1] -= 2
    if moved == "both":
        first[0] -= 2
    else:
        second[0] -= 2
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    fails(ValueError, "model.safetensors: its safetensors header is damaged; download it again", tiny, tmp_path)


def test_blob_of_the_hubs_cache(tiny, tmp_path):
    """Its name is the SHA-256 of what was published."""
    file = tiny.path / "model.safetensors"
    blob = tmp_path / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    assert check_values(convert(tiny.path, tmp_path / "whole", progress=False), tiny.tensors)
    flip(blob, -1)
    fails(ValueError, rf"model.safetensors: damaged .* delete {blob} and download it again", tiny, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(tmp_path, dtype, value):
    tiny = Checkpoint(tmp_path, dtype=np.dtype(dtype))
    tiny.tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    tiny.save()
    message = "model.safetensors: language_model/layers_1/mlp/up_proj/kernel holds NaN or Inf, .* download it again"
    fails(ValueError, message, tiny, tmp_path)
    tiny.tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = ml_dtypes.finfo(dtype).max
    tiny.save()
    convert(tiny.path, tmp_path / "out", progress=False)


# ---- the disk


@contextlib.contextmanager
def small_disk(place, size):
    """A file system of `size` bytes where one may be mounted; otherwise no file may become larger."""
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if shutil.which("mount") and subprocess.run(options, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Some megabytes, and a disk that seems to have room for them."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
    return Checkpoint(tmp_path, hidden_size=256)


def size_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("way", ["in", "out"])
def test_disk_that_becomes_full(large, tmp_path, way, part):
    source = large.path
    if way == "out":
        source = convert(large.path, tmp_path / "converted", progress=False)
    run, disk = {"in": convert, "out": export}[way], tmp_path / "disk"
    with small_disk(disk, int(part * size_of(large.path))):
        with pytest.raises(OSError, match=r"disk/model: the disk became full \(.*\); free .* --output") as error:
            run(source, disk / "model", progress=False)
        assert "\n" not in str(error.value) and not list(disk.iterdir())
    run(source, disk / "model", progress=False)


FULL_AFTER_START = """
import shutil, sys
from llava_jax.cli import script
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
script("from_hf.py", "convert", sys.argv[1:])
"""


def test_command_on_a_full_disk_says_one_line(large, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, size_of(large.path) // 2):
        command = [sys.executable, "-c", FULL_AFTER_START, str(large.path), "--output", str(disk / "model")]
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {disk}/model: the disk became full")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_small_file_that_cannot_be_written(tiny, tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code), "checksums.json")

    monkeypatch.setattr(checksums, "write_json", fail)
    fails(OSError, "the disk became full" if code == errno.ENOSPC else "Input/output error", tiny, tmp_path)


# ---- what was converted


@pytest.fixture
def converted(tiny, tmp_path):
    return convert(tiny.path, tmp_path / "converted", progress=False)


def test_all_is_well(converted, tmp_path):
    assert check(converted) == []
    moved = converted.rename(tmp_path / "elsewhere")
    assert check(str(moved)) == []
    record = json.loads((moved / "checksums.json").read_text())
    assert set(record["files"]) == {p.name for p in moved.iterdir() if p.is_file()} - {"checksums.json"}
    assert record["parameters"].keys() == orbax_reader.open_stored(moved / "params").infos.keys()


def test_flipped_bytes_in_the_parameters(large, tmp_path):
    """Orbax itself reads them as if nothing were."""
    converted = convert(large.path, tmp_path / "converted", progress=False)
    kernel = large.tensors["model.layers.1.mlp.up_proj.weight"].T.tobytes()
    files = [path for path in (converted / "params").rglob("*") if path.is_file()]
    (file,) = [path for path in files if kernel in path.read_bytes()]
    flip(file, file.read_bytes().find(kernel) + 5)
    path = "language_model/layers_1/mlp/up_proj/kernel"
    assert check(converted) == [f"{path}: changed since it was written (its dtype or CRC-32 differs)"]


def test_damaged_files_of_the_parameters(large, tmp_path, monkeypatch):
    """Those that they stand in, over which tensorstore spreads them as it happens, and the one that says where."""
    state = convert(large.path, tmp_path / "converted", progress=False) / "params" / "state"
    for data in state.glob("ocdbt.*/d/*"):
        if data.stat().st_size > 100_000:  # the smaller ones say where the values are
            data.write_bytes(b"\0" * data.stat().st_size)
    paths = ("language_model/layers_0/mlp/up_proj/kernel", "language_model/lm_head/kernel")
    monkeypatch.setattr(checksums, "batches", lambda tensors: [[t for t in tensors if t.path in paths]])  # for speed
    assert [line.split(": ")[:2] for line in check(tmp_path / "converted")] == [[p, "cannot be read"] for p in paths]
    (state / "manifest.ocdbt").write_bytes(b"")
    (line,) = check(tmp_path / "converted")
    assert "params: half-written or damaged" in line


def test_parameters_missing_added_and_changed(converted, tiny, tmp_path):
    record = json.loads((converted / "checksums.json").read_text())
    lost = record["parameters"].pop("image_newline")
    record["parameters"] |= {"strange": lost}
    record["parameters"]["language_model/norm/scale"]["dtype"] = "float16"
    (converted / "checksums.json").write_text(json.dumps(record))
    assert check(converted) == [
        "strange: missing",
        "image_newline: was not written by the conversion",
        "language_model/norm/scale: changed since it was written (its dtype or CRC-32 differs)",
    ]


def test_small_files(converted):
    flip(converted / "tokenizer.model", 2)
    (converted / "generation_config.json").unlink()
    assert check(converted) == [
        "generation_config.json: missing",
        "tokenizer.model: changed since it was written (its SHA-256 differs)",
    ]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": 3, "parameters": {}}', '{"files": {}}'])
def test_damaged_record(converted, content):
    (converted / "checksums.json").write_text(content)
    (line,) = check(converted)
    assert "checksums.json" in line


def test_no_record(converted, tmp_path):
    (converted / "checksums.json").unlink()
    (line,) = check(converted)
    assert line.startswith("checksums.json: there is none (trained, or converted by an older llava_jax)")
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        check(tmp_path / "nowhere")


def test_batches_bound_the_memory(converted, monkeypatch):
    loaded, load = [], checksums.load
    monkeypatch.setattr(orbax_reader.checkpoint, "BATCH_BYTES", 4000)
    monkeypatch.setattr(checksums, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    assert check(converted) == []
    sizes = [[array.nbytes for array in batch.values()] for batch in loaded]
    assert len(sizes) > 3 and all(sum(batch) <= 4000 or len(batch) == 1 for batch in sizes)
