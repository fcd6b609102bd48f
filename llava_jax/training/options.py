"""What a training run is told; the names are those of the reference's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_jax.flags import check_axes
from llava_jax.inputs.conversation import conv_templates

# What each stage trains, by parameter path. `lora` trains its own parameters beside these (see lora.py).
STAGES = {
    "pretrain": r"mm_projector/.*|image_newline",
    "finetune": r"mm_projector/.*|image_newline|language_model/.*",
    "lora": r"mm_projector/.*",  # peft freezes all the rest, image_newline too
}


@dataclass(frozen=True)
class TrainOptions:
    """One run. Names and defaults are the reference's TrainingArguments', and its scripts' where these set them.

    Where it can be resumed, everything but `save_steps`, `save_total_limit`, `logging_steps` and
    `dataloader_num_workers` must be as it was.
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
    bf16: bool = False  # compute in bfloat16; what is trained stays float32
    gradient_checkpointing: bool = True
    save_steps: int = 500
    save_total_limit: int = 1
    logging_steps: int = 1
    dataloader_num_workers: int = 4
    seed: int = 42
    mesh: tuple[tuple[str, int], ...] = ()  # like (("data", 2), ("fsdp", 4)); empty is one device

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"--stage {self.stage} is none of {', '.join(STAGES)}")
        if self.version is not None and self.version not in conv_templates:
            raise ValueError(f"--version {self.version} is no template; there are {', '.join(sorted(conv_templates))}")
        for name in ("model_path", "data_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is needed")
        positive = ["learning_rate", "lora_r", "lora_alpha", "num_train_epochs", "per_device_train_batch_size"]
        positive += ["gradient_accumulation_steps", "save_steps", "save_total_limit", "logging_steps"]
        for name in (*positive, "model_max_length", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("warmup_ratio", "lora_dropout", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0 and under 1")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"--max_steps {self.max_steps} must be above 0, or -1 for whole epochs")
        check_axes(self.mesh, "data", "fsdp", "tensor")

    @property
    def dtype(self) -> str:
        """Of the arithmetic and of what is frozen."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def checkpoints(self) -> Path:
        """Where the run's own state is kept, to go on from."""
        return Path(self.output_dir) / "checkpoints"
