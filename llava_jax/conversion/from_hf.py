"""A published checkpoint into a llava_jax directory: `python convert/from_hf.py SOURCE`."""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_jax import checkpoint
from llava_jax.config import KNOWN_TOWERS, LlavaConfig, check_files
from llava_jax.conversion import checksums, key_table, published_files
from llava_jax.conversion.atomic_directory import check_output, new_directory
from llava_jax.conversion.key_table import Rule
from llava_jax.conversion.new_projector import llava_config, new_tensors
from llava_jax.conversion.prompt_template import choose_template
from llava_jax.conversion.published_files import Location, Tensor, write_json
from llava_jax.conversion.safetensors_files import DTYPE_NAMES, in_order, write_safetensors
from llava_jax.conversion.small_files import (
    BUFFERS_FILE,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    check_small_files,
    preprocessor_config_json,
    vision_config_json,
)
from llava_jax.inputs.text import check_text
from llava_jax.models.llava_llama import flat_param_shapes
from llava_jax.models.quantize import check_quantize, quantize_leaves
from llava_jax.records import naming


@dataclass(frozen=True)
class Published:
    """What a published checkpoint consists of, and where each piece comes from."""

    source: str
    name: str
    layout: str
    location: Location
    base: Location | None  # the language model of a stage-1 projector
    tower: Location | None  # where the tower's config, and its weights if they are not in the checkpoint, stand
    tower_error: str  # why there is no tower location
    vision_config: dict
    preprocessor_config: dict
    config: LlavaConfig
    new_projector: bool  # the projector is none that was published

    @property
    def language_model(self) -> Location:
        """Where the decoder, the tokenizer and the generation defaults stand."""
        return self.base or self.location


@dataclass(frozen=True)
class Plan:
    """Every parameter's tensor and transform, the dtype that it is stored in, and what only the way back needs."""

    tensors: dict[str, Tensor]
    transforms: dict[str, str]
    dtypes: dict[str, np.dtype]
    buffers: dict[str, Tensor]
    record: dict  # the manifest's "published"; to_hf.py reads it

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(t.shape)) * self.dtypes[path].itemsize for path, t in self.tensors.items())


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    vision_tower: str | None = None,
    model_base: str | None = None,
    new_projector: str | None = None,
    anyres: bool = False,
    quantize: str | None = None,
    quantize_also: Sequence[str] = (),
    conv_mode: str | None = None,
    progress: bool = True,
) -> Path:
    """Convert a published checkpoint, of either layout, into a directory that `llava_jax.load` takes.

    One tensor after another, so memory stays small however large the model is. The directory appears under its
    name when it is complete, and not before.

    Args:
        source: a local directory or a hub id.
        output: where to write; None is ./NAME, NAME being the last part of `source`.
        revision: a branch, tag or commit of a hub id.
        dtype: float32, bfloat16 or float16; None stores each tensor as it is published.
        vision_tower: a CLIP directory or hub id instead of the config's `mm_vision_tower`.
        model_base: the language model under a stage-1 `mm_projector.bin`, as in the original's loader.
        new_projector: `mm_projector_type` of a LLaVA yet to be trained, of a plain Llama (`source`) and `vision_tower`.
        anyres: that one is to see pictures as 1.6 does; otherwise as 1.5.
        quantize: "int8" stores the kernels of the decoder's and the tower's layers so; quantize_also: of "lm_head" and
            "mm_projector", those too. Such a directory is for inference only.
        conv_mode: its prompt template; None: see `llava_jax.conversion.prompt_template.choose_template`.
        progress: print what is done, with a bar over bytes.

    Returns:
        The output directory.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: one clear reason; nothing is left behind.
    """
    source = check_text(os.fspath(source), "source")
    key_table.check_dtype(dtype)
    check_quantize(quantize, quantize_also)
    name = checkpoint_name(source)
    output = Path(check_text(os.fspath(output if output is not None else name), "--output")).expanduser().absolute()
    check_output(output)
    say = print if progress else lambda *_: None
    if new_projector is None and anyres:
        raise ValueError("--anyres is for --new-projector; a published checkpoint says itself how it sees pictures")
    if new_projector is not None and (vision_tower is None or model_base is not None):
        raise ValueError("--new-projector needs --vision-tower (a CLIP directory or hub id), and takes no --model-base")
    published = read_published(source, revision, vision_tower, model_base, new_projector, anyres)
    say(f"{source}: {published.layout} layout, {published.config.text.num_hidden_layers} decoder layers")
    template = choose_template(published.location.path, name, conv_mode)
    say(f"prompt template: {template.conv_mode} ({template.reason})")
    if template.doubt:
        warnings.warn(f"{template.doubt}: check the prompt template, or name it with --conv-mode", stacklevel=2)
    plan = make_plan(published, dtype)
    if published.tower_error:
        say(f"the vision tower is in the checkpoint; {published.config.mm_vision_tower} gives its known settings only")
    with new_directory(output, plan.nbytes) as temporary:
        with tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not progress) as bar:
            record: dict[str, dict] = {}
            leaves = _leaves(plan, bar)
            if quantize is not None:
                leaves = ((path, np.asarray(x)) for path, x in quantize_leaves(leaves, quantize_also))
            leaves = checksums.recorded(leaves, record)
            checkpoint.stream_params(temporary / checkpoint.PARAMS, leaves)
        _write_small_files(temporary, published, plan, template.conv_mode, checksums.fingerprint(record))
        checksums.write_record(temporary, record)
    say(f"wrote {output}: {len(plan.tensors)} parameters, {plan.nbytes / 2**30:.2f} GiB")
    return output


def checkpoint_name(source: str) -> str:
    """A checkpoint's name (the original's get_model_name_from_path); of a hub cache's snapshot, its repository's."""
    path = Path(os.path.expanduser(source))
    parts = Path(os.path.abspath(path)).parts if path.is_dir() else path.parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rpartition("--")[2]
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


# ---- what is there


def read_published(
    source: str,
    revision: str | None = None,
    vision_tower: str | None = None,
    model_base: str | None = None,
    new_projector: str | None = None,
    anyres: bool = False,
) -> Published:
    """Read and check everything but the tensors; the arguments are those of `convert`."""
    name, location = checkpoint_name(source), published_files.locate(source, revision)
    config = location.read_config()
    layout = "llava-hf" if "text_config" in config else "liuhaotian"
    base = published_files.locate(model_base) if model_base is not None else None
    text = base or location  # whose tokenizer and generation defaults they are
    generation = text.read_json("generation_config.json")
    if new_projector is None:
        with naming(source):
            check_files(config, None, None, generation)
    tower, tower_error = None, ""
    vision_config, preprocessor = config.get("vision_config"), _preprocessor(location)
    if layout == "liuhaotian":
        tower, tower_error, vision_config, preprocessor = _read_tower(config, vision_tower)
    elif vision_tower is not None or model_base is not None:
        raise ValueError(f"{source}: --vision-tower and --model-base are for the liuhaotian layout; this is {layout}")
    if new_projector is not None:
        named = vision_tower if tower is None or tower.commit else str(tower.path)
        config = llava_config(config, new_projector, named, vision_config, anyres)
    with naming(source):
        parsed = LlavaConfig.from_hf(config, vision_config, preprocessor, generation, name)
    check_small_files(location, text, parsed)
    vision_config = vision_config or vision_config_json(parsed.vision)
    preprocessor = preprocessor or preprocessor_config_json(parsed.vision)
    new = new_projector is not None
    return Published(source, name, layout, location, base, tower, tower_error, vision_config, preprocessor, parsed, new)


def _read_tower(config: dict, vision_tower: str | None) -> tuple[Location | None, str, dict, dict | None]:
    """The tower's location (or why there is none), and its vision_config and preprocessor_config.

    A tower whose shape is known may be absent here: its weights may stand in the checkpoint.
    """
    named = vision_tower or config.get("mm_vision_tower", config.get("vision_tower"))
    if not named:
        raise ValueError(
            "config.json names no mm_vision_tower; give the tower (a CLIP directory or hub id) with --vision-tower"
        )
    try:
        tower = published_files.locate(named)
        found = tower.read_config()
    except FileNotFoundError as error:
        hint = f"the vision tower {named!r} cannot be had ({error}); give it with --vision-tower"
        if named not in KNOWN_TOWERS or vision_tower is not None:
            raise FileNotFoundError(hint) from None
        return None, hint, vision_config_json(KNOWN_TOWERS[named]), None
    return tower, "", found.get("vision_config") or found, _preprocessor(tower)


def _preprocessor(location: Location) -> dict | None:
    """`preprocessor_config.json`; transformers 5 writes it into `processor_config.json`."""
    found = location.read_json("preprocessor_config.json")
    return found or (location.read_json("processor_config.json") or {}).get("image_processor")


# ---- which tensor becomes which parameter


def make_plan(published: Published, dtype: str | None) -> Plan:
    """From the headers alone: every parameter's tensor, or one ValueError with all that does not fit."""
    config = published.config
    rules = key_table.RULES[published.layout](config)
    parts: list[tuple[dict[str, Tensor], tuple[Rule, ...]]] = []
    if published.base is not None:
        parts.append((_open_projector(published.location), key_table.projector_file_rules(config)))
    if published.new_projector:
        parts.append((new_tensors(config), rules))
    main, own = len(parts), published_files.open_checkpoint(published.language_model)
    parts.append((own, rules))
    if published.layout == "liuhaotian":
        parts += _tower_part(published, own)
    placed = key_table.match(flat_param_shapes(config), parts, published.source)
    tensors = {path: parts[at.part][0][at.name] for path, at in placed.items()}
    names = {path: at.name for path, at in placed.items() if at.part == main}
    record: dict[str, Any] = {
        "dtype": _common_dtype(tensors[path].dtype for path in names),
        "vision_tower": "inside" if len(parts) == main + 1 else "beside",
    }
    if templates := key_table.used_templates(names, rules):
        record["names"] = templates
    others = key_table.not_needed(own, rules)
    if heads := [name for name in others if name.endswith("lm_head.weight")]:  # the embedding once more
        record["tied_head"] = heads[0]
    return Plan(
        tensors,
        {path: at.transform for path, at in placed.items()},
        {path: np.dtype(dtype or tensor.dtype) for path, tensor in tensors.items()},
        {name: own[name] for name in others if name not in heads and own[name].dtype in DTYPE_NAMES},
        record,
    )


def _common_dtype(dtypes: Iterable[str]) -> str:
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "mixed"


def _tower_part(published: Published, tensors: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], tuple[Rule, ...]]]:
    """The tower beside the checkpoint, unless the one inside is meant: the original loads that only if it was tuned."""
    inside = [name for name in tensors if name.startswith(key_table.TOWER_INSIDE)]
    if inside and (published.config.unfreeze_mm_vision_tower or published.tower is None):
        return []
    if published.tower is None:
        raise FileNotFoundError(f"{published.source} holds no vision tower, and {published.tower_error}")
    for name in inside:
        del tensors[name]
    return [(published_files.open_checkpoint(published.tower), key_table.clip_rules())]


def _open_projector(location: Location) -> dict[str, Tensor]:
    location.fetch([published_files.PROJECTOR_FILE])
    path = location.path / published_files.PROJECTOR_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{location.given}: no {published_files.PROJECTOR_FILE}; --model-base is for a stage-1 projector, leave it "
            "out"
        )
    return published_files.open_file(path)


# ---- writing


def _leaves(plan: Plan, bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
    """(path, parameter), file after file; each is gone when the next is asked for."""
    paths = sorted(plan.tensors, key=lambda path: str(plan.tensors[path].file))
    largest = 4 * max(int(np.prod(t.shape)) for t in plan.tensors.values())  # float32 has the most bytes
    read, turned = np.empty(largest, np.uint8), np.empty(largest, np.uint8)
    for file, in_file in itertools.groupby(paths, key=lambda path: plan.tensors[path].file):
        published_files.check_blob(file)
        for path in in_file:
            tensor = plan.tensors[path]
            array = tensor.read(read)
            _check_finite(array, path, file)
            array = key_table.apply_transform(plan.transforms[path], key_table.cast(array, plan.dtypes[path], path))
            yield path, in_order(array, turned)
            bar.update(array.nbytes)


def _check_finite(array: np.ndarray, path: str, file: Path) -> None:
    """ValueError for NaN or Inf: an exponent of ones, looked for in blocks that the cache holds, for speed."""
    exponent: dict[str, np.uint32 | np.uint16] = {
        "float32": np.uint32(0x7F800000),
        "bfloat16": np.uint16(0x7F80),
        "float16": np.uint16(0x7C00),
    }
    mask = exponent[array.dtype.name]
    bits = array.reshape(-1).view(mask.dtype)
    if any((bits[start : start + (1 << 17)] & mask).max() == mask for start in range(0, bits.size, 1 << 17)):
        raise ValueError(f"{file}: {path} holds NaN or Inf, as no published weights do; download it again")


def _write_small_files(directory: Path, published: Published, plan: Plan, conv_mode: str, fingerprint: str) -> None:
    for location, names in (
        (published.location, ("config.json", *PROCESSOR_FILES)),
        (published.language_model, ("generation_config.json", *TOKENIZER_FILES)),
    ):
        for name in names:
            if (location.path / name).is_file():
                shutil.copyfile(location.path / name, directory / name)
    if published.new_projector:
        write_json(directory / "config.json", published.config.to_hf())
    if plan.buffers:
        file, buffers = directory / BUFFERS_FILE, plan.buffers
        write_safetensors(file, buffers, lambda names: (buffers[name].read() for name in names))
    manifest = {
        "version": checkpoint.VERSION,
        "name": published.name,
        "conv_mode": conv_mode,
        "reading": published.config.reading,
        "layout": published.layout,
        "source": published.source,
        "dtype": _common_dtype(dtype.name for dtype in plan.dtypes.values()),
        "fingerprint": fingerprint,
        "published": plan.record,
    }
    write_json(directory / "vision_config.json", published.vision_config)
    write_json(directory / "preprocessor_config.json", published.preprocessor_config)
    write_json(directory / checkpoint.MANIFEST, manifest)
