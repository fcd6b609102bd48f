"""A converted checkpoint on disk: small JSON files beside an Orbax directory of parameters."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from llava_jax.config import LlavaConfig
from llava_jax.config_schema import FILES, read_checked, read_if_there
from llava_jax.constants import DTYPES
from llava_jax.errors import listed, reason_of
from llava_jax.fields import require
from llava_jax.inputs.conversation import check_conv_mode
from llava_jax.models.llava_llama import param_shapes
from llava_jax.models.quantize import SCALE, check_quantize, is_quantized, quantize_leaves, quantized_paths, with_scales
from llava_jax.parallel.sharding import param_shardings
from llava_jax.parallel.target import default_dtype
from llava_jax.records import naming, read_json_object

VERSION = 1
CONVERT_AGAIN = "convert the checkpoint again with convert/from_hf.py"
MANIFEST = "llava_jax.json"
PARAMS = "params"
CHECKSUMS = "checksums.json"  # of what a conversion, or a training run, wrote
ADAPTERS, TRAIN_OPTIONS = "lora", "train_options.json"  # what a training run leaves beside them
BATCH_BYTES = 512 << 20  # of tensors that are read, or written, at once while streaming
CHUNK_BYTES = 8 << 20  # of a stored array: so small that a device reads little more than its own shard
WRITE_BYTES = 128 << 20  # in flight while saving: more takes memory, and is no faster
READ_BYTES = 128 << 20  # in flight while loading: more takes memory, and is slower


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array_options.saving.use_compression = False  # weights hardly compress, and it costs minutes
    context.array_options.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory_options.deepcopy_host_arrays = False
    context.memory_options.write_concurrent_bytes = WRITE_BYTES
    return context


def save_params(path: str | Path, params: dict) -> None:
    """Write a tree of parameters as the Orbax directory `path` (a checkpoint's is DIR/params), which must be new.

    Raises:
        OSError: it cannot be written (a full disk).
    """
    with _writable(path), _context():
        ocp.save(Path(path).absolute(), params)


def stream_params(path: str | Path, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
    """`save_params` for a model that is larger than memory: ("a/b/kernel", array) pairs, written as they come.

    Arrays are copied, so that they may be filled anew when the next one is asked for. A batch is made (in a thread)
    while the one before it is written: two are in memory.
    """
    path, batches = Path(path).absolute(), _batches(leaves)
    with _context(), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while batch := coming.result():
            coming = thread.submit(next, batches, None)
            with _writable(path):
                ocp.partial.save(path, unflatten_dict(batch, sep="/"))
        with _writable(path):
            ocp.partial.finalize(path)


def _batches(leaves: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Batches that fit in a buffer. Two buffers take turns, for reused memory costs a third of what new memory does."""
    buffers, end = [np.empty(BATCH_BYTES, np.uint8) for _ in range(2)], 0
    held: dict[str, np.ndarray] = {}
    for name, array in leaves:
        if held and end + array.nbytes > BATCH_BYTES:
            yield held
            buffers, held, end = buffers[::-1], {}, 0
        held[name] = _copy(array, buffers[0][end : end + array.nbytes])
        end += -(-array.nbytes // 64) * 64
    if held:
        yield held


def _copy(array: np.ndarray, room: np.ndarray) -> np.ndarray:
    if room.nbytes < array.nbytes:  # a batch of its own
        return np.array(array)
    room[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return room.view(array.dtype).reshape(array.shape)


@contextlib.contextmanager
def _writable(path: str | Path):
    """Raises as an OSError again what tensorstore tells of a failed write as text."""
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def read_manifest(directory: Path) -> dict:
    """`llava_jax.json`, after checking that the directory is a finished one of this version."""
    convert = "python convert/from_hf.py"
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory; a published checkpoint (hub id or directory) becomes one with "
            f"`{convert} {shlex.quote(str(directory))}`"
        )
    if not (directory / MANIFEST).is_file():
        published = (directory / "config.json").is_file() and [
            p for pattern in ("*.safetensors", "*.bin") for p in directory.glob(pattern)
        ]
        if published:
            name = directory.absolute()
            command = f"{convert} {shlex.quote(str(name))} --output {shlex.quote(f'{name}-jax')}"
            raise ValueError(f"{directory}: a published checkpoint, not converted yet; run `{command}` and load that")
        raise ValueError(f"{directory}: no llava_jax checkpoint (it has no {MANIFEST}); make one with `{convert}`")
    manifest = read_json_object(directory / MANIFEST, CONVERT_AGAIN)
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{directory}: version {manifest.get('version')!r}, and this llava_jax reads version {VERSION}; "
            f"update llava_jax, or convert the checkpoint again with `{convert}`"
        )
    require(manifest, FILES[MANIFEST], directory / MANIFEST, CONVERT_AGAIN)
    if not (directory / PARAMS).is_dir():
        raise ValueError(
            f"{directory}: half-written (it has no {PARAMS}); delete it and convert again with `{convert}`"
        )
    return manifest


def load_config(directory: str | Path) -> LlavaConfig:
    """The config of a converted checkpoint, with its tower's, its preprocessing and its generation defaults.

    Raises:
        FileNotFoundError, ValueError: not a finished checkpoint of this version; the message says what to do.
    """
    files = epath.Path(directory).expanduser()
    manifest = read_manifest(files)
    names = ("config.json", "vision_config.json", "preprocessor_config.json")
    config, vision, preprocessor = (read_checked(files / name, CONVERT_AGAIN) for name in names)
    defaults = read_if_there(files / "generation_config.json", CONVERT_AGAIN)
    with naming(files):
        read = LlavaConfig.from_hf(config, vision, preprocessor, defaults, manifest.get("name", ""))
    conv_mode = manifest.get("conv_mode")  # older conversions wrote none
    if conv_mode is not None:
        check_conv_mode(conv_mode, str(files / MANIFEST))
    return read.replace(reading=manifest.get("reading", "original"), conv_mode=conv_mode)


def fingerprint(directory: str | Path) -> str:
    """What tells a checkpoint's weights from any others: a conversion or a training run writes it down.

    For an older checkpoint it is made of the names and sizes of the files under params, which Orbax names at random.

    Raises:
        FileNotFoundError, ValueError: not a finished checkpoint of this version.
    """
    files = epath.Path(directory).expanduser()
    written = read_manifest(files).get("fingerprint")
    if isinstance(written, str):
        return written
    return hashlib.sha256(json.dumps(sorted(_names_and_sizes(files / PARAMS))).encode()).hexdigest()


def _names_and_sizes(directory: epath.Path) -> Iterator[tuple[str, int]]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _names_and_sizes(path)
        else:
            yield path.name, path.stat().length


def check_small_files(directory: str | Path) -> None:
    """Compare the small files with the SHA-256 that the conversion recorded, if it did.

    JSON that differs is warned about, for somebody may have edited it.

    Raises:
        ValueError: the tokenizer's model differs, which nobody edits.
    """
    files = epath.Path(directory).expanduser()
    if not (files / CHECKSUMS).is_file():
        return
    record = read_checked(files / CHECKSUMS, CONVERT_AGAIN)["files"]
    names = [name for name in record if name.endswith((".json", ".jinja", ".model")) and "/" not in name]
    changed = [name for name in names if not (files / name).is_file() or sha256(files / name) != record[name]]
    for name in changed:
        told = f"{files / name}: not what the conversion wrote (its SHA-256 differs, or it is gone)"
        if name.endswith(".model"):
            raise ValueError(f"{told}; {CONVERT_AGAIN}")
        warnings.warn(f"{told}; if nobody edited it, {CONVERT_AGAIN}", stacklevel=3)


def sha256(path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_params(
    directory: str | Path,
    config: LlavaConfig,
    dtype=None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    quantize_also=(),
) -> dict:
    """The parameters, restored straight into the mesh's shardings (no mesh: onto the first device) and cast.

    The small files are compared with what the conversion recorded (`check_small_files`). The parameters are not, for
    that takes longer: `llava-jax verify DIR --quick` does it.

    Args:
        directory: a converted checkpoint, local or gs://.
        config: its config (`load_config`), which says what must be there.
        dtype: float32, bfloat16 or float16; None is `default_dtype`.
        mesh: see `llava_jax.parallel.sharding.make_mesh`.
        quantize: "int8" makes int8 kernels of what is stored otherwise, a layer at a time; None is as stored.
        quantize_also: see `llava_jax.models.quantize.OTHERS`.

    Raises:
        FileNotFoundError, ValueError: not a finished checkpoint of this version, or not this config's parameters.
    """
    files = epath.Path(directory).expanduser()
    check_quantize(quantize, quantize_also)
    read_manifest(files)
    check_small_files(files)
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if dtype is None:
        dtype = default_dtype(device)
    if jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype={jnp.dtype(dtype).name} is not supported; supported: {', '.join(DTYPES)}")
    path = files / PARAMS
    remedy = f"delete {files} and {CONVERT_AGAIN}"
    stored = stored_tree(path, remedy)
    shapes = with_scales(param_shapes(config), quantized_paths(stored))
    check_tree(files, stored, shapes)

    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
    else:
        shardings = param_shardings(shapes, mesh)
    placed, wanted = flatten_dict(shardings, sep="/"), {}
    for name, leaf in flatten_dict(shapes, sep="/").items():
        cast = leaf.dtype if leaf.dtype == jnp.int8 or name.endswith(SCALE) else dtype
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, cast, sharding=placed[name])
    if quantize is None:
        return load_tree(path, unflatten_dict(wanted, sep="/"), remedy)
    return _load_quantized(path, wanted, quantize_also, remedy)


def check_int8_kernels(directory: str | Path, quantize: str | None) -> None:
    """ValueError unless `load_params` would give int8 kernels, for products with int8 activations."""
    files = epath.Path(directory).expanduser()
    if quantize is None and not quantized_paths(stored_tree(files / PARAMS, f"delete {files} and {CONVERT_AGAIN}")):
        raise ValueError(f"{files} has no int8 kernels for int8_activations: add quantize='int8' (--quantize int8)")


def _load_quantized(path: Path, wanted: dict, also, remedy: str) -> dict:
    """The parameters with int8 kernels; those of one layer at a time are in memory in another dtype."""

    def load_some(some: dict) -> dict:
        tree = {name: some.get(name, ocp.PLACEHOLDER) for name in wanted}
        loaded = flatten_dict(load_tree(path, unflatten_dict(tree, sep="/"), remedy), sep="/")
        return {name: loaded[name] for name in some}

    def layer_of(name: str) -> str:
        return name.rsplit("/", 3)[0]

    kernels = [name for name in wanted if is_quantized(name, also) and wanted[name].dtype != jnp.int8]
    out = load_some({name: leaf for name, leaf in wanted.items() if name not in kernels})
    for _, layer in groupby(sorted(kernels, key=layer_of), layer_of):
        exact = {n: jax.ShapeDtypeStruct(wanted[n].shape, jnp.float32, sharding=wanted[n].sharding) for n in layer}
        out.update(quantize_leaves(load_some(exact).items(), also))
    return unflatten_dict(out, sep="/")


def stored_tree(path: Path, remedy: str) -> dict:
    """What an Orbax directory holds: a leaf with `shape` and `dtype` for each array; no array is read.

    Raises:
        ValueError: it is damaged, and the remedy.
    """
    with _readable(path, remedy):
        tree = ocp.metadata(path.absolute()).metadata
        if tree is None:
            raise ValueError("Orbax finds no parameters in it")
        return tree


def load_tree(path: Path, abstract: dict, remedy: str, alone: bool = False) -> dict:
    """The arrays of an Orbax directory as `abstract` asks for them (`ocp.PLACEHOLDER`: not at all).

    Args:
        alone: of several processes only this one reads; Orbax otherwise waits for the others.

    Raises:
        ValueError: it is damaged, and the remedy.
    """
    context = ocp.Context()
    if alone:
        context.multiprocessing_options.primary_host = jax.process_index()
        context.multiprocessing_options.active_processes = {jax.process_index()}
    largest = max(math.prod(x.shape) for x in jax.tree.leaves(abstract) if x is not ocp.PLACEHOLDER)
    context.memory_options.read_concurrent_bytes = max(READ_BYTES, 4 * largest + 1)  # Orbax refuses a larger array
    with _readable(path, remedy), context:
        return ocp.load(path.absolute(), abstract)


@contextlib.contextmanager
def _readable(path: Path, remedy: str):
    """Orbax's many exceptions about a damaged directory, as one."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the directory is not to blame
        raise
    except Exception as error:
        raise ValueError(f"{path}: half-written or damaged ({reason_of(error)}); {remedy}") from error


def check_tree(directory: str | Path, stored: dict, shapes: dict) -> None:
    """ValueError unless what is stored (`stored_tree`) has the config's paths and shapes (`param_shapes`)."""
    if quantized_paths(stored) and not quantized_paths(shapes):
        raise ValueError(
            f"{directory}: its kernels are int8, for inference only; use the checkpoint that it was made of"
        )
    stored = {k: tuple(v.shape) for k, v in flatten_dict(stored, sep="/").items()}
    wanted = {k: tuple(v.shape) for k, v in flatten_dict(shapes, sep="/").items()}
    problems = [f"{k} is missing" for k in sorted(wanted.keys() - stored.keys())]
    problems += [f"{k} has no place in the config" for k in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"{k} is {list(stored[k])} instead of {list(wanted[k])}"
        for k in sorted(wanted.keys() & stored.keys())
        if stored[k] != wanted[k]
    ]
    if problems:
        raise ValueError(
            f"{directory}: its parameters do not match its config.json: {listed(problems, '; ')}; restore "
            f"config.json, or {CONVERT_AGAIN}"
        )
