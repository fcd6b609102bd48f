"""Train the original PyTorch LLaVA for ten steps on this folder's vicuna checkpoint, and record it.

    ENV/bin/python record_training.py --scratch FOLDER [--output training.npz]

The original's own preprocessing, collator, model, parameter groups (LLaVATrainer.create_optimizer), torch's AdamW and
transformers' cosine schedule; for LoRA peft's adapters, on the layers that find_all_linear_names names. Two things are
ours, because the release trains 1.5 only: pictures go in as anyres tiles, and image_newline is trained in the pretrain
stage too. The keys, each under its run's name:

    loss, grad_norm       of every step, and of every update before clipping
    weight/, norm/        of every parameter that asks for gradients: values at a stride, and the norm
    start/                LoRA only: the first value of every adapter's lora_A, whole
    linear_names          LoRA only: JSON, what find_all_linear_names gives
    last/, merged/        LoRA only: of one block lora_A and lora_B after the steps, whole, and the weights that peft
                          merges them into, at a stride
"""

import argparse
import json
import os
from types import SimpleNamespace

import checkpoints
import images as pictures
import llava.conversation as conversation_lib
import numpy as np
import torch
import training_data
import transformers
from llava.mm_utils import process_images
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import (
    DataCollatorForSupervisedDataset,
    find_all_linear_names,
    preprocess,
    preprocess_multimodal,
)
from peft import LoraConfig, get_peft_model
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))


def build(folder, run):
    """(model, tokenizer), with what the stage trains unfrozen."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, model_max_length=4096, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    model = LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    model.config.use_cache = False
    model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length = "right", 4096
    if run["stage"] == "lora":
        return with_adapters(model, run).float().train(), tokenizer
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    model.requires_grad_(run["stage"] == "finetune")
    for p in model.get_model().mm_projector.parameters():
        p.requires_grad = True
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.requires_grad = True
    tower.requires_grad_(run.get("unfreeze_mm_vision_tower", False))
    if run.get("unfreeze_mm_vision_tower"):
        tower.forward = type(tower).forward.__wrapped__.__get__(tower)  # without its no_grad
    return model.float().train(), tokenizer


def with_adapters(model, run):
    """The model as the original's train() has it under lora_enable: first peft, then initialize_vision_modules."""
    config = LoraConfig(
        r=run["lora_r"],
        lora_alpha=run["lora_alpha"],
        lora_dropout=run["lora_dropout"],
        target_modules=find_all_linear_names(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    names = "select_layer", "select_feature"
    told = {f"mm_vision_{name}": getattr(model.config, f"mm_vision_{name}") for name in names}
    told |= {name: getattr(model.config, name) for name in ("mm_projector_type", "mm_patch_merge_type")}
    told |= dict(vision_tower=model.config.mm_vision_tower, pretrain_mm_mlp_adapter=None)
    model.get_model().initialize_vision_modules(SimpleNamespace(**told))
    return model


def batches(tokenizer, model, run, shown):
    """The collated batches, in order, with pictures as anyres tiles."""
    conversation_lib.default_conversation = conversation_lib.conv_templates[run["version"]]
    args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    processor, samples = model.get_vision_tower().image_processor, []
    for example in training_data.examples(plain=run["version"] == "plain"):
        sources = [example["conversations"]]
        if "image" in example:
            sources = preprocess_multimodal(sources, args)
        sample = preprocess(sources, tokenizer, has_image="image" in example)
        tiles, size = torch.zeros(1, 3, 336, 336), (336, 336)  # the original's dummy for text alone
        if "image" in example:
            picture = shown[example["image"]]
            tiles, size = process_images([picture], processor, model.config)[0], picture.size
            tiles = tiles if tiles.ndim == 4 else tiles[None]
        samples.append((dict(input_ids=sample["input_ids"][0], labels=sample["labels"][0]), tiles, size))
    collate = DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    for start in range(0, len(samples), training_data.ROWS):
        some = samples[start : start + training_data.ROWS]
        images = [tiles for _, tiles, _ in some]
        if model.config.image_aspect_ratio != "anyres":
            images = torch.cat(images)
        yield collate([sample for sample, _, _ in some]) | dict(
            images=images, image_sizes=[size for _, _, size in some]
        )


def train(folder, run, shown):
    """What is recorded of a run (see above)."""
    torch.manual_seed(0)
    model, tokenizer = build(folder, run)
    D = {f"start/{n}": x.copy() for n, x in parameters(model).items() if is_decoders_adapter(n) and "lora_A" in n}
    together = run.get("gradient_accumulation_steps", 1)
    arguments = transformers.TrainingArguments(
        output_dir="/tmp/unused", lr_scheduler_type="cosine", report_to=[], **training_data.SETTINGS
    )
    arguments.mm_projector_lr = run.get("mm_projector_lr")
    trainer = LLaVATrainer(model=model, args=arguments, tokenizer=tokenizer)
    trainer.create_optimizer_and_scheduler(training_data.STEPS // together)
    losses, norms = [], []
    for n, batch in enumerate(batches(tokenizer, model, run, shown)):
        loss = model(**batch).loss
        (loss / together).backward()
        losses.append(loss.item())
        if (n + 1) % together == 0:
            trained = [p for p in model.parameters() if p.requires_grad]
            norms.append(torch.nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm).item())
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()
    D |= dict(loss=np.float32(losses), grad_norm=np.float32(norms))
    for name, x in parameters(model).items():
        D[f"weight/{name}"] = x.ravel()[training_data.sampled(x.size)]
        D[f"norm/{name}"] = np.float32(np.linalg.norm(x))
    if run["stage"] == "lora":
        D |= merged(model)
    return D


def parameters(model):
    """name → what asks for gradients; peft's prefixes and its adapter's name ("default") are left out."""
    trained = {n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    return {n.removeprefix("base_model.model.").replace(".default.", "."): x for n, x in trained.items()}


def is_decoders_adapter(name):
    """peft matches names' ends: where the tower is part of the checkpoint, its q, k and v get adapters too."""
    return "lora_" in name and "vision_tower" not in name


def merged(model):
    """The adapters of one block, and what they are merged into."""
    D = {f"last/{n}": x for n, x in parameters(model).items() if "lora_" in n and n.startswith(training_data.MERGED)}
    plain = model.merge_and_unload()
    D["linear_names"] = json.dumps(sorted(find_all_linear_names(plain)))
    for name, p in plain.named_parameters():
        if name.startswith(training_data.MERGED) and "_proj" in name:
            D[f"merged/{name}"] = p.detach().numpy().ravel()[training_data.sampled(p.numel())]
    return D


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--output", default=os.path.join(HERE, "training.npz"))
    args = parser.parse_args()
    paths = pictures.write(os.path.join(args.scratch, "images"), training_data.PICTURES)
    shown = {name: Image.open(path).convert("RGB") for name, path in paths.items()}
    D = {}
    for name, (variant, run) in training_data.RUNS.items():
        folder = os.path.join(args.scratch, "llava-" + variant)
        checkpoints.write(variant, folder)
        recorded = train(folder, run, shown)
        print(name, recorded["loss"], recorded["grad_norm"])
        D |= {f"{name}/{key}": value for key, value in recorded.items()}
    np.savez_compressed(args.output, **D)


if __name__ == "__main__":
    main()
