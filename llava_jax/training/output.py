"""What a run leaves: its options, its metrics and curve, and at the end a checkpoint like any other."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax import checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.conversion import checksums, key_table
from llava_jax.conversion.published_files import open_file, write_json
from llava_jax.fields import problem_of
from llava_jax.files import write_atomically
from llava_jax.inputs.conversation import SeparatorStyle, conv_templates
from llava_jax.models.llava_llama import flat_param_shapes
from llava_jax.parallel import multihost
from llava_jax.records import parse_json, read_json_object
from llava_jax.training.lora import merge_lora
from llava_jax.training.optimizer import join_params
from llava_jax.training.states import survey
from llava_jax.training.step import LORA
from llava_jax.training.train_options import TrainOptions

METRICS = "metrics.jsonl"
CURVE = "loss.png"
RUN_FILES = (checkpoint.TRAIN_OPTIONS, METRICS, CURVE)
PROJECTOR_PARAMS = ("mm_projector", "image_newline")
FREE_TO_CHANGE = (
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "dataloader_num_workers",
    "max_unlabelled_ratio",
    "output_dir",
)
FINGERPRINTS = "fingerprints"  # in TRAIN_OPTIONS: the SHA-256 of each file that the run depends on


def check_output(options: TrainOptions) -> None:
    """See that the output directory is free, or holds this very run, unfinished.

    Raises:
        FileExistsError: it holds something else, a finished run, or a run with other options, data or checkpoint.
    """
    output, told = Path(options.output_dir), _resume_options(options)
    if (output / checkpoint.MANIFEST).exists():
        raise FileExistsError(f"{output}: trained already; give another --output-dir")
    if (output / checkpoint.TRAIN_OPTIONS).exists():
        before = read_json_object(output / checkpoint.TRAIN_OPTIONS)
        others = [f"{name} was {before.get(name)!r}" for name, value in told.items() if before.get(name) != value]
        if others:
            raise FileExistsError(
                f"{output}: holds a run with other options ({'; '.join(others)}); give those to go on with it, or "
                "another --output-dir"
            )
        if changed := _changed(before, fingerprints(options)):
            raise FileExistsError(
                f"{output}: holds a run that began with other contents of {', '.join(changed)}; restore what was "
                "there to go on with it, or give another --output-dir"
            )
    elif output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output}: exists and is not a training run; give another --output-dir")


def _changed(before: dict, now: dict[str, str]) -> list[str]:
    """The files that have changed since the run began; a new file does not count."""
    recorded = before.get(FINGERPRINTS)
    return [name for name, was in recorded.items() if now.get(name) != was] if isinstance(recorded, dict) else []


def claim_output(options: TrainOptions) -> None:
    """Make the output directory and say in it which run it holds."""
    told = Path(options.output_dir) / checkpoint.TRAIN_OPTIONS
    multihost.barrier("the output directory has been checked")
    if multihost.is_primary() and not told.exists():
        told.parent.mkdir(parents=True, exist_ok=True)
        write_json(told, _resume_options(options) | {FINGERPRINTS: fingerprints(options)})
    multihost.barrier("the output directory is taken")


def _resume_options(options: TrainOptions) -> dict:
    """The options that must be the same again to go on with a run, as JSON gives them back."""
    told = dataclasses.asdict(options) | {"mesh": [list(axis) for axis in options.mesh]}
    return {name: value for name, value in told.items() if name not in FREE_TO_CHANGE}


def fingerprints(options: TrainOptions) -> dict[str, str]:
    """The SHA-256 of the data file, of the starting checkpoint's small files (its manifest and checksums tell its
    weights), and of the projector that is started from. Pictures count by their names alone."""
    files = _small_files("model_path", options.model_path) | {"data_path": Path(options.data_path)}
    if options.pretrain_mm_mlp_adapter is not None:
        files |= _small_files("pretrain_mm_mlp_adapter", options.pretrain_mm_mlp_adapter)
    return {name: checkpoint.sha256(path) for name, path in files.items()}


def _small_files(name: str, given: str) -> dict[str, Path]:
    """A file, or the small files of a checkpoint directory, by the names that errors use."""
    path = Path(given).expanduser()
    if not path.is_dir():
        return {name: path}
    inside = sorted(file for file in path.iterdir() if file.is_file() and file.name not in RUN_FILES)
    return {f"{name}/{file.name}": file for file in inside}


def read_projector(path: str, config: LlavaConfig, params: dict) -> dict:
    """The projector (and image_newline) of a stage-1 `mm_projector.bin` or of a converted checkpoint, float32.

    Raises:
        FileNotFoundError, ValueError: it is neither, or does not fit the model.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        found = checkpoint.load_params(file, checkpoint.load_config(file), dtype="float32")
        found = {name: found[name] for name in PROJECTOR_PARAMS if name in found and name in params}
        found = flatten_dict(found, sep="/")
    elif file.is_file():
        found = _read_projector_file(file, config)
    else:
        raise FileNotFoundError(f"--pretrain_mm_mlp_adapter {path}: no such file or directory")
    flat = flatten_dict(params, sep="/")
    wanted = [name for name in flat if name.startswith("mm_projector/")]
    wrong = [name for name in wanted if name not in found] or [n for n in found if found[n].shape != flat[n].shape]
    if wrong:
        raise ValueError(f"--pretrain_mm_mlp_adapter {path}: {', '.join(wrong)} is missing or of another shape")
    placed = {name: jax.device_put(array, flat[name].sharding) for name, array in found.items()}
    return unflatten_dict(flat | placed, sep="/")


def _read_projector_file(file: Path, config: LlavaConfig) -> dict[str, np.ndarray]:
    """Path → parameter: the projector, and the embeddings where stage 1 grew them."""
    tensors, rules = open_file(file), key_table.projector_file_rules(config)
    given = {rule.path_of(name) for name in tensors for rule in rules if rule.matches(name)}
    shapes = flat_param_shapes(config)
    shapes = {path: shape for path, shape in shapes.items() if path.startswith("mm_projector/") or path in given}
    placed = key_table.match(shapes, [(tensors, rules)], f"--pretrain_mm_mlp_adapter {file}")
    return {
        path: key_table.apply_transform(at.transform, tensors[at.name].read().astype(np.float32))
        for path, at in placed.items()
    }


class Metrics:
    """One line of JSON for each logged step, and a picture of the loss at the end; a context manager.

    Lines after the step that a run goes on from are dropped first: those steps are done again. A step's values are
    waited for only when the next step is on its way; whether it is logged or not, they must be finite.
    """

    def __init__(self, options: TrainOptions, done: int):
        self._path, self._every = Path(options.output_dir) / METRICS, options.logging_steps
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self._lines = [line for line in map(_parsed, lines) if line and line["step"] <= done]
        self._file: TextIO | None = None
        self._waiting: tuple[int, dict] | None = None

    def __enter__(self) -> Metrics:
        if multihost.is_primary():
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.write()
        if self._file is None:
            return
        self._file.close()
        if self._lines:
            draw_curve(self._path.with_name(CURVE), self._lines)

    def add(self, step: int, values: dict) -> None:
        """Values (device scalars) of one step, counted from 1."""
        self.write()
        self._waiting = step, values

    def write(self) -> None:
        """Write what waits: before a state is saved, so that no step in it is without its line."""
        if self._waiting is None:
            return
        (step, waiting), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in waiting.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"the {name} of step {step} is {value}; what was saved before stays; look at the data, or lower "
                    "the learning rate"
                )
        if step % self._every:
            return
        line = {"step": step, **values}
        self._lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _parsed(line: str) -> dict | None:
    """None for a line that a kill has torn."""
    try:
        parsed = parse_json(line, METRICS)
    except ValueError:
        return None
    return None if problem_of(parsed, {"step": (int,), "loss": (float,)}) else parsed


def draw_curve(path: Path, lines: list[dict]) -> None:
    """Loss over steps as a PNG, and its running mean; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    steps, losses = [line["step"] for line in lines], np.array([line["loss"] for line in lines])
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps[width - 1 :], smooth, color="tab:blue")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_result(options: TrainOptions, config: LlavaConfig, trained: dict, frozen: dict) -> Path:
    """The trained model as a checkpoint directory (adapters merged in, and kept beside it), in the run's own dtype."""
    output, source = Path(options.output_dir), Path(options.model_path).expanduser()
    trained = dict(trained)
    lora = trained.pop(LORA, None)
    params = join_params(trained, frozen)
    if lora is not None:
        params = merge_lora(params, lora, options.lora_alpha / options.lora_r)
    params = jax.tree.map(lambda x: x.astype(options.dtype), params)
    if not survey(params).finite:
        raise ValueError(f"{output}: the trained parameters are not finite, and are not written")
    if lora is not None:
        _save(output / checkpoint.ADAPTERS, lora)
    _save(output / checkpoint.PARAMS, params)
    if multihost.is_primary():
        _write_small_files(options, config, source, output)
    multihost.barrier("the checkpoint is written")
    return output


def _save(path: Path, params: dict) -> None:
    """In the place of what a run that was killed here left."""
    if multihost.is_primary():
        shutil.rmtree(path, ignore_errors=True)
    multihost.barrier(f"{path.name} can be written")
    checkpoint.save_params(path, params)


def _write_small_files(options: TrainOptions, config: LlavaConfig, source: Path, output: Path) -> None:
    """The config, the tokenizer, the manifest, with which the directory is a checkpoint, and its checksums."""
    of_its_own_run = (checkpoint.MANIFEST, checkpoint.CHECKSUMS, *RUN_FILES)
    for file in source.iterdir():
        if file.is_file() and file.name not in of_its_own_run:
            shutil.copyfile(file, output / file.name)
    hf = read_json_object(source / "config.json")
    if "text_config" not in hf:  # the original's layout says how it was trained
        hf |= {
            "tune_mm_mlp_adapter": options.stage == "pretrain",
            "mm_projector_lr": options.mm_projector_lr,
            "mm_vision_tower_lr": options.mm_vision_tower_lr,
            "unfreeze_mm_vision_tower": config.unfreeze_mm_vision_tower,
            "tokenizer_model_max_length": config.tokenizer_model_max_length,
            "tokenizer_padding_side": config.tokenizer_padding_side,
        }
    write_json(output / "config.json", hf)
    record = checksums.record_stored(output / checkpoint.PARAMS)
    own = {"source": str(source), "dtype": options.dtype, "fingerprint": checksums.fingerprint(record)}
    if options.version is not None and conv_templates[options.version].sep_style is not SeparatorStyle.PLAIN:
        own["conv_mode"] = options.version  # a plain one is for captions, and nothing is asked with it
    write_json(output / checkpoint.MANIFEST, read_json_object(source / checkpoint.MANIFEST) | own)
    checksums.write_record(output, record)
