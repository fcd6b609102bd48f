"""A llava_jax directory back into a published layout: `python convert/to_hf.py DIR --output OUT`."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_jax.config_schema import read_checked
from llava_jax.conversion import key_table, other_layout, published_files
from llava_jax.conversion.atomic_directory import check_output, new_directory
from llava_jax.conversion.orbax_reader import Converted, Written, as_tensor, open_converted, read_tensors
from llava_jax.conversion.published_files import Tensor, write_json
from llava_jax.conversion.safetensors_files import write_checkpoint
from llava_jax.conversion.small_files import BUFFERS_FILE, PROCESSOR_FILES, TOKENIZER_FILES

MAX_SHARD_BYTES = 5 * 10**9  # as transformers has long had it
EMBEDDING, HEAD = "language_model/embed_tokens/embedding", "language_model/lm_head/kernel"
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json: transformers 5's, and the one that all read


def export(
    directory: str | os.PathLike,
    output: str | os.PathLike,
    layout: str | None = None,
    dtype: str | None = None,
    vision_tower: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write a converted (or trained) checkpoint as it would be published.

    In the layout that it came in, names, dtypes and bytes of the tensors and the config are those that came in. A
    batch of tensors after another, so memory stays small however large the model is. The directory appears under its
    name when it is complete, and not before.

    Args:
        directory: what convert/from_hf.py or a training run wrote.
        output: the directory to write.
        layout: liuhaotian or llava-hf; None is the one that the checkpoint came in.
        dtype: float32, bfloat16 or float16; None writes each tensor as it is stored.
        vision_tower: what config.json is to name as `mm_vision_tower` (liuhaotian).
        max_shard_bytes: of one safetensors file.
        progress: print what is done, with a bar over bytes.

    Returns:
        The output directory.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: one clear reason; nothing is left behind.
    """
    output = Path(output).expanduser().absolute()
    check_output(output)
    converted = open_converted(directory)
    layout = layout or converted.layout
    _check_arguments(layout, dtype, vision_tower)
    same = layout == converted.layout
    config = published_config(converted, layout, vision_tower)
    tensors = make_plan(converted, layout, config, dtype)
    beside = converted.directory / BUFFERS_FILE
    buffers = published_files.open_file(beside) if same and beside.is_file() else {}
    config = with_dtype(config, converted, tensors, same)
    infos: dict[str, Written | Tensor] = {**tensors, **buffers}
    nbytes = sum(info.nbytes for info in infos.values())
    say = print if progress else lambda *_: None
    say(f"{directory}: to the {layout} layout, {len(infos)} tensors")
    with new_directory(output, nbytes) as temporary:
        with tqdm(total=nbytes, unit="B", unit_scale=True, disable=not progress) as bar:
            write_checkpoint(temporary, infos, lambda names: _read(converted, infos, names, bar), max_shard_bytes)
        _write_small_files(temporary, converted, layout, config)
    say(f"wrote {output}: {nbytes / 2**30:.2f} GiB")
    return output


def _check_arguments(layout: str, dtype: str | None, vision_tower: str | None) -> None:
    if layout not in key_table.RULES:
        raise ValueError(f"--layout {layout} is not supported; supported: {', '.join(key_table.RULES)}")
    key_table.check_dtype(dtype)
    if vision_tower is not None and layout != "liuhaotian":
        raise ValueError(f"--vision-tower is for the liuhaotian layout; this is {layout}")


# ---- which parameter becomes which tensor


def published_config(converted: Converted, layout: str, vision_tower: str | None) -> dict:
    """The `config.json` to write, but for its dtype."""
    if layout == converted.layout:
        config = read_checked(converted.directory / "config.json")
        return config | ({"mm_vision_tower": vision_tower} if vision_tower else {})
    what = str(converted.directory)
    if layout == "liuhaotian":
        return other_layout.liuhaotian_config(converted.config, vision_tower, what)
    return other_layout.llava_hf_config(
        converted.config, other_layout.image_token(converted.config, converted.directory), what
    )


def make_plan(converted: Converted, layout: str, config: dict, dtype: str | None) -> dict[str, Written]:
    """Published name → tensor, in the order of the names.

    A liuhaotian checkpoint holds its tower if it held it when it was published, or if it is tuned: what the original
    does not find there it reads from the CLIP that the config names.
    """
    rules, text = key_table.RULES[layout](converted.config), config.get("text_config", config)
    vocab_size = text.get("vocab_size", converted.config.text.vocab_size)
    record = converted.published if layout == converted.layout else {"vision_tower": "inside"}
    inside = layout == "llava-hf" or converted.config.unfreeze_mm_vision_tower or record.get("vision_tower") == "inside"
    out = {}
    for path in converted.stored.infos:
        if path.startswith("vision_tower/") and not inside:
            continue
        name, transform = key_table.published_name(path, rules, record.get("names", ()))
        out[name] = as_tensor(converted.stored, path, transform, dtype)
        if path in (EMBEDDING, HEAD):
            out[name] = dataclasses.replace(out[name], shape=(vocab_size, *out[name].shape[1:]))
        if path == EMBEDDING and "tied_head" in record:
            out[record["tied_head"]] = out[name]
    return dict(sorted(out.items()))


def with_dtype(config: dict, converted: Converted, tensors: dict[str, Written], as_published: bool) -> dict:
    """The config saying which dtype all tensors have, where that is not what was published."""
    dtypes = {info.dtype for info in tensors.values()}
    before = converted.published.get("dtype", converted.manifest.get("dtype")) if as_published else None
    if len(dtypes) > 1 or before in dtypes:
        return config
    (dtype,) = dtypes
    nested = {k: _saying(v, dtype) for k, v in config.items() if k in ("text_config", "vision_config")}
    named = {} if any(key in config for key in DTYPE_KEYS) else {"torch_dtype": dtype}
    return _saying(config | nested | named, dtype)


def _saying(config: dict, dtype: str) -> dict:
    return config | {key: dtype for key in DTYPE_KEYS if key in config}


# ---- writing


def _read(
    converted: Converted, infos: dict[str, Written | Tensor], names: list[str], bar: tqdm
) -> Iterator[np.ndarray]:
    """The tensors of these names, in this order: parameters, and buffers as they came."""
    wanted = [infos[name] for name in names]
    params = read_tensors(converted.stored, (info for info in wanted if isinstance(info, Written)), bar)
    for info in wanted:
        yield next(params) if isinstance(info, Written) else info.read()


def _write_small_files(directory: Path, converted: Converted, layout: str, config: dict) -> None:
    names = ["generation_config.json", *TOKENIZER_FILES]
    same = layout == converted.layout
    if same:
        names += ["preprocessor_config.json", *PROCESSOR_FILES]
    if config == read_checked(converted.directory / "config.json"):
        names.append("config.json")  # byte for byte
    else:
        write_json(directory / "config.json", config)
    for name in names:
        if (converted.directory / name).is_file():
            shutil.copyfile(converted.directory / name, directory / name)
    if layout == "llava-hf" and not same:
        other_layout.add_image_token(directory, config["image_token_index"])
        other_layout.write_processor(directory, converted.config)
