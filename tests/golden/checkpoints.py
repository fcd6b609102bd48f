"""Tiny random checkpoints in the published on-disk layouts, the same bytes wherever they are written.

Every tensor is drawn from sha256(seed:name) and rounded until it is exact in bf16, fp16 and f32, so neither the machine
nor the stored dtype matters. NumPy alone writes safetensors; torch is imported only where a layout wants `.bin` files.

    vicuna    llava-v1.6-vicuna-7b: anyres, spatial_unpad, bf16 safetensors shards, the tuned tower inside
    mistral   llava-v1.6-mistral-7b: grouped keys and values, rope_theta 1e6
    llava15   llava-v1.5-7b: pad, fp16 .bin shards with `inv_freq` left in, the tower beside it
    s2        1.5 with s2=true; safetensors, the tower beside it
    clspatch  cls_patch + flat + a linear projector; attention biases, linear rope_scaling
    spatial   "spatial" merge (no newline) + a linear projector, pinpoints as a string, tied embeddings, select layer -1
    bin       vicuna's weights as .bin shards
    hf-next   vicuna's weights in the llava-hf layout (fp16, 64 more words)
"""

import argparse
import hashlib
import json
import os
import re
import shutil

import numpy as np

SEED = 2024
RECORDED = ("vicuna", "mistral", "llava15", "s2", "clspatch", "spatial")
VARIANTS = (*RECORDED, "bin", "hf-next")
TOKENIZERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizers")
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
STRING_PINPOINTS = "[(336, 672), (672, 336), (336, 1344), (1344, 336)]"

VISION = dict(hidden_size=48, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
VISION.update(image_size=336, patch_size=14)
CLIP_TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
CLIP_PROJECTION = 24
TEXT = dict(hidden_size=96, intermediate_size=248, num_hidden_layers=3, num_attention_heads=6)
VOCAB = 32000
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
PREPROCESSOR = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 336,
}
SHARD_BYTES = 1_000_000


# ---- weights


def round_bf16(x):
    """float32 rounded to the nearest bfloat16 (ties to even), still as float32; what fp16 cannot hold becomes 0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    x = bits.astype(np.uint32).view(np.float32)
    return np.where(np.abs(x) < 2.0**-13, np.float32(0), x)


def value(name, shape, seed):
    """One tensor, determined by (seed, name, shape) alone."""
    if name.endswith("position_ids"):
        return np.arange(shape[1], dtype=np.int64)[None]
    if name.endswith("inv_freq"):
        return round_bf16(1.0 / 10000.0 ** (np.arange(shape[0]) / shape[0]))
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    x = generator.standard_normal(size=shape, dtype=np.float32)
    if name.endswith("logit_scale"):
        x = np.float32(2.6592)
    elif name.endswith("weight") and len(shape) == 1:
        x = 1 + np.float32(0.2) * x
    elif name.endswith("bias"):
        x = np.float32(0.1) * x
    elif re.search(r"(embed_tokens|embedding)\.weight$|class_embedding$|image_newline$", name) and "patch" not in name:
        x = np.float32(0.6) * x
    else:
        gain = 2.0 if re.search(r"(\.[qk]_proj|lm_head)\.weight$", name) else 1.3
        x = x * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    return round_bf16(np.asarray(x, np.float32).reshape(shape))


def clip_block_shapes(prefix, d, hidden):
    shapes = {}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (d,)
    linears = {f"self_attn.{p}_proj": (d, d) for p in "kvq"} | {"self_attn.out_proj": (d, d)}
    linears |= {"mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
    for name, shape in linears.items():
        shapes[f"{prefix}.{name}.weight"], shapes[f"{prefix}.{name}.bias"] = shape, shape[:1]
    return shapes


def vision_shapes(prefix=""):
    d, patch = VISION["hidden_size"], VISION["patch_size"]
    root = prefix + "vision_model."
    shapes = {
        root + "embeddings.class_embedding": (d,),
        root + "embeddings.patch_embedding.weight": (d, 3, patch, patch),
        root + "embeddings.position_embedding.weight": ((VISION["image_size"] // patch) ** 2 + 1, d),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes[root + norm + ".weight"] = shapes[root + norm + ".bias"] = (d,)
    for i in range(VISION["num_hidden_layers"]):
        shapes |= clip_block_shapes(f"{root}encoder.layers.{i}", d, VISION["intermediate_size"])
    return shapes


def clip_shapes():
    """The whole CLIPModel, text side included, as openai/clip-vit-large-patch14-336 has it."""
    d = CLIP_TEXT["hidden_size"]
    shapes = vision_shapes()
    shapes["vision_model.embeddings.position_ids"] = (1, shapes["vision_model.embeddings.position_embedding.weight"][0])
    shapes["text_model.embeddings.position_ids"] = (1, 77)
    shapes["text_model.embeddings.token_embedding.weight"] = (49408, d)
    shapes["text_model.embeddings.position_embedding.weight"] = (77, d)
    shapes["text_model.final_layer_norm.weight"] = shapes["text_model.final_layer_norm.bias"] = (d,)
    for i in range(CLIP_TEXT["num_hidden_layers"]):
        shapes |= clip_block_shapes(f"text_model.encoder.layers.{i}", d, CLIP_TEXT["intermediate_size"])
    shapes["text_projection.weight"] = (CLIP_PROJECTION, d)
    shapes["visual_projection.weight"] = (CLIP_PROJECTION, VISION["hidden_size"])
    shapes["logit_scale"] = ()
    return shapes


def decoder_shapes(config):
    d, hidden = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, d)
    for i in range(config["num_hidden_layers"]):
        root = f"model.layers.{i}."
        shapes[root + "input_layernorm.weight"] = shapes[root + "post_attention_layernorm.weight"] = (d,)
        for p, out in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            shapes[f"{root}self_attn.{p}_proj.weight"] = (out, d)
            if config.get("attention_bias"):
                shapes[f"{root}self_attn.{p}_proj.bias"] = (out,)
        for p in ("gate", "up"):
            shapes[f"{root}mlp.{p}_proj.weight"] = (hidden, d)
        shapes[root + "mlp.down_proj.weight"] = (d, hidden)
    return shapes


def llava_shapes(variant, config):
    """Key and shape of every tensor of a liuhaotian-layout checkpoint."""
    d, features = config["hidden_size"], config["mm_hidden_size"]
    shapes = decoder_shapes(config)
    if config["mm_projector_type"] == "linear":
        layers = {"model.mm_projector": (d, features)}
    else:
        layers = {"model.mm_projector.0": (d, features), "model.mm_projector.2": (d, d)}
    for name, shape in layers.items():
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]
    if "unpad" in config.get("mm_patch_merge_type", "flat"):
        shapes["model.image_newline"] = (d,)
    if config["unfreeze_mm_vision_tower"]:
        shapes |= vision_shapes("model.vision_tower.vision_tower.")
    if variant == "llava15":
        half = d // config["num_attention_heads"] // 2
        names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config["num_hidden_layers"])]
        shapes |= dict.fromkeys(names, (half,))
    return shapes


def draw(shapes, seed):
    return {name: value(name, shape, seed) for name, shape in shapes.items()}


def fingerprint(*checkpoints):
    """sha256 over every name, shape and value, in order of name."""
    h = hashlib.sha256()
    for tensors in checkpoints:
        for name, x in sorted(tensors.items()):
            h.update(f"{name} {x.shape} {x.dtype}".encode() + np.ascontiguousarray(x).tobytes())
    return h.hexdigest()


# ---- files


def write_json(path, obj):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(obj, file, indent=2)
        file.write("\n")


def stored(x, dtype):
    """(safetensors' name of the dtype, the bytes)."""
    if x.dtype == np.int64:
        return "I64", x.tobytes()
    if dtype == "bfloat16":
        return "BF16", (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return {"float16": "F16", "float32": "F32"}[dtype], x.astype(dtype).tobytes()


def write_safetensors(path, tensors, dtype):
    header, data, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, x in tensors.items():
        kind, raw = stored(x, dtype)
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(data))


def write_bin(path, tensors, dtype):
    import torch

    def convert(x):
        t = torch.from_numpy(np.array(x))
        return t if t.dtype == torch.int64 else t.to(getattr(torch, dtype))

    torch.save({name: convert(x) for name, x in tensors.items()}, path)


def write_shards(out, tensors, dtype, safe):
    """Several shard files and their index, named as transformers names them."""
    shards, size = [{}], 0
    for name, x in sorted(tensors.items()):
        if shards[-1] and size + x.nbytes > 2 * SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    where = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{ending}"
        (write_safetensors if safe else write_bin)(os.path.join(out, name), shard, dtype)
        where |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(2 * x.size for x in tensors.values())}, "weight_map": where}
    write_json(os.path.join(out, f"{stem}.{ending}.index.json"), index)


def write_tokenizer(out, kind, max_length, extra=()):
    """`tokenizer.model` and its two JSON files; `extra` are special tokens after the 32,000 words."""
    shutil.copyfile(os.path.join(TOKENIZERS, kind, "tokenizer.model"), os.path.join(out, "tokenizer.model"))
    pad = extra[-1] if extra else "<unk>"

    def token(content):
        return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special_map = {k: token(v) for k, v in special.items()} | {"pad_token": token(pad) if extra else pad}
    write_json(os.path.join(out, "special_tokens_map.json"), special_map)
    ids = {0: "<unk>", 1: "<s>", 2: "</s>"} | {VOCAB + i: t for i, t in enumerate(extra)}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {**token(t), "special": True} for i, t in ids.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": kind == "mistral",
        "model_max_length": max_length,
        "pad_token": pad,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **special,
    }
    write_json(os.path.join(out, "tokenizer_config.json"), config)
    if extra:
        write_json(os.path.join(out, "added_tokens.json"), {t: VOCAB + i for i, t in enumerate(extra)})


# ---- the tower beside a checkpoint


def write_clip(out, seed, safe):
    os.makedirs(out)
    tensors = draw(clip_shapes(), seed)
    if safe:
        write_safetensors(os.path.join(out, "model.safetensors"), tensors, "float32")
    else:
        write_bin(os.path.join(out, "pytorch_model.bin"), tensors, "float32")
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": CLIP_PROJECTION}
    text = {**CLIP_TEXT, "model_type": "clip_text_model", "projection_dim": CLIP_PROJECTION}
    config = {
        "architectures": ["CLIPModel"],
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": CLIP_PROJECTION,
        "text_config": text,
        "text_config_dict": text,
        "torch_dtype": "float32",
        "vision_config": vision,
        "vision_config_dict": vision,
    }
    write_json(os.path.join(out, "config.json"), config)
    write_json(os.path.join(out, "preprocessor_config.json"), PREPROCESSOR)
    return tensors


# ---- config.json


def llava_config(variant, clip_dir):
    config = {
        "_name_or_path": "./checkpoints/vicuna-7b-v1-5",
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "anyres",
        "image_crop_resolution": 224,
        "image_grid_pinpoints": PINPOINTS,
        "image_split_resolution": 224,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "mm_hidden_size": VISION["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": clip_dir,
        "mm_vision_tower_lr": 2e-06,
        "model_type": "llava",
        "num_key_value_heads": TEXT["num_attention_heads"],
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCAB,
        **TEXT,
    }
    drop = ()
    if variant == "mistral":
        config.update(_name_or_path="mistralai/Mistral-7B-Instruct-v0.2", architectures=["LlavaMistralForCausalLM"])
        config.update(model_type="llava_mistral", num_key_value_heads=2, rope_theta=1000000.0, sliding_window=None)
        config.update(max_position_embeddings=32768)
        drop = ("attention_bias", "pad_token_id", "pretraining_tp", "rope_scaling")
    if variant in ("llava15", "s2"):
        config.update(image_aspect_ratio="pad", max_length=4096, torch_dtype="float16", unfreeze_mm_vision_tower=False)
        drop = ("attention_bias", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution")
        drop += ("mm_patch_merge_type", "rope_theta", "tokenizer_model_max_length", "tokenizer_padding_side")
    if variant == "s2":
        config.update(s2=True, s2_scales="336,672,1008", mm_hidden_size=3 * VISION["hidden_size"])
    if variant == "clspatch":
        config.update(mm_vision_select_feature="cls_patch", mm_patch_merge_type="flat", mm_projector_type="linear")
        config.update(attention_bias=True, rope_scaling={"type": "linear", "factor": 2.0})
    if variant == "spatial":
        config.update(mm_patch_merge_type="spatial", mm_projector_type="linear", image_grid_pinpoints=STRING_PINPOINTS)
        config.update(tie_word_embeddings=True, mm_vision_select_layer=-1)
    return dict(sorted((k, v) for k, v in config.items() if k not in drop))


def write_generation_config(out, mistral):
    config = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.2"}
    if not mistral:
        config.update(do_sample=True, max_length=4096, pad_token_id=0, temperature=0.9, top_p=0.6)
    write_json(os.path.join(out, "generation_config.json"), config)


# ---- the llava-hf layout

HF_RENAMES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("", "language_model."),
)


def hf_tensors(tensors, seed):
    out = {}
    for name, x in tensors.items():
        old, new = next(r for r in HF_RENAMES if name.startswith(r[0]))
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # <image>, <pad> and 62 unused words
            extra = round_bf16(value(name + ".extra", (64, x.shape[1]), seed) * np.float32(0.1))
            x = np.concatenate([x, extra])
        out[new + name[len(old) :]] = x
    return out


def write_hf_json(out):
    shared = {"image_grid_pinpoints": PINPOINTS, "image_mean": MEAN, "image_std": STD}
    text = {**TEXT, "num_key_value_heads": TEXT["num_attention_heads"], "max_position_embeddings": 4096}
    text.update(architectures=["LlamaForCausalLM"], model_type="llama", pad_token_id=0, rms_norm_eps=1e-05)
    text.update(torch_dtype="float16", vocab_size=VOCAB + 64)
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": VOCAB,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": CLIP_PROJECTION},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": VOCAB + 64,
    }
    write_json(os.path.join(out, "config.json"), config)
    processor = {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 336},
        **shared,
    }
    write_json(os.path.join(out, "preprocessor_config.json"), processor)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(os.path.join(out, "generation_config.json"), generation)


# ---- the whole directory


def write(variant, out, seed=SEED):
    """Write checkpoint `variant` at `out` (and its tower at `out`-clip); returns the weights' fingerprint."""
    out = os.path.abspath(out)
    for folder in (out, out + "-clip"):
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(out)
    config = llava_config(variant, out + "-clip")
    tensors = draw(llava_shapes(variant, config), seed)
    if variant == "hf-next":
        tensors = hf_tensors(tensors, seed)
        write_shards(out, tensors, "float16", safe=True)
        write_hf_json(out)
        write_tokenizer(out, "llama", 4096, extra=("<image>", "<pad>"))
        return fingerprint(tensors)
    clip = write_clip(out + "-clip", seed + 1, safe=config["unfreeze_mm_vision_tower"])
    write_shards(out, tensors, config["torch_dtype"], safe=variant not in ("bin", "llava15"))
    write_json(os.path.join(out, "config.json"), config)
    write_generation_config(out, variant == "mistral")
    write_tokenizer(out, "mistral" if variant == "mistral" else "llama", 2048 if variant == "llava15" else 4096)
    return fingerprint(tensors, clip)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("output", help="folder to write; the tower goes to OUTPUT-clip")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    print(args.variant, write(args.variant, args.output, args.seed))


if __name__ == "__main__":
    main()
