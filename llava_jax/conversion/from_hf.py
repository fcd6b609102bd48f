"""A published checkpoint into a llava_jax directory: `python convert/from_hf.py SOURCE`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from llava_jax import checkpoint
from llava_jax.config import KNOWN_TOWERS, LlavaConfig, VisionConfig
from llava_jax.constants import DTYPES
from llava_jax.conversion import key_table, sources
from llava_jax.conversion.arguments import add_arguments
from llava_jax.conversion.key_table import Placement, Rule
from llava_jax.conversion.sources import Location, Tensor
from llava_jax.models.llava import param_shapes

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


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


@dataclass(frozen=True)
class Plan:
    """Every parameter's tensor and transform, and the dtype that it is stored in."""

    tensors: dict[str, Tensor]
    transforms: dict[str, str]
    dtypes: dict[str, np.dtype]

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
        progress: print what is done, with a bar over bytes.

    Returns:
        The output directory.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: one clear reason; nothing is left behind.
    """
    source = os.fspath(source)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not supported; supported: {', '.join(DTYPES)}")
    name = checkpoint_name(source)
    output = Path(output if output is not None else name).expanduser().absolute()
    _check_output(output)
    say = print if progress else lambda *_: None
    published = read_published(source, name, revision, vision_tower, model_base)
    say(f"{source}: {published.layout} layout, {published.config.text.num_hidden_layers} decoder layers")
    plan = make_plan(published, dtype)
    if published.tower_error:
        say(f"the vision tower is in the checkpoint; {published.config.mm_vision_tower} gives its known settings only")
    with _new_directory(output, plan.nbytes) as temporary:
        with tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not progress) as bar:
            checkpoint.stream_params(temporary / checkpoint.PARAMS, _leaves(plan, bar))
        _write_small_files(temporary, published, plan)
    say(f"wrote {output}: {len(plan.tensors)} parameters, {plan.nbytes / 2**30:.2f} GiB")
    return output


def checkpoint_name(source: str) -> str:
    """The name that picks the conversation template (the original's get_model_name_from_path)."""
    path = Path(source).expanduser()
    parts = (path.absolute() if path.is_dir() else path).parts
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


# ---- what is there


def read_published(
    source: str, name: str, revision: str | None, vision_tower: str | None, model_base: str | None
) -> Published:
    """Read and check everything but the tensors."""
    location = sources.locate(source, revision)
    config = location.read_json("config.json", required=True)
    layout = "llava-hf" if "text_config" in config else "liuhaotian"
    tower, tower_error, settings = None, "", (config.get("vision_config"), _preprocessor(location))
    if layout == "liuhaotian":
        tower, tower_error, settings = _read_tower(config, vision_tower)
    elif vision_tower is not None or model_base is not None:
        raise ValueError(f"{source}: --vision-tower and --model-base are for the liuhaotian layout; this is {layout}")
    vision_config, preprocessor = settings
    base = sources.locate(model_base) if model_base is not None else None
    generation = (base or location).read_json("generation_config.json")
    parsed = LlavaConfig.from_hf(config, vision_config, preprocessor, generation, name)
    if not any(((base or location).path / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        raise FileNotFoundError(f"{(base or location).given}: no tokenizer (tokenizer.model or tokenizer.json)")
    vision_config = vision_config or _vision_dict(parsed.vision)
    preprocessor = preprocessor or _preprocessor_dict(parsed.vision)
    return Published(source, name, layout, location, base, tower, tower_error, vision_config, preprocessor, parsed)


def _read_tower(config: dict, vision_tower: str | None) -> tuple[Location | None, str, tuple[dict | None, dict | None]]:
    """The tower's location (or why there is none), and its vision_config and preprocessor_config.

    A tower whose shape is known may be absent here: its weights may stand in the checkpoint.
    """
    named = vision_tower or config.get("mm_vision_tower", config.get("vision_tower"))
    if not named:
        raise ValueError(
            "config.json names no mm_vision_tower; give the tower (a CLIP directory or hub id) with --vision-tower"
        )
    try:
        tower = sources.locate(named)
        found = tower.read_json("config.json", required=True)
    except FileNotFoundError as error:
        hint = f"the vision tower {named!r} cannot be had ({error}); give it with --vision-tower"
        if named not in KNOWN_TOWERS or vision_tower is not None:
            raise FileNotFoundError(hint) from None
        return None, hint, (_vision_dict(KNOWN_TOWERS[named]), None)
    return tower, "", (found.get("vision_config") or found, _preprocessor(tower))


def _preprocessor(location: Location) -> dict | None:
    """`preprocessor_config.json`; transformers 5 writes it into `processor_config.json`."""
    found = location.read_json("preprocessor_config.json")
    return found or (location.read_json("processor_config.json") or {}).get("image_processor")


def _vision_dict(vision: VisionConfig) -> dict:
    values = dataclasses.asdict(vision)
    return {
        "model_type": "clip_vision_model",
        **{k: v for k, v in values.items() if k not in ("image_mean", "image_std")},
    }


def _preprocessor_dict(vision: VisionConfig) -> dict:
    size = vision.image_size
    mean, std = list(vision.image_mean), list(vision.image_std)
    return {"size": size, "crop_size": size, "image_mean": mean, "image_std": std}


# ---- which tensor becomes which parameter


def make_plan(published: Published, dtype: str | None) -> Plan:
    """From the headers alone: every parameter's tensor, or one ValueError with all that does not fit."""
    config = published.config
    rules = key_table.RULES[published.layout](config)
    parts: list[tuple[dict[str, Tensor], tuple[Rule, ...]]] = []
    if published.base is not None:
        parts.append((_open_projector(published.location), key_table.projector_file_rules(config)))
    parts.append((sources.open_checkpoint(published.base or published.location), rules))
    if published.layout == "liuhaotian":
        parts += _tower_part(published, parts[-1][0])
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    placed = key_table.match(shapes, parts, published.source)
    tensors = {path: _tensor(parts, at) for path, at in placed.items()}
    return Plan(
        tensors,
        {path: at.transform for path, at in placed.items()},
        {path: np.dtype(dtype or tensor.dtype) for path, tensor in tensors.items()},
    )


def _tower_part(published: Published, tensors: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], tuple[Rule, ...]]]:
    """The tower beside the checkpoint, unless the one inside is meant: the original loads that only if it was tuned."""
    inside = [name for name in tensors if name.startswith(key_table.TOWER_INSIDE)]
    if inside and (published.config.unfreeze_mm_vision_tower or published.tower is None):
        return []
    if published.tower is None:
        raise FileNotFoundError(f"{published.source} holds no vision tower, and {published.tower_error}")
    for name in inside:
        del tensors[name]
    return [(sources.open_checkpoint(published.tower), key_table.clip_rules())]


def _tensor(parts, at: Placement) -> Tensor:
    return parts[at.part][0][at.name]


def _open_projector(location: Location) -> dict[str, Tensor]:
    location.fetch([sources.PROJECTOR_FILE])
    path = location.path / sources.PROJECTOR_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{location.given}: no {sources.PROJECTOR_FILE}; --model-base is for a stage-1 projector, leave it out"
        )
    return sources.open_file(path)


# ---- writing


def _leaves(plan: Plan, bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
    """(path, parameter), file after file."""
    for path in sorted(plan.tensors, key=lambda p: str(plan.tensors[p].file)):
        published = plan.tensors[path].read()
        array = published.astype(plan.dtypes[path], copy=False)
        if plan.dtypes[path] == np.float16 and not np.isfinite(array).all() and np.isfinite(published).all():
            raise ValueError(f"--dtype float16: {path} has values beyond float16's range; use bfloat16 or float32")
        array = key_table.apply_transform(plan.transforms[path], array)
        yield path, array
        bar.update(array.nbytes)


def _write_small_files(directory: Path, published: Published, plan: Plan) -> None:
    text = published.base or published.location  # whose tokenizer and generation defaults they are
    for location, names in (
        (published.location, ("config.json",)),
        (text, ("generation_config.json", *TOKENIZER_FILES)),
    ):
        for name in names:
            if (location.path / name).is_file():
                shutil.copyfile(location.path / name, directory / name)
    dtypes = sorted({d.name for d in plan.dtypes.values()})
    manifest = {
        "version": checkpoint.VERSION,
        "name": published.name,
        "reading": published.config.reading,
        "layout": published.layout,
        "source": published.source,
        "dtype": dtypes[0] if len(dtypes) == 1 else "mixed",
    }
    for name, content in (
        ("vision_config.json", published.vision_config),
        ("preprocessor_config.json", published.preprocessor_config),
        (checkpoint.MANIFEST, manifest),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_output(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if (output / checkpoint.MANIFEST).is_file():
        raise FileExistsError(f"{output}: converted already; delete it, or give another directory with --output")
    if output.exists():
        raise FileExistsError(f"{output}: exists and is not empty; give another directory with --output")


@contextlib.contextmanager
def _new_directory(output: Path, nbytes: int) -> Iterator[Path]:
    """A temporary sibling that becomes `output` if the block succeeds, and is removed if it fails.

    It is locked, so that a second conversion into one place fails, and what a killed one left is known to be stale.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.converting"
    temporary.mkdir(exist_ok=True)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = temporary.is_dir() and os.path.samestat(os.fstat(handle), temporary.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise FileExistsError(
                f"{output}: another conversion is writing it; wait for that, or give another --output"
            )
        try:
            for stale in temporary.iterdir():
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            _check_output(output)
            _check_space(output, nbytes)
            yield temporary
            _check_output(output)
            temporary.rename(output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _check_space(output: Path, nbytes: int) -> None:
    needed, free = nbytes + nbytes // 100 + (64 << 20), shutil.disk_usage(output.parent).free
    if free < needed:
        raise OSError(
            f"{output}: not enough disk space: {needed} bytes ({needed / 2**30:.1f} GiB) are needed, "
            f"{free} ({free / 2**30:.1f} GiB) are free; free some, or give another place with --output"
        )


# ---- the command


def run(args: argparse.Namespace) -> None:
    """Convert as the flags say."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator is not needed, and may be somebody else's now
    convert(args.source, args.output, args.revision, args.dtype, args.vision_tower, args.model_base)


def main(argv: list[str] | None = None) -> None:
    """`python convert/from_hf.py`."""
    parser = argparse.ArgumentParser(
        prog="from_hf.py", description="Convert a published LLaVA checkpoint for llava_jax (Orbax)."
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is left behind")
