"""What a training run is told; the names are those of the reference's arguments."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.flags import check_axes
from llava_jax.inputs.conversation import conv_templates

# What each stage trains, by parameter path. `lora` trains its own parameters beside these (see lora.py).
STAGES = {
    "pretrain": r"mm_projector/.*|image_newline",
    "finetune": r"mm_projector/.*|image_newline|language_model/.*",
    "lora": r"mm_projector/.*",  # peft freezes all the rest, image_newline too
}
MOST = 2**31 - 1  # steps are counted in int32
LARGEST = float(np.finfo(np.float32).max)


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
        return f"{least} and {'finite' if self.most == LARGEST else most}"


POSITIVE, NOT_NEGATIVE, SHARE = Range(0, LARGEST, "(]"), Range(0, LARGEST), Range(0, 1, "[)")
COUNT = Range(1, MOST)
RANGES = {  # of every field that is a number
    "learning_rate": POSITIVE,
    "mm_projector_lr": NOT_NEGATIVE,
    "mm_vision_tower_lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_ratio": SHARE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "gradient_accumulation_steps": COUNT,
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": SHARE,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(-1, MOST),
    "per_device_train_batch_size": COUNT,
    "model_max_length": COUNT,
    "max_unlabelled_ratio": Range(0, 1),
    "save_steps": COUNT,
    "save_total_limit": COUNT,
    "logging_steps": COUNT,
    "dataloader_num_workers": Range(0, MOST),
    "seed": Range(0, 2**32 - 1),  # as transformers' set_seed
}


@dataclass(frozen=True)
class TrainOptions:
    """One run. Names and defaults are the reference's TrainingArguments', and its scripts' where these set them.

    Where it can be resumed, everything but `save_steps`, `save_total_limit`, `logging_steps`,
    `dataloader_num_workers` and `max_unlabelled_ratio` must be as it was.

    Raises:
        ValueError: a value is of another kind than the field, not finite, or out of its range.
    """

    learning_rate: float = 2e-5
    mm_projector_lr: float | None = None
    mm_vision_tower_lr: float | None = None
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    stage: str = "finetune"  # pretrain, finetune or lora
    model_path: str = ""  # a converted checkpoint
    data_path: str = ""  # LLaVA's JSON
    image_folder: str = "."
    output_dir: str = ""
    version: str | None = None  # the conversation template; None is the checkpoint's, and "plain" for pretrain
    pretrain_mm_mlp_adapter: str | None = None  # a projector to start from: mm_projector.bin, or a converted checkpoint
    unfreeze_mm_vision_tower: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    num_train_epochs: float = 1.0
    max_steps: int = -1  # updates; above 0 it stands instead of the epochs
    per_device_train_batch_size: int = 8  # rows for each device that rows are divided over
    model_max_length: int = 2048
    group_by_modality_length: bool = False
    max_unlabelled_ratio: float = 0.01  # the share of samples without any label that is let pass
    bf16: bool = False  # compute in bfloat16; what is trained stays float32
    gradient_checkpointing: bool = True
    save_steps: int = 500
    save_total_limit: int = 1
    logging_steps: int = 1
    dataloader_num_workers: int = 4
    seed: int = 42
    mesh: tuple[tuple[str, int], ...] = ()  # like (("data", 2), ("fsdp", 4)); empty is one device

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            declared = _axes(value) if field.name == "mesh" else _as_declared(field.name, str(field.type), value)
            object.__setattr__(self, field.name, declared)
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
        """Of the arithmetic and of what is frozen."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def checkpoints(self) -> Path:
        """Where the run's own state is kept, to go on from."""
        return Path(self.output_dir) / "checkpoints"


def _as_declared(name: str, kind: str, value: Any):
    """A field's value as the Python type that it is declared with: NumPy's numbers and paths are taken too."""
    kind, _, optional = kind.partition(" | ")
    if optional and value is None:
        return None
    if kind == "bool" and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind == "str" and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    numbers: Any = {"int": Integral, "float": Real}.get(kind, ())
    if isinstance(value, numbers) and not isinstance(value, bool):
        if value not in RANGES[name]:
            raise ValueError(f"--{name} {str(value)[:30]} must be {RANGES[name]}")
        return int(value) if kind == "int" else float(value)
    raise ValueError(f"--{name} {value!r:.80} must be of type {kind}")


def _axes(mesh) -> tuple[tuple[str, int], ...]:
    """Axes and their sizes, each axis once."""
    try:
        axes = tuple((str(name), operator.index(size)) for name, size in mesh)
    except (TypeError, ValueError):
        axes = None
    if axes is None or any(size < 1 for _, size in axes) or len(dict(axes)) < len(axes):
        raise ValueError(f"--mesh {mesh!r:.80} is not like data=2,fsdp=4")
    return axes
