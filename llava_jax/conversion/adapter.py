"""What a LoRA run trained, as a PEFT directory, as the original's LoRA training leaves one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_jax import checkpoint
from llava_jax.checkpoint import ADAPTERS, TRAIN_OPTIONS
from llava_jax.config_schema import read_checked
from llava_jax.conversion import key_table
from llava_jax.conversion.atomic_directory import check_output, new_directory
from llava_jax.conversion.orbax_reader import (
    Converted,
    Stored,
    Written,
    as_tensor,
    open_converted,
    open_stored,
    read_tensors,
)
from llava_jax.conversion.published_files import write_json
from llava_jax.conversion.safetensors_files import write_safetensors

PEFT = "base_model.model."  # what peft puts in front of a model's own names
MATRICES = {"a": "lora_A", "b": "lora_B"}


def export_adapter(
    directory: str | os.PathLike, output: str | os.PathLike, dtype: str | None = None, progress: bool = True
) -> Path:
    """Write a LoRA run's adapters, and what else it trained, as the original's `load_pretrained_model` reads them.

    `adapter_model.safetensors` has peft's names; `non_lora_trainables.bin`, which torch writes, has the projector,
    `image_newline`, and the tower where it was tuned. The original takes OUTPUT as its model path, if its name has
    "llava" and "lora" in it, and the checkpoint that the training started from as its base.

    Args:
        directory: what a training run of the stage `lora` wrote.
        output: the directory to write.
        dtype: float32, bfloat16 or float16; None writes each tensor as it is stored.
        progress: print what is done, with a bar over bytes.

    Returns:
        The output directory.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: one clear reason; nothing is left behind.
    """
    key_table.check_dtype(dtype)
    output = Path(output).expanduser().absolute()
    check_output(output)
    converted = open_converted(directory)
    options = _read_options(converted)
    adapters = open_stored(converted.directory / ADAPTERS)
    tensors = _adapter_tensors(converted, adapters, dtype)
    others = _other_tensors(converted, options, dtype)
    nbytes = sum(info.nbytes for info in (*tensors.values(), *others.values()))
    say = print if progress else lambda *_: None
    say(f"{directory}: {len(tensors)} tensors of adapters, {len(others)} others")
    with new_directory(output, nbytes) as temporary:
        with tqdm(total=nbytes, unit="B", unit_scale=True, disable=not progress) as bar:

            def read(names):
                return read_tensors(adapters, [tensors[name] for name in names], bar)

            write_safetensors(temporary / "adapter_model.safetensors", tensors, read)
            arrays = read_tensors(converted.stored, others.values(), bar)
            _write_torch(temporary / "non_lora_trainables.bin", dict(zip(others, arrays, strict=True)))
        write_json(temporary / "adapter_config.json", _adapter_config(options, tensors))
        write_json(temporary / "config.json", read_checked(converted.directory / "config.json"))
    say(f"wrote {output}: {nbytes / 2**20:.0f} MiB")
    return output


def _read_options(converted: Converted) -> dict:
    """The training run's options, after checking that there is a run of the right kind and the means to write it."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError("--adapter: non_lora_trainables.bin needs PyTorch; run `pip install torch`") from None
    directory = converted.directory
    if converted.layout != "liuhaotian":
        raise ValueError(
            f"{directory}: --adapter is for the liuhaotian layout, and this came as {converted.layout}; leave it out, "
            "and the adapters are merged into what is exported"
        )
    if not ((directory / ADAPTERS).is_dir() and (directory / TRAIN_OPTIONS).is_file()):
        raise ValueError(
            f"{directory}: no adapters ({ADAPTERS}, {TRAIN_OPTIONS}); --adapter is for what --stage lora left"
        )
    return read_checked(directory / TRAIN_OPTIONS)


def _adapter_tensors(converted: Converted, adapters: Stored, dtype: str | None) -> dict[str, Written]:
    """peft's name → tensor: `lora_A` [r, in] and `lora_B` [out, r] of each adapted layer."""
    rules = key_table.liuhaotian_rules(converted.config)
    out = {}
    for path in adapters.infos:
        layer, _, matrix = path.rpartition("/")
        name = key_table.published_name(f"{layer}/kernel", rules)[0].removesuffix(".weight")
        out[f"{PEFT}{name}.{MATRICES[matrix]}.weight"] = as_tensor(adapters, path, "transpose", dtype)
    return dict(sorted(out.items()))


def _other_tensors(converted: Converted, options: dict, dtype: str | None) -> dict[str, Written]:
    trained = "mm_projector/.*|image_newline" + ("|vision_tower/.*" if options["unfreeze_mm_vision_tower"] else "")
    rules = key_table.liuhaotian_rules(converted.config)
    out = {}
    for path in filter(re.compile(trained).fullmatch, converted.stored.infos):
        name, transform = key_table.published_name(path, rules)
        out[PEFT + name] = as_tensor(converted.stored, path, transform, dtype)
    return out


def _write_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    import torch

    def tensor(array):
        array = np.ascontiguousarray(array)
        if array.dtype == "bfloat16":  # NumPy has it from ml_dtypes, which torch does not know
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({name: tensor(array) for name, array in arrays.items()}, path)


def _adapter_config(options: dict, tensors: dict[str, Written]) -> dict:
    base = Path(options["model_path"])
    manifest = base / checkpoint.MANIFEST
    return {
        "base_model_name_or_path": read_checked(manifest)["source"] if manifest.is_file() else str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": options["lora_alpha"],
        "lora_dropout": options["lora_dropout"],
        "peft_type": "LORA",
        "r": options["lora_r"],
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "task_type": "CAUSAL_LM",
    }
