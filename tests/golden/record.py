"""Run the original PyTorch LLaVA (llava-torch 1.2.2.post1) on this folder's checkpoints and pictures, and record it.

Runs in the environment that setup.sh makes:

    ENV/bin/python record.py --scratch FOLDER [--output data] [--part tables,tiles,counts,vicuna,...]

What is recorded is sampled, never whole: README.md lists the keys.
"""

import argparse
import ast
import hashlib
import json
import os
import tempfile
import warnings
from types import SimpleNamespace

os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"  # before torch: the same rounding with and without AVX-512

import checkpoints
import images as pictures
import llava.model.llava_arch as llava_arch
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from llava.conversation import conv_templates
from llava.mm_utils import (
    expand2square,
    get_anyres_image_grid_shape,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from PIL import Image

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))
QUESTION = "What is shown in this image?"
NEW_TOKENS = 16
IMAGE, IGNORE = -200, -100
MODEL_IMAGES = {
    "vicuna": "chelsea coffee wide_1200x400 tall_150x900 sliver_2000x50 sliver_4000x20 tiny_20x13 float_235x1128 "
    "palette_400x300 photo_640x427",
    "mistral": "astronaut tall_300x900 odd_333x500 sliver_50x2000",
    "llava15": "chelsea wide_1200x400 tiny_20x13 gray_500x375",
    "s2": "coffee tall_300x900",
    "clspatch": "chelsea wide_1200x400",
    "spatial": "coffee sliver_2000x50",
}


# ---- S2, which came after the recorded release


def s2_features(encode, pixels, sizes, split):
    """Features of square images at several sizes: our own implementation of what s2wrapper publishes."""
    maps = []
    for size in sizes:
        n = size // split
        x = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
        b, c = x.shape[:2]
        tiles = x.view(b, c, n, split, n, split).permute(2, 4, 0, 1, 3, 5).reshape(n * n * b, c, split, split)
        f = encode(tiles)
        side = int(f.shape[1] ** 0.5)
        f = f.view(n, n, b, side, side, -1).permute(2, 5, 0, 3, 1, 4).reshape(b, -1, n * side, n * side)
        maps.append(F.interpolate(f, size=side, mode="area"))
    return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


class S2Tower(CLIPVisionTower):
    """The later repository's CLIPVisionTowerS2 on top of the release's CLIPVisionTower."""

    def __init__(self, name, args, delay_load=False):
        self.scales = sorted(int(s) for s in args.s2_scales.split(","))
        super().__init__(name, args, delay_load)

    def load_model(self, device_map=None):
        super().load_model(device_map=device_map)
        largest = self.scales[-1]
        self.image_processor.size["shortest_edge"] = largest
        self.image_processor.crop_size["height"] = self.image_processor.crop_size["width"] = largest

    @torch.no_grad()
    def forward(self, pixels):
        return s2_features(super().forward, pixels, self.scales, self.scales[0])

    @property
    def hidden_size(self):
        return self.config.hidden_size * len(self.scales)


released_builder = llava_arch.build_vision_tower
llava_arch.build_vision_tower = lambda config, **kw: (
    S2Tower(config.mm_vision_tower, args=config, **kw)
    if getattr(config, "s2", False)
    else released_builder(config, **kw)
)


# ---- small tools


def numpy(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def sha256(x):
    return np.array(hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest())


def attempt(function, *args):
    """The result, or the exception as text: what the original refuses is a reference too."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def rows_digest(x):
    """One number for every row [..., E] → [...]: its product with a fixed vector."""
    x = numpy(x).astype(np.float64)
    return (x @ np.cos(np.arange(1, x.shape[-1] + 1))).astype(np.float32)


def put_features(D, key, x):
    """Every row's digest, and about a thousand single values."""
    x = numpy(x)
    D[key + "/shape"] = np.array(x.shape, np.int32)
    D[key + "/rows"] = rows_digest(x)
    D[key + "/values"] = x.ravel()[:: sample_stride(x.size)].astype(np.float32)


def sample_stride(size):
    return max(1, size // 1000) | 1


def put_logits(D, key, logits):
    """logits [L, V]: the last row and a grid of values, and for every position its logsumexp, argmax and top-2 gap."""
    D[key + "/logits_last"] = numpy(logits[-1, ::11])
    D[key + "/logits_grid"] = numpy(logits[::101, ::131])
    D[key + "/logits_lse"] = numpy(torch.logsumexp(logits, -1))
    D[key + "/logits_argmax"] = numpy(logits.argmax(-1)).astype(np.uint16)
    D[key + "/logits_gap"] = gap(logits)


def gap(logits):
    top = torch.topk(logits, 2, dim=-1).values
    return numpy(top[..., 0] - top[..., 1]).astype(np.float16)


def put_generated(D, key, model, **inputs):
    """The new tokens (the original puts BOS in front of them) and each step's top-2 gap."""
    with torch.inference_mode():
        out = model.generate(do_sample=False, temperature=None, top_p=None, num_beams=1, max_new_tokens=NEW_TOKENS,
                             max_length=None, return_dict_in_generate=True, output_scores=True, **inputs)  # fmt: skip
    D[key + "/generated"] = numpy(out.sequences)[:, -len(out.scores) :].astype(np.int32)
    D[key + "/generated_gap"] = gap(torch.stack(out.scores, 1))


def prompt(template, text):
    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


# ---- one model


def load(path):
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        raw = json.load(file)
    mistral = raw["architectures"] == ["LlavaMistralForCausalLM"]
    config_class = LlavaMistralConfig if mistral else LlavaConfig
    model_class = LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM
    config = config_class.from_pretrained(path)
    config._attn_implementation = "sdpa"  # what the official loader ends up with
    model, info = model_class.from_pretrained(path, config=config, output_loading_info=True)
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    assert set(info["missing_keys"]) <= tied and not info["unexpected_keys"] and not info["mismatched_keys"], info
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, use_fast=mistral)  # as llava.model.builder does
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    model.float().eval()
    template = "mistral_instruct" if mistral else "vicuna_v1"
    return SimpleNamespace(model=model, tokenizer=tokenizer, processor=tower.image_processor, template=template)


def splice(model, pixels, size):
    """The merged features of one image, by way of `prepare_inputs_labels_for_multimodal`."""
    ids = torch.tensor([[1, IMAGE]])
    return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels, [size])[4][0, 1:]


def record_images(D, ref, names, paths):
    model, config = ref.model, ref.model.config
    ids = tokenizer_image_token(prompt(ref.template, "<image>\n" + QUESTION), ref.tokenizer, return_tensors="pt")[None]
    D["image/input_ids"] = numpy(ids).astype(np.int32)
    for name in names:
        key = f"image/{name}"
        image = Image.open(paths[name]).convert("RGB")
        pixels = process_images([image], ref.processor, config)
        with torch.inference_mode():
            selected = model.get_vision_tower()(pixels[0] if pixels.ndim == 5 else pixels)
            put_features(D, key + "/selected", selected)
            put_features(D, key + "/projected", model.get_model().mm_projector(selected))
            put_features(D, key + "/merged", splice(model, pixels, image.size))
            out = model(input_ids=ids, images=pixels, image_sizes=[image.size], use_cache=False)
            put_logits(D, key, out.logits[0])
        put_generated(D, key, model, inputs=ids, images=pixels, image_sizes=[image.size])
        print(f"  {name}: {tuple(pixels.shape)} -> {D[key + '/merged/shape'][0]} tokens", flush=True)


def record_states(D, ref, path):
    """Hidden states and attentions of one short prompt."""
    image = Image.open(path).convert("RGB")
    pixels = process_images([image], ref.processor, ref.model.config)
    ids = torch.tensor(D["image/input_ids"].astype(np.int64))
    with torch.inference_mode():
        out = ref.model(input_ids=ids, images=pixels, image_sizes=[image.size], use_cache=False,
                        output_hidden_states=True, output_attentions=True)  # fmt: skip
    for i, x in enumerate(out.hidden_states):
        put_features(D, f"states/hidden/{i}", x)
    for i, x in enumerate(out.attentions):
        put_features(D, f"states/attention/{i}", x)


def record_merges(D, ref, path):
    """One picture, the same weights, under the other settings of aspect ratio and merge type."""
    model, config = ref.model, ref.model.config
    image = Image.open(path).convert("RGB")
    keep = config.image_aspect_ratio, config.mm_patch_merge_type
    for aspect in ("anyres", "pad", "square"):
        for merge in ("flat", "spatial", "spatial_unpad"):
            config.image_aspect_ratio, config.mm_patch_merge_type = aspect, merge
            pixels = process_images([image], ref.processor, config)
            with torch.inference_mode():
                put_features(D, f"merge/{aspect}/{merge}", splice(model, pixels, image.size))
                if pixels.ndim == 4:  # unstacked, one tile does get a newline
                    put_features(D, f"merge/{aspect}_list/{merge}", splice(model, list(pixels), image.size))
    config.image_aspect_ratio, config.mm_patch_merge_type = keep


# ---- batches

BATCH_IMAGES = ("wide_1200x200", "sliver_2000x50", "sliver_4000x20")
TURNS = (
    ("Hello! Who are you?", " I am a tiny model."),
    ("<image>\nWhat is shown in this image?", " A cat."),
    ("<image>\n<image>\nCompare these two pictures.", " They differ a lot, in colour and in shape."),
)
#                    the config's side, the input's side, maximum length, mask, labels, position ids
BATCH_CASES = {
    "right": ("right", "right", 4096, True, True, False),
    "left": ("left", "right", 4096, True, True, False),
    "left_left": ("left", "left", 4096, True, True, False),
    "right_left": ("right", "left", 4096, True, True, False),
    "trunc1000": ("right", "right", 1000, True, True, False),
    "trunc1000_left": ("left", "right", 1000, True, True, False),
    "trunc30": ("right", "right", 30, True, True, False),
    "nomaxlen": ("right", "right", None, True, True, False),
    "nomask": ("right", "right", 4096, False, False, False),
    "nomask_left": ("left", "right", 4096, False, False, False),
    "posids": ("left", "right", 4096, True, True, True),
}
CASES_OF = {
    "vicuna": tuple(BATCH_CASES),
    "mistral": ("right", "left_left", "trunc1000"),
    "llava15": ("right", "left_left"),
}
CASES_OF |= {"s2": ("right",), "clspatch": ("trunc1000",), "spatial": ("trunc1000_left",)}


def pad_rows(rows, fill, side):
    longest = max(map(len, rows))
    return torch.tensor([r + [fill] * (longest - len(r)) if side == "right" else [fill] * (longest - len(r)) + r
                         for r in rows])  # fmt: skip


def batch_inputs(ref, paths):
    """Rows of ids and labels, and the flat image list: a zero dummy for the text-only row, then the pictures."""
    rows, labels = [], []
    for question, answer in TURNS:
        asked = tokenizer_image_token(prompt(ref.template, question), ref.tokenizer)
        answered = ref.tokenizer(answer).input_ids[1:] + [ref.tokenizer.eos_token_id]
        rows.append(asked + answered)
        labels.append([IGNORE] * len(asked) + answered)
    opened = [Image.open(paths[name]).convert("RGB") for name in BATCH_IMAGES]
    pixels = [process_images([image], ref.processor, ref.model.config)[0] for image in opened]
    side = ref.processor.crop_size["height"]
    return rows, labels, [torch.zeros(3, side, side), *pixels], [(side, side), *(image.size for image in opened)]


def record_batch_case(D, ref, case, inputs):
    model, config, key = ref.model, ref.model.config, f"batch/{case}"
    rows, row_labels, images, sizes = inputs
    side, input_side, longest, use_mask, use_labels, use_positions = BATCH_CASES[case]
    config.tokenizer_padding_side, config.tokenizer_model_max_length = side, longest
    settings = dict(tokenizer_padding_side=side, tokenizer_model_max_length=longest)
    D[key + "/config"] = np.array(json.dumps(settings))
    ids = pad_rows(rows, ref.tokenizer.pad_token_id, input_side)
    mask = pad_rows([[1] * len(r) for r in rows], 0, input_side).bool() if use_mask else None
    labels = pad_rows(row_labels, IGNORE, input_side) if use_labels else None
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if use_positions else None
    named = dict(input_ids=ids, attention_mask=mask, labels=labels, position_ids=positions)
    D.update({f"{key}/in_{k}": numpy(v) for k, v in named.items() if v is not None})
    with torch.inference_mode():
        _, out_positions, out_mask, _, embeds, out_labels = model.prepare_inputs_labels_for_multimodal(
            ids, positions, mask, None, labels, images, sizes)  # fmt: skip
        out = model(**named, images=images, image_sizes=sizes, use_cache=False)
    named = dict(position_ids=out_positions, attention_mask=out_mask, labels=out_labels)
    D.update({f"{key}/out_{k}": numpy(v) for k, v in named.items() if v is not None})
    put_features(D, key + "/embeds", embeds)
    real = (embeds != 0).any(-1)
    where = real.nonzero()[::53]
    ends = torch.stack([row.nonzero().max() for row in real])
    D[key + "/where"], D[key + "/ends"] = numpy(where).astype(np.int32), numpy(ends).astype(np.int32)
    D[key + "/logits_grid"] = numpy(out.logits[where[:, 0], where[:, 1]][:, ::311])
    D[key + "/logits_last"] = numpy(out.logits[torch.arange(len(ends)), ends][:, ::31])
    if out.loss is not None:
        D[key + "/loss"] = numpy(out.loss)
    print(f"  {case}: {tuple(embeds.shape)} loss {D.get(key + '/loss')}", flush=True)


def record_batches(D, ref, paths, cases):
    model, config, tokenizer = ref.model, ref.model.config, ref.tokenizer
    keep = {k: getattr(config, k, None) for k in ("tokenizer_padding_side", "tokenizer_model_max_length")}
    inputs = batch_inputs(ref, paths)
    for case in cases:
        record_batch_case(D, ref, case, inputs)
    config.tokenizer_padding_side, config.tokenizer_model_max_length = "left", 4096  # generate needs left padding
    images, sizes = inputs[2:]
    rows = [tokenizer_image_token(prompt(ref.template, question), tokenizer) for question, _ in TURNS]
    ids, mask = pad_rows(rows, tokenizer.pad_token_id, "right"), pad_rows([[1] * len(r) for r in rows], 0, "right")
    D["generate/input_ids"], D["generate/attention_mask"] = numpy(ids), numpy(mask)
    put_generated(D, "generate/batch", model, inputs=ids, attention_mask=mask, images=images, image_sizes=sizes)
    text = torch.tensor(rows[:1])
    put_generated(D, "generate/text", model, inputs=text)
    with torch.inference_mode():
        D["generate/text/logits_last"] = numpy(model(input_ids=text, use_cache=False).logits[0, -1, ::11])
    put_generated(D, "generate/two", model, inputs=torch.tensor(rows[2:]), images=images[2:], image_sizes=sizes[2:])
    for k, v in keep.items():
        setattr(config, k, v)


def record_edges(D, ref, paths):
    """Misuse and corners: the embeddings' digest, "None", or the exception."""
    model = ref.model
    pixels, sizes = batch_inputs(ref, paths)[2:]
    pixels, sizes = pixels[1:], sizes[1:]

    def embeds(rows, images, image_sizes):
        inputs = torch.tensor(rows), None, None, None, None, images, image_sizes
        return model.prepare_inputs_labels_for_multimodal(*inputs)[4]

    text, one, two = [1, 100, 101, 102], [1, 100, IMAGE, 200], [1, IMAGE, 5, IMAGE]
    edges = {
        "text_row_without_dummy": lambda: embeds([text, one], pixels[:1], sizes[:1]),
        "more_images_than_placeholders": lambda: embeds([one], pixels[:2], sizes[:2]),
        "fewer_images_than_placeholders": lambda: embeds([two], pixels[:1], sizes[:1]),
        "single_token_row": lambda: embeds([[IMAGE]], pixels[:1], sizes[:1]),
        "image_first_and_last": lambda: embeds([[IMAGE, 5, IMAGE]], pixels[1:], sizes[1:]),
        "three_images_side_by_side": lambda: embeds([[1, IMAGE, IMAGE, IMAGE, 7]], pixels, sizes),
    }
    for name, function in edges.items():
        with torch.inference_mode():
            result = attempt(function)
        if isinstance(result, torch.Tensor):
            put_features(D, f"edge/{name}", result)
        else:
            D[f"edge/{name}/text"] = np.array(str(result))


def record_model(variant, scratch, paths):
    folder = os.path.join(scratch, "llava-" + variant)
    D = {"weights_sha256": np.array(checkpoints.write(variant, folder))}
    ref = load(folder)
    record_images(D, ref, MODEL_IMAGES[variant].split(), paths)
    if variant == "vicuna":
        record_states(D, ref, paths["sliver_4000x20"])
        record_merges(D, ref, paths["chelsea"])
        record_edges(D, ref, paths)
    record_batches(D, ref, paths, CASES_OF[variant])
    return D


# ---- tiles


def clip_processor(side):
    folder = tempfile.mkdtemp()
    checkpoints.write_json(os.path.join(folder, "preprocessor_config.json"), checkpoints.PREPROCESSOR)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    processor.size["shortest_edge"] = side
    processor.crop_size["height"] = processor.crop_size["width"] = side
    return processor


ASPECTS = {  # the tile's side, and the configuration
    "anyres": (336, SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=checkpoints.PINPOINTS)),
    "pad": (336, SimpleNamespace(image_aspect_ratio="pad")),
    "square": (336, SimpleNamespace()),
    "s2": (1008, SimpleNamespace(image_aspect_ratio="pad")),
}


def pixel_levels():
    """[3, 256], the pixel value of each level of each channel."""
    ramp = np.resize(np.arange(256, dtype=np.uint8), (336, 336))
    levels = clip_processor(336)(Image.fromarray(np.stack([ramp] * 3, -1)), return_tensors="np")["pixel_values"][0]
    return levels[:, 0, :256]


def tiles_of(image, aspect, levels):
    """uint8 tiles, read back from the pixel values; or the exception as text."""
    side, config = ASPECTS[aspect]
    pixels = attempt(process_images, [image], clip_processor(side), config)
    if isinstance(pixels, str):
        return pixels
    pixels = numpy(pixels[0] if aspect == "anyres" else pixels)
    tiles = np.stack([np.searchsorted(levels[c], pixels[:, c]) for c in range(3)], -1).astype(np.uint8)
    assert all(np.array_equal(levels[c][tiles[..., c]], pixels[:, c]) for c in range(3))
    return tiles


def record_modes(scratch, paths):
    """Tiles of pictures that are not converted to RGB first, and of thin ones."""
    levels, D = pixel_levels(), {}
    cases = [(mode, size, ("anyres", "square")) for mode in pictures.MODES for size in pictures.SHAPES]
    cases += [("RGB", size, ("anyres", "square", "pad", "s2")) for size in pictures.THIN]
    for mode, size, aspects in cases:
        image = pictures.in_mode(mode, *size, seed=sum(size))
        for aspect in aspects:
            tiles = tiles_of(image, aspect, levels)
            if not isinstance(tiles, str):
                D[f"{mode}/{size[0]}x{size[1]}/{aspect}"] = sha256(tiles)
            else:
                print(f"  {mode} {size} {aspect}: {tiles}", flush=True)
    return D


def record_tiles(scratch, paths):
    """The tiles of every picture."""
    levels = pixel_levels()
    D = {"levels": levels}
    for name, path in paths.items():
        image = Image.open(path).convert("RGB")
        D[f"{name}/size"] = np.array(image.size, np.int32)
        D[f"{name}/rgb"] = sha256(np.asarray(image))
        for aspect in ASPECTS:
            tiles = tiles_of(image, aspect, levels)
            if isinstance(tiles, str):
                D[f"{name}/{aspect}/error"] = np.array(tiles)
                continue
            D[f"{name}/{aspect}/sha256"] = sha256(tiles)
            D[f"{name}/{aspect}/means"] = tiles.mean((1, 2)).astype(np.float32)
        print(f"  {name}", flush=True)
    return D


# ---- tables of sizes


def window(size, height, width):
    """(top, bottom, left, right) that the original's unpad_image keeps of a [height, width] grid."""
    rows, columns = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    kept = llava_arch.unpad_image(torch.stack([rows, columns]), size)
    if not kept.numel():
        return (0, kept.shape[1], 0, kept.shape[2])
    return tuple(int(v) for v in (kept[0].min(), kept[0].max() + 1, kept[1].min(), kept[1].max() + 1))


GRIDS = {
    "published": (checkpoints.PINPOINTS, 336, 24),
    "string384": ("[(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]", 384, 27),
    "nine": ([[336 * a, 336 * b] for a in (1, 2, 3) for b in (1, 2, 3)], 336, 24),
}


def table_sizes():
    edge = (1, 2, 13, 24, 50, 112, 168, 224, 333, 335, 336, 337, 375, 427, 480, 501, 512, 640, 671, 672, 673, 900)
    edge += (1007, 1008, 1009, 1344, 1920, 2250, 3000, 4000)
    generator = np.random.Generator(np.random.PCG64(11))
    drawn = generator.integers(1, 2200, size=(900, 2)).tolist()
    odd = [(235, 1128), (376, 799), (47, 1128), (55, 176), (88, 99), (4000, 20), (20, 4000), (2000, 50)]
    return [(w, h) for w in edge for h in edge] + [tuple(s) for s in drawn] + odd


def record_tables(scratch, paths):
    sizes = table_sizes()
    D = {"sizes": np.array(sizes, np.int16)}
    for name, (pinpoints, tile, side) in GRIDS.items():
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        grids = [get_anyres_image_grid_shape(size, pinpoints, tile) for size in sizes]
        D[f"{name}/pinpoints"] = np.array(str(pinpoints))
        D[f"{name}/best"] = np.array([select_best_resolution(size, pairs) for size in sizes], np.int16)
        D[f"{name}/grid"] = np.array(grids, np.int16)
        windows = [window(size, h * side, w * side) for size, (w, h) in zip(sizes, grids, strict=True)]
        D[f"{name}/window"] = np.array(windows, np.int16)
    D["boxes/sizes"] = np.array(sizes[::23], np.int16)
    boxes = []
    for size in sizes[::23]:
        white = Image.new("RGB", size, (255, 255, 255))
        canvas = resize_and_pad_image(white, select_best_resolution(size, checkpoints.PINPOINTS))
        boxes.append([*canvas.getbbox(), *expand2square(white, (0, 0, 0)).getbbox()])
    D["boxes/canvas_and_square"] = np.array(boxes, np.int16)
    return D


def record_counts(scratch, paths):
    """The image-token count of every size from 1x1 to 1600x1600 under the published pinpoints."""
    largest = 1600
    cells = {n: torch.zeros(1).expand(1, n[1] * 24, n[0] * 24) for n in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))}
    counts = np.zeros((largest, largest), np.int32)  # [width - 1, height - 1]
    for width in range(1, largest + 1):
        for height in range(1, largest + 1):
            grid = get_anyres_image_grid_shape((width, height), checkpoints.PINPOINTS, 336)
            _, rows, columns = llava_arch.unpad_image(cells[grid], (width, height)).shape
            counts[width - 1, height - 1] = 576 + rows * (columns + 1)
        if width % 200 == 0:
            print(f"  width {width}", flush=True)
    sums = dict(width_sums=counts.sum(1), height_sums=counts.sum(0))
    return {"sha256": sha256(counts), **{k: v.astype(np.int32) for k, v in sums.items()}}


def main():
    parts = {"tables": record_tables, "tiles": record_tiles, "modes": record_modes, "counts": record_counts}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", required=True, help="folder for checkpoints and pictures; not committed")
    parser.add_argument("--output", default=os.path.join(HERE, "data"))
    parser.add_argument("--part", default=",".join((*parts, *checkpoints.RECORDED)))
    args = parser.parse_args()
    paths = pictures.write(os.path.join(args.scratch, "images"))
    os.makedirs(args.output, exist_ok=True)
    for part in args.part.split(","):
        print(f"[{part}]", flush=True)
        D = parts[part](args.scratch, paths) if part in parts else record_model(part, args.scratch, paths)
        versions = dict(torch=torch.__version__, transformers=transformers.__version__, pillow=Image.__version__)
        D["versions"] = np.array(json.dumps({**versions, "numpy": np.__version__}))
        path = os.path.join(args.output, part + ".npz")
        np.savez_compressed(path, **D)
        print(f"  {len(D)} arrays, {os.path.getsize(path) / 1e3:.0f} kB -> {path}", flush=True)


if __name__ == "__main__":
    main()
