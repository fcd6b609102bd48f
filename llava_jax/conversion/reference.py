"""The published model, run by others' code: what `verify` compares a converted checkpoint with.

The reference reads the published files itself, and nothing of ours computes with it:

- `original`: the original's own classes (llava-torch 1.2.2.post1 under transformers 4.37.2), in a process of their own.
- `llava-hf`: transformers' `LlavaNextForConditionalGeneration`, or `LlavaForConditionalGeneration`. A checkpoint of the
  llava-hf layout is loaded by transformers alone. Of the liuhaotian layout transformers reads the decoder's and the
  tower's settings as they stand in the files, and the tensors under the names that its conversion script documents
  (HF_NAMES here, not our key table); what the picture's keys of config.json mean is our reading of them, so
  `original` is the stronger proof there. We run in the llava-hf reading then: pinpoints as (height, width), rounding
  in unpad. llava-hf crops pictures for 1.5; its processor is told to pad here, as the original does.

Nothing but NumPy is imported at once: `--help` needs no more, and the original's environment, in which this file is run
as a script, has neither JAX nor this package.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 16
IMAGE_TOKEN_INDEX = -200

Record = dict[str, np.ndarray]  # one picture's pixels, ids, tower, projector, embeds, logits, tokens, gaps


def _record_torch(model, projector, decoder, inputs: dict) -> Record:
    """What passes a PyTorch LLaVA's projector and decoder on the way to its logits, and its greedy tokens."""
    import torch

    seen = {}
    named = inspect.signature(model.forward).parameters
    cache = "cache" if "cache" in named else "past_key_values"  # as older ones call it

    def project(_, args, output):
        seen["tower"], seen["projector"] = args[0], output

    def decode(_, args, kwargs):
        given = kwargs.get("inputs_embeds")
        seen["embeds"] = (model.get_input_embeddings()(inputs["input_ids"]) if given is None else given)[0]

    handles = (
        projector.register_forward_hook(project),
        decoder.register_forward_pre_hook(decode, with_kwargs=True),
    )
    with torch.inference_mode():
        out = model(**inputs, use_cache=True)
        for handle in handles:
            handle.remove()
        seen["logits"], tokens, gaps = out.logits[0], [], []
        for _ in range(NEW_TOKENS):
            best = torch.topk(out.logits[0, -1], 2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            again = torch.tensor([tokens[-1:]])
            out = model(input_ids=again, use_cache=True, **{cache: getattr(out, cache)})
    record = {name: tensor.float().numpy() for name, tensor in seen.items()}
    return record | {"tokens": np.array(tokens), "gaps": np.array(gaps)}


def record_original(published, text: str, pictures: list, python: str, vision_tower: str | None) -> list[Record]:
    """What the original computes, in a process of the interpreter `python`, which has it and need not have JAX."""
    from llava_jax.conversion import published_files

    if published.layout != "liuhaotian":
        raise ValueError(
            f"{published.source}: the original does not read the {published.layout} layout; give --against llava-hf"
        )
    published_files.open_checkpoint(published.location)  # fetched from the hub, where it is there
    tower = vision_tower if published.tower is None else str(published.tower.path)
    with tempfile.TemporaryDirectory() as folder:
        paths = [picture and str(Path(folder, f"{i}.png")) for i, picture in enumerate(pictures)]
        for picture, path in zip(pictures, paths, strict=True):
            if picture is not None:
                picture.save(path)
        job = {"checkpoint": str(published.location.path), "name": published.name, "tower": tower}
        Path(folder, "job.json").write_text(json.dumps(job | {"prompt": text, "pictures": paths}), encoding="utf-8")
        try:
            done = subprocess.run([python, __file__, folder], stderr=subprocess.PIPE, text=True, errors="replace")
        except OSError as error:
            raise ValueError(f"--python {python}: cannot be run ({error})") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it was killed; was there memory enough?"])[-1]
            raise ValueError(f"--against original: {last}")
        records = []
        for i in range(len(pictures)):
            with np.load(Path(folder, f"{i}.npz")) as file:
                records.append(dict(file))
    return records


def _run_original(folder: Path) -> None:
    """The other end of `record_original`: nothing of this package is imported, and each picture's record is a file."""
    try:
        import torch
        from llava.mm_utils import process_images, tokenizer_image_token
        from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
        from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
        from PIL import Image
        from transformers import AutoTokenizer
    except Exception as error:  # under another transformers its import fails in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.exit(
            f"{sys.executable} cannot import the original LLaVA ({reason}); make an environment for it with "
            "tests/golden/setup.sh (PyTorch, llava-torch 1.2.2.post1, transformers 4.37.2), and give its interpreter "
            "with --python"
        )
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    raw = json.loads(Path(job["checkpoint"], "config.json").read_text(encoding="utf-8"))
    if raw.get("s2"):
        sys.exit("the release llava-torch 1.2.2.post1 has no S2 tower, so there is nothing to compare with")
    mistral = raw["architectures"] == ["LlavaMistralForCausalLM"]
    kinds = (LlavaMistralConfig, LlavaMistralForCausalLM) if mistral else (LlavaConfig, LlavaLlamaForCausalLM)
    config = kinds[0].from_pretrained(job["checkpoint"])
    config._attn_implementation = "sdpa"
    config.mm_vision_tower = job["tower"] or config.mm_vision_tower
    model, info = kinds[1].from_pretrained(
        job["checkpoint"], config=config, torch_dtype=torch.float32, low_cpu_mem_usage=True, output_loading_info=True
    )
    missing = set(info["missing_keys"]) - ({"lm_head.weight"} if raw.get("tie_word_embeddings") else set())
    if missing:
        sys.exit(f"the original finds no {sorted(missing)[0]} (and {len(missing) - 1} more) in {job['checkpoint']}")
    slow = "mistral" not in job["name"].lower()  # as llava.model.builder has it
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], use_fast=not slow)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    model.float().eval()
    ids = tokenizer_image_token(job["prompt"], tokenizer, return_tensors="pt")[None]
    for i, path in enumerate(job["pictures"]):
        record, inputs = {"ids": ids[0].numpy()}, {"input_ids": ids}
        if path:
            image = Image.open(path).convert("RGB")
            inputs["images"] = process_images([image], tower.image_processor, config)
            inputs["image_sizes"] = [image.size]
            record["pixels"] = inputs["images"].flatten(0, -4).numpy()
        record |= _record_torch(model, model.get_model().mm_projector, model.model, inputs)
        np.savez(folder / f"{i}.npz", **record)


def record_llava_hf(published, text: str, pictures: list) -> list[Record]:
    """What transformers' own LLaVA computes with the published weights."""
    try:
        import torch
        import transformers
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    except ImportError as error:
        raise ValueError(
            f"verify: --against llava-hf needs PyTorch and transformers 5 ({error}); run "
            "`pip install torch 'transformers>=5'`, or check against the record of the conversion alone with --quick"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    ids = _hf_ids(published, text)
    image_id = next(i for i in range(len(ids) + 1) if i not in ids)  # stands for the picture, whatever else it means
    model = _hf_model(published, image_id).eval()
    anyres = published.config.image_aspect_ratio == "anyres"
    settings = published.preprocessor_config
    size = published.config.vision.image_size
    options: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    options |= {key: settings[key] for key in ("image_mean", "image_std") if key in settings}
    if anyres:
        pinpoints = [list(pair) for pair in published.config.image_grid_pinpoints]
        processor = next_processor(**options, image_grid_pinpoints=pinpoints)
    else:
        processor = LlavaImageProcessorPil(**options, do_pad=published.config.image_aspect_ratio == "pad")
    records = []
    for picture in pictures:
        record, inputs, row = {"ids": np.array(ids)}, {}, ids
        if picture is not None:
            inputs = dict(processor(picture, return_tensors="pt"))
            record["pixels"] = inputs["pixel_values"].flatten(0, -4).numpy()
            with torch.inference_mode():
                features = model.get_image_features(**inputs, return_dict=True).pooler_output
            place = ids.index(IMAGE_TOKEN_INDEX)
            row = [*ids[:place], *[image_id] * sum(map(len, features)), *ids[place + 1 :]]
        inputs["input_ids"] = torch.tensor([row])
        record |= _record_torch(model, model.model.multi_modal_projector, model.model.language_model, inputs)
        records.append(record)
    return records


def next_processor(**options):
    """transformers' processor of anyres pictures, resizing across and then down, as under the Pillow of its models."""
    from transformers.image_utils import SizeDict
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    class AcrossThenDown(LlavaNextImageProcessorPil):
        def resize(self, image, size, *args, **options):
            if size.width:  # to a size, not to a shortest edge
                across = SizeDict(height=image.shape[-2], width=size.width)
                image = super().resize(image, across, *args, **options)
            return super().resize(image, size, *args, **options)

    return AcrossThenDown(**options)


def _hf_ids(published, text: str) -> list[int]:
    """transformers' ids of the prompt, -200 where `<image>` stands. Of `tokenizer.model` alone transformers 5 forgets
    the space that a text begins with; `legacy` brings back what the checkpoints were trained with."""
    import transformers

    path = published.location.path
    if (path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    else:
        tokenizer = transformers.LlamaTokenizer.from_pretrained(path, legacy=True)
    tokenizer.add_tokens(transformers.AddedToken("<image>", special=True, normalized=False))
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [IMAGE_TOKEN_INDEX if i == image else i for i in tokenizer.encode(text)]


# The names of the liuhaotian layout → llava-hf's, as transformers' convert_llava_next_weights_to_hf.py has them.
HF_NAMES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
BUFFERS = ("rotary_emb.inv_freq", "position_ids")


def _hf_model(published, image_id: int):
    """transformers' LLaVA, float32, with every weight from the published files."""
    import torch
    import transformers

    from llava_jax.conversion import other_layout, published_files

    anyres = published.config.image_aspect_ratio == "anyres"
    kind = "LlavaNext" if anyres else "Llava"
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    options = {"dtype": torch.float32, "output_loading_info": True}
    published_files.open_checkpoint(published.location)  # fetched from the hub, where it is there
    if published.layout == "llava-hf":
        model, info = model_class.from_pretrained(published.location.path, **options)
        model.config.image_token_id = image_id
    else:
        try:
            settings = other_layout.llava_hf_config(published.config, 0, published.source)
        except ValueError as error:
            raise ValueError(f"--against llava-hf: {str(error).split(';')[0]}; give --against original") from None
        text_kind = settings["text_config"]["model_type"]
        settings["text_config"] = published.config.source | {"model_type": text_kind}
        settings["vision_config"] = published.vision_config | {"model_type": "clip_vision_model"}
        config = getattr(transformers, f"{kind}Config").from_dict(settings | {"image_token_index": image_id})
        tensors = _hf_tensors(published)
        model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        told = "; ".join(f"{kind}: {names[0]} (of {len(names)})" for kind, names in wrong.items())
        raise ValueError(f"{published.source}: transformers cannot load it ({told})")
    return model


def _hf_tensors(published) -> dict:
    """The tensors of a liuhaotian checkpoint, and of the tower beside it, under llava-hf's names."""

    from llava_jax.conversion import published_files

    tensors = _read_torch(published_files.open_checkpoint(published.location))
    inside = HF_NAMES[0][0]
    tuned = published.config.source.get("unfreeze_mm_vision_tower") or published.tower is None
    if not (tuned and any(name.startswith(inside) for name in tensors)):  # then the original reads the one beside
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
        if published.tower is None:
            raise FileNotFoundError(published.tower_error)
        beside = _read_torch(published_files.open_checkpoint(published.tower))
        tensors |= {inside + name: tensor for name, tensor in beside.items() if name.startswith("vision_model.")}
    renamed = {}
    for name, tensor in tensors.items():
        if not name.endswith(BUFFERS):
            old, new = next((pair for pair in HF_NAMES if name.startswith(pair[0])), ("", ""))
            renamed[new + name[len(old) :]] = tensor
    return renamed


def _read_torch(listed) -> dict:
    """All tensors of the files that `published_files.open_checkpoint` listed, by the formats' own libraries."""
    import torch
    from safetensors.torch import load_file

    tensors: dict = {}
    for file in sorted({tensor.file for tensor in listed.values()}):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            tensors |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return tensors


if __name__ == "__main__":  # in the original's environment, by record_original
    _run_original(Path(sys.argv[1]))
