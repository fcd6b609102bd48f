"""A training run's options, under the names of the reference's arguments."""

from __future__ import annotations

import operator
import os
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.inputs.conversation import conv_templates
from llava_jax.parallel.mesh_axes import check_axes

# What each stage trains, by parameter path. `lora` trains its own parameters beside these (see lora.py).
STAGES = {
    "pretrain": r"mm_projector/.*|image_newline",
    "finetune": r"mm_projector/.*|image_newline|language_model/.*",
    "lora": r"mm_projector/.*",  # peft freezes all the rest, image_newline too
}
INT32_MAX = 2**31 - 1  # steps are counted in int32
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; the ends belong to it where `closed` says so."""

    least: float
    most: float
    closed: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value >= self.least if self.closed[0] == "[" else value > self.least
        return above and (value <= self.most if self.closed[1] == "]" else value < self.most)

    def __str__(self) -> str:
        least = f"{'at least' if self.closed[0] == '[' else 'above'} {self.least}"
        most = f"{'at most' if self.closed[1] == ']' else 'under'} {self.most:,}"
        return f"{least} and {'finite' if self.most == FLOAT32_MAX else most}"


POSITIVE, NOT_NEGATIVE, SHARE = Range(0, FLOAT32_MAX, "(]"), Range(0, FLOAT32_MAX), Range(0, 1, "[)")
COUNT = Range(1, INT32_MAX)


def option(default: Any, help: str = "", range: Range | None = None) -> Any:
    """A field of `TrainOptions`: `help` is its flag's, and a number must be in `range`."""
    return field(default=default, metadata={"help": help, "range": range})


@dataclass(frozen=True)
class TrainOptions:
    """One run. Names and defaults are the reference's TrainingArguments', and its scripts' where these set them.

    Where it can be resumed, everything but `save_steps`, `save_total_limit`, `logging_steps`,
    `dataloader_num_workers` and `max_unlabelled_ratio` must be as it was.

    Raises:
        ValueError: a value is of another kind than the field, not finite, or out of its range.
    """

    learning_rate: float = option(2e-5, range=POSITIVE)
    mm_projector_lr: float | None = option(None, "learning rate of the projector (that of everything)", NOT_NEGATIVE)
    mm_vision_tower_lr: float | None = option(None, "learning rate of the tower (that of everything)", NOT_NEGATIVE)
    weight_decay: float = option(0.0, range=NOT_NEGATIVE)
    warmup_ratio: float = option(0.03, range=SHARE)
    adam_beta1: float = option(0.9, range=SHARE)
    adam_beta2: float = option(0.999, range=SHARE)
    adam_epsilon: float = option(1e-8, range=NOT_NEGATIVE)
    max_grad_norm: float = option(1.0, range=POSITIVE)
    gradient_accumulation_steps: int = option(1, range=COUNT)
    stage: str = option("finetune", f"{', '.join(STAGES)}: which parameters are trained")
    model_path: str = option("", "a directory that convert/from_hf.py wrote")
    data_path: str = option("", "LLaVA's JSON: id, image, conversations")
    image_folder: str = option(".", "where the images named in it stand")
    output_dir: str = option("", "a new directory, or that of a killed run to go on with")
    version: str | None = option(None, "the conversation template (plain for pretrain, else the checkpoint's)")
    pretrain_mm_mlp_adapter: str | None = option(
        None, "a projector to start from: mm_projector.bin, or a pretrain run's output"
    )
    unfreeze_mm_vision_tower: bool = option(False, "train the tower too")
    lora_r: int = option(64, range=COUNT)
    lora_alpha: int = option(16, range=COUNT)
    lora_dropout: float = option(0.05, range=SHARE)
    num_train_epochs: float = option(1.0, range=POSITIVE)
    max_steps: int = option(-1, "updates, instead of whole epochs", Range(-1, INT32_MAX))
    per_device_train_batch_size: int = option(8, "rows for each device of the data and fsdp axes", COUNT)
    model_max_length: int = option(2048, "positions, images included; what is longer is cut off on the right", COUNT)
    group_by_modality_length: bool = option(False)
    max_unlabelled_ratio: float = option(
        0.01, "the share of samples without any label (cut off, or never answered) that is let pass", Range(0, 1)
    )
    bf16: bool = option(False, "compute in bfloat16; what is trained stays float32")
    gradient_checkpointing: bool = option(True, "compute each layer again in the backward pass, to save memory")
    save_steps: int = option(500, "updates between saved states", COUNT)
    save_total_limit: int = option(1, "how many saved states are kept", COUNT)
    logging_steps: int = option(1, range=COUNT)
    dataloader_num_workers: int = option(4, range=Range(0, INT32_MAX))
    seed: int = option(42, range=Range(0, 2**32 - 1))  # as transformers' set_seed
    mesh: tuple[tuple[str, int], ...] = option((), "devices, like data=2,fsdp=4 (one device)")

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            object.__setattr__(self, one.name, _axes(value) if one.name == "mesh" else _as_declared(one, value))
        if self.stage not in STAGES:
            raise ValueError(f"--stage {self.stage} is none of {', '.join(STAGES)}")
        if self.version is not None and self.version not in conv_templates:
            raise ValueError(f"--version {self.version} is no template; there are {', '.join(sorted(conv_templates))}")
        for name in ("model_path", "data_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is needed")
        if self.max_steps == 0:
            raise ValueError("--max_steps 0 must be above 0, or -1 for whole epochs")
        check_axes(self.mesh, "data", "fsdp", "tensor")

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic and of the frozen parameters."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def checkpoints(self) -> Path:
        """Where the run's own state is kept, to go on from."""
        return Path(self.output_dir) / "checkpoints"


def _as_declared(field: Field, value: Any):
    """An option's value as the Python type that it is declared with: NumPy's numbers and paths are taken too."""
    kind, _, optional = str(field.type).partition(" | ")
    if optional and value is None:
        return None
    if kind == "bool" and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind == "str" and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    numbers: Any = {"int": Integral, "float": Real}.get(kind, ())
    if isinstance(value, numbers) and not isinstance(value, bool):
        if value not in field.metadata["range"]:
            raise ValueError(f"--{field.name} {str(value)[:30]} must be {field.metadata['range']}")
        return int(value) if kind == "int" else float(value)
    raise ValueError(f"--{field.name} {value!r:.80} must be of type {kind}")


def _axes(mesh) -> tuple[tuple[str, int], ...]:
    """Axes and their sizes, each axis once."""
    try:
        axes = tuple((str(name), operator.index(size)) for name, size in mesh)
    except (TypeError, ValueError):
        axes = None
    if axes is None or any(size < 1 for _, size in axes) or len(dict(axes)) < len(axes):
        raise ValueError(f"--mesh {mesh!r:.80} is not like data=2,fsdp=4")
    return axes
