"""The bundled model from nothing: its tower, its language, then LLaVA's stages. Killed, it goes on where it was."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from llava_jax.checkpoint import CHECKSUMS, MANIFEST, load_config, load_params
from llava_jax.config_schema import read_checked
from llava_jax.conversion.checksums import write_record
from llava_jax.conversion.published_files import write_json
from llava_jax.demo.dataset import DATA, IMAGES, write_dataset
from llava_jax.demo.model import (
    NAME,
    TOWER,
    convert_published,
    first_params,
    scenes_config,
    write_published,
    write_tokenizer,
)
from llava_jax.demo.pretrain import pretrain_tower
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.records import read_json_object

SEED = 1  # of the training scenes; `score` draws its own
TOWER_STEPS, TOWER_RATE = 5000, 2e-3


@dataclass(frozen=True)
class Phase:
    """One run of the package's trainer, and the scenes that it is given."""

    name: str
    stage: str  # pretrain or finetune
    style: str  # of the samples: captions or questions; see `make_sample`
    pictures: str  # one of dataset.PICTURES
    aspect: str  # image_aspect_ratio
    scenes: int
    steps: int
    rows: int  # of a step
    length: int  # positions that a row may take
    learning_rate: float
    tower_rate: float | None = None  # None: the tower is frozen
    version: str | None = None  # the conversation template; None is the checkpoint's own


PHASES = (
    Phase("language", "finetune", "captions", "square", "pad", 30_000, 3000, 16, 128, 2e-3, 3e-4, "plain"),
    Phase("pretrain", "pretrain", "captions", "all", "anyres", 2_000, 120, 16, 256, 1e-3, None, "plain"),
    Phase("finetune-square", "finetune", "questions", "square", "pad", 40_000, 4000, 16, 128, 1.5e-3, 3e-4),
    Phase("finetune", "finetune", "questions", "all", "anyres", 60_000, 3500, 16, 256, 1e-3, 5e-4),
    Phase("finetune-various", "finetune", "questions", "various", "anyres", 40_000, 2400, 16, 256, 1e-3, 5e-4),
    Phase("finetune-mixed", "finetune", "questions", "mixed", "anyres", 36_000, 2200, 16, 256, 7e-4, 3e-4),
)


def train_demo(output: str | Path, phases: tuple[Phase, ...] = PHASES, tower_steps: int = TOWER_STEPS) -> Path:
    """The tower's pretraining and all the phases, in `output`: a directory, new or of a run that was killed, which
    then goes on. Returns the published checkpoint in it."""
    output = Path(output)
    directory = _first_checkpoint(output, tower_steps)
    for number, phase in enumerate(phases):
        directory = _run(phase, number, directory, output)
    config, published = load_config(directory), output / NAME
    write_published(published, config.replace(mm_vision_tower=TOWER), load_params(directory, config, dtype="float32"))
    return published


def _first_checkpoint(output: Path, tower_steps: int) -> Path:
    """Random parameters around a tower that has been pretrained, converted: what the phases start from."""
    directory = output / "start"
    if (directory / MANIFEST).exists():
        return directory
    files = output / "tokenizer"
    files.mkdir(parents=True, exist_ok=True)
    write_tokenizer(files)
    config = scenes_config(len(load_tokenizer(files)))
    params = first_params(config, seed=0)
    print(f"tower: {tower_steps} steps", flush=True)
    params["vision_tower"] = pretrain_tower(
        params["vision_tower"], config, output / "tower", steps=tower_steps, learning_rate=TOWER_RATE, seed=SEED
    )
    published = write_published(output / "random" / NAME, config, params, "float32")
    shutil.rmtree(directory, ignore_errors=True)
    return convert_published(published, directory)


def _run(phase: Phase, number: int, start: Path, output: Path) -> Path:
    """The phase's checkpoint, trained from the one before; nothing is done again if it is there."""
    from llava_jax.training.train import train
    from llava_jax.training.train_options import TrainOptions

    directory = output / phase.name
    if (directory / MANIFEST).exists():
        return directory
    _set_aspect(start, phase.aspect)
    config = load_config(start)
    print(f"{phase.name}: {phase.steps} steps of {phase.rows} scenes; the scenes first", flush=True)
    data = write_dataset(
        output / f"{phase.name}-data",
        phase.scenes,
        style=phase.style,
        pictures=phase.pictures,
        length=phase.length,
        config=config,
        seed=100 * SEED + number,
    )
    options = TrainOptions(
        stage=phase.stage,
        version=phase.version,
        model_path=str(start),
        data_path=str(data / DATA),
        image_folder=str(data / IMAGES),
        output_dir=str(directory),
        max_steps=phase.steps,
        per_device_train_batch_size=phase.rows,
        learning_rate=phase.learning_rate,
        unfreeze_mm_vision_tower=phase.tower_rate is not None,
        mm_vision_tower_lr=phase.tower_rate,
        adam_beta2=0.98,
        gradient_checkpointing=False,
        model_max_length=512,
        save_steps=100,
        logging_steps=10,
        dataloader_num_workers=1,
    )
    return train(options)


def _set_aspect(directory: Path, ratio: str) -> None:
    """A checkpoint's image_aspect_ratio, which its next phase trains with; its checksums then are of that config."""
    file = directory / "config.json"
    write_json(file, read_json_object(file) | {"image_aspect_ratio": ratio})
    if (directory / CHECKSUMS).is_file():
        write_record(directory, read_checked(directory / CHECKSUMS)["parameters"])
