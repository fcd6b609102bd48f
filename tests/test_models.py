"""Tower, projector, decoder and the whole model against transformers' own PyTorch classes, random weights, float32.

1e-4 is the bar for logits of a few units: the reference's own two attention kernels differ by up to 3e-5.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llava_next import modeling_llava_next as hf_next

from llava_jax.config import PINPOINTS_336, GenerationDefaults, LlavaConfig, TextConfig, VisionConfig
from llava_jax.conversion.reference import next_processor
from llava_jax.inference.llava import Llava
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.models.llava_llama import init_params, param_shapes
from llava_jax.models.vision import CLIPVisionTower, CLIPVisionTowerS2, build_vision_tower, normalize_tiles

ATOL = 1e-4
IMAGE = -200
VISION = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
)
TEXT = dict(hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)


def randomize(module, seed=0):
    """Weights large enough that every part of the network shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.eval().named_parameters():
        x = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            x = 1 + 0.3 * x if name.endswith("weight") else 0.3 * x
        elif "embed" not in name or "patch" in name:
            x = x * 1.5 / math.sqrt(parameter[0].numel())
        parameter.data = x
    return module


def params_of(module):
    """A module's state as our nested parameters: linear weights are transposed, norms' weights are called scale."""
    flat = {}
    for name, tensor in module.state_dict().items():
        name = re.sub(r"(^|\.)(model|encoder)\.", r"\1", name).replace("multi_modal_projector", "mm_projector")
        *path, leaf = re.sub(r"layers\.(\d+)", r"layers_\1", name).split(".")
        if leaf == "weight" and path[-1] == "position_embedding":
            leaf = path.pop()
        elif leaf == "weight":
            leaf = "embedding" if path[-1] == "embed_tokens" else "scale" if tensor.ndim == 1 else "kernel"
        array = tensor.numpy()
        if leaf == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        flat[(*path, leaf)] = array.copy()
    return unflatten_dict(flat)


def small_config(vision=VISION, text=TEXT, **mm):
    vision = VisionConfig(**vision)
    scales = len(mm["s2_scales"]) if mm.get("s2") else 1
    text = TextConfig(**{"num_key_value_heads": 4, "head_dim": 8, **text})
    return LlavaConfig(vision=vision, text=text, mm_hidden_size=vision.hidden_size * scales, **mm)


def pixels_like(vision, count=2, seed=1):
    side = vision["image_size"]
    return np.random.default_rng(seed).standard_normal((count, side, side, 3)).astype(np.float32)


def channels_first(pixels):
    return torch.from_numpy(np.asarray(pixels).transpose(0, 3, 1, 2).copy())


def clip_model(vision, seed=0):
    return randomize(CLIPVisionModel(CLIPVisionConfig(**vision)), seed)


# ---- the tower


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3])
def test_tower_hidden_states(layer, feature):
    theirs, pixels = clip_model(VISION), pixels_like(VISION)
    tower = CLIPVisionTower(small_config(mm_vision_select_layer=layer, mm_vision_select_feature=feature))
    with torch.no_grad():
        expected = theirs(channels_first(pixels), output_hidden_states=True).hidden_states[layer].numpy()
    ours = tower.apply({"params": params_of(theirs)}, pixels, method="feature_select")
    np.testing.assert_allclose(ours, expected if feature == "cls_patch" else expected[:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [dict(hidden_act="gelu"), dict(layer_norm_eps=1e-2), dict(patch_size=14), dict(image_size=30)]
    + [dict(image_size=42, patch_size=6, num_attention_heads=8), dict(hidden_size=20, intermediate_size=9)],
    ids=str,
)
def test_tower_settings(changes):
    """image_size=30 is not a multiple of the patch: the last two pixels are left out, as by a convolution."""
    vision = {**VISION, "num_hidden_layers": 2, **changes}
    theirs, pixels = clip_model(vision), pixels_like(vision)
    with torch.no_grad():
        expected = theirs(channels_first(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
    tower = CLIPVisionTower(small_config(vision))
    ours = tower.apply({"params": params_of(theirs)}, pixels, method="feature_select")
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours.shape == (2, tower.num_patches, tower.hidden_size)


def test_layers_after_the_selected_one_are_never_run():
    theirs, pixels = clip_model(VISION), pixels_like(VISION)
    params, tower = params_of(theirs), CLIPVisionTower(small_config())

    def run(tower, params):
        return tower.apply({"params": params}, pixels, method="feature_select")

    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), {k: params[k] for k in ("layers_2", "post_layernorm")})
    np.testing.assert_array_equal(run(tower, {**params, **broken}), run(tower, params))
    shallow = CLIPVisionTower(small_config({**VISION, "num_hidden_layers": 2}, mm_vision_select_layer=-1))
    whole = CLIPVisionTower(small_config(mm_vision_select_layer=-1))
    flops = [jax.jit(lambda p, t=t: run(t, p)).lower(params).cost_analysis()["flops"] for t in (tower, shallow, whole)]
    assert flops[0] == flops[1] < flops[2]


def test_tower_facts_need_no_weights():
    tower = build_vision_tower(LlavaConfig.preset("1.6-vicuna-7b"))
    assert type(tower) is CLIPVisionTower
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (1024, 576, 24)
    assert tower.dummy_feature.shape == (1, 1024) and not np.any(tower.dummy_feature)
    s2 = build_vision_tower(LlavaConfig.preset("1.5-7b").replace(s2=True, mm_hidden_size=3072))
    assert type(s2) is CLIPVisionTowerS2
    assert (s2.hidden_size, s2.num_patches, s2.num_patches_per_side) == (3072, 576, 24)
    assert s2.dummy_feature.shape == (1, 3072)


# ---- S2


def s2_forward(model, pixels, scales, base, side):
    """s2wrapper's multi-scale forward around a CLIP model: features [B, N, C · scales]."""
    outputs = []
    for scale in scales:
        n = scale // base
        resized = F.interpolate(pixels, size=(scale, scale), mode="bicubic", align_corners=False)
        rows = []
        for y in range(n):
            tiles = [resized[:, :, y * base : (y + 1) * base, x * base : (x + 1) * base] for x in range(n)]
            maps = [model(tile, output_hidden_states=True).hidden_states[-2][:, 1:] for tile in tiles]
            rows.append(torch.cat([m.mT.reshape(len(m), -1, side, side) for m in maps], dim=3))
        whole = torch.cat(rows, dim=2)
        outputs.append(F.interpolate(whole, size=(side, side), mode="area").flatten(2).mT)
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("scales", [(28, 56, 84), (28, 84), (28,)], ids=str)
def test_s2_tower(scales):
    config = small_config({**VISION, "num_hidden_layers": 2}, s2=True, s2_scales=scales)
    theirs = clip_model({**VISION, "num_hidden_layers": 2})
    tiles = np.random.default_rng(5).integers(0, 256, (2, scales[-1], scales[-1], 3), dtype=np.uint8)
    with torch.no_grad():
        expected = s2_forward(theirs, channels_first(normalize_tiles(tiles, config.vision)), scales, 28, 4)
    ours = jax.jit(build_vision_tower(config).apply)({"params": params_of(theirs)}, tiles)
    assert ours.shape == (2, 16, 32 * len(scales))
    np.testing.assert_allclose(ours, expected, atol=2e-5)


# ---- the decoder

LLAMA_CASES = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2, rms_norm_eps=1e-3),
    "mqa, own head_dim": dict(num_key_value_heads=1, head_dim=12),
    "biases": dict(attention_bias=True, num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic": dict(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=16
    ),
    "llama3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        max_position_embeddings=512,
    ),
    "mistral": dict(num_key_value_heads=2, sliding_window=None),
}
LENGTHS = 40, 33


def decoder(case, eos=None):
    """(transformers' model, ours, our params) of one case; our config is read from transformers' own."""
    config_class, model_class = (
        (MistralConfig, MistralForCausalLM) if case == "mistral" else (LlamaConfig, LlamaForCausalLM)
    )
    hf_config = config_class(**{**TEXT, **LLAMA_CASES[case]}, attn_implementation="eager")
    theirs = randomize(model_class(hf_config))
    theirs.generation_config.eos_token_id = eos
    layout = {"model_type": "llava", "architectures": [f"Llava{case.title()}ForCausalLM"], "mm_hidden_size": 32}
    config = LlavaConfig.from_hf({**hf_config.to_dict(), **layout}, VISION, generation_config={"eos_token_id": eos})
    params = params_of(theirs)
    if case == "tied":
        del params["lm_head"]
    return theirs, Llava(config, None), {"language_model": params}


def prompts():
    rng = np.random.default_rng(8)
    return [rng.integers(3, TEXT["vocab_size"], n) for n in LENGTHS]


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_decoder_forward(case):
    """Logits, hidden states and attentions of a whole sequence; for `dynamic` one longer than the trained length."""
    theirs, llava, params = decoder(case)
    ids = prompts()[0][None]
    wanted = dict(output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), **wanted)
    ours = llava.forward(params, ids, **wanted)
    assert np.std(expected.logits.numpy()) > 1
    np.testing.assert_allclose(ours.logits, expected.logits, atol=ATOL)
    assert len(ours.hidden_states) == len(expected.hidden_states) == 3
    assert len(ours.attentions) == len(expected.attentions) == 2
    for mine, other in zip(
        ours.hidden_states + ours.attentions, expected.hidden_states + expected.attentions, strict=True
    ):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=ATOL)


def test_decoder_forward_with_padding_and_loss():
    """The path without attentions; padding on either side, and positions counted over it as the reference does."""
    theirs, llava, params = decoder("gqa")
    first, second = prompts()
    for left in (False, True):
        pad = LENGTHS[0] - LENGTHS[1], 0
        ids = np.stack([first, np.pad(second, pad if left else pad[::-1])])
        mask = np.stack([np.ones(LENGTHS[0], int), np.pad(np.ones(LENGTHS[1], int), pad if left else pad[::-1])])
        labels = np.where(mask == 1, ids, -100)
        labels[:, :12] = -100
        tensors = [torch.from_numpy(x) for x in (ids, mask, labels)]
        positions = torch.arange(LENGTHS[0])[None].expand(2, -1)
        with torch.no_grad():
            expected = theirs(tensors[0], attention_mask=tensors[1], labels=tensors[2], position_ids=positions)
        ours = llava.forward(params, ids, attention_mask=mask, labels=labels)
        np.testing.assert_allclose(ours.logits[mask == 1], expected.logits.numpy()[mask == 1], atol=ATOL)
        np.testing.assert_allclose(ours.loss, expected.loss.item(), atol=1e-5)
        assert ours.hidden_states is None and ours.attentions is None
    assert llava.forward(params, ids).loss is None


def greedy(theirs, ids, count):
    out = theirs.generate(torch.from_numpy(ids)[None], max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("case", ["mqa, own head_dim", "dynamic", "tied", "mistral"])
def test_greedy_tokens(case):
    """A batch of two lengths against one row at a time; `dynamic` grows its base with every token."""
    _, llava, params = decoder(case)
    # a fresh model for each row: theirs remembers the longest sequence it has seen, and keeps that one's base
    expected = [greedy(decoder(case)[0], row, 20) for row in prompts()]
    assert len(set(expected[0])) > 5
    assert llava.generate_tokens(params, prompts(), max_new_tokens=20).tolist() == expected


def test_greedy_tokens_up_to_eos():
    plain = [greedy(decoder("gqa")[0], row, 12) for row in prompts()]
    eos = next(token for i, token in enumerate(plain[0]) if i >= 3 and token not in plain[0][:i] + plain[1])
    theirs, llava, params = decoder("gqa", eos=eos)
    expected = [greedy(theirs, row, 12) for row in prompts()]
    assert 4 <= len(expected[0]) < len(expected[1]) == 12
    llava = Llava(llava.config.replace(generation=GenerationDefaults((eos,), pad_token_id=91)), None)
    ours = llava.generate_tokens(params, prompts(), max_new_tokens=12)
    assert ours.dtype == np.int32
    assert ours.tolist() == [expected[0] + [91] * (12 - len(expected[0])), expected[1]]
    assert llava.generate_tokens(params, prompts()[:1], max_new_tokens=12).tolist() == expected[:1]


# ---- LLaVA-NeXT as a whole

HF_DIFFERS = {  # (width, height): tokens in transformers, in the original
    (300, 200): (1464, 976),  # ties: pinpoints are (height, width) there
    (235, 1128): (1800, 1656),  # 7-digit rounding before truncation
}
AGREE = (400, 500)


@pytest.fixture(scope="module")
def llava_next():
    """(transformers' model, our model in its reading, our params), with the published geometry."""
    vision = {**VISION, "num_hidden_layers": 2, "image_size": 336, "patch_size": 14}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**{**TEXT, "max_position_embeddings": 4096}),
        image_token_index=96,
    )
    theirs = randomize(LlavaNextForConditionalGeneration(config))
    theirs.generation_config.eos_token_id = None
    params = params_of(theirs)
    params["language_model"]["lm_head"] = params.pop("lm_head")
    ours = LlavaConfig.from_hf(config.to_dict(), generation_config={"eos_token_id": None}).replace(reading="llava-hf")
    return theirs, Llava(ours, None), params


def picture(size):
    coarse = np.random.default_rng(size[0]).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def hf_inputs(theirs, image):
    processor = next_processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    pixels = processor(image, return_tensors="pt")
    with torch.no_grad():
        features = theirs.model.get_image_features(**pixels, return_dict=True).pooler_output
    merged = torch.cat(tuple(features)).numpy()
    ids = torch.tensor([[1, 5, 9, *[96] * len(merged), 11, 12, 13]])
    return {**pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, merged


def test_next_parameters_are_all_there(llava_next):
    _, llava, params = llava_next
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, param_shapes(llava.config))


@pytest.mark.parametrize("size", [*HF_DIFFERS, AGREE], ids=str)
def test_next_in_the_llava_hf_reading(llava_next, size):
    theirs, llava, params = llava_next
    image = picture(size)
    inputs, merged = hf_inputs(theirs, image)
    ids = [[1, 5, 9, IMAGE, 11, 12, 13]]
    *_, embeds, _ = llava.prepare_inputs_labels_for_multimodal(params, ids, None, None, None, None, [image])
    assert embeds.shape[1] == len(merged) + 6
    np.testing.assert_allclose(embeds[0, 3:-3], merged, atol=ATOL)
    with torch.no_grad():
        expected = theirs(**inputs).logits
    np.testing.assert_allclose(llava.forward(params, ids, [image]).logits, expected, atol=ATOL)
    if size == AGREE:
        tokens = theirs.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        original = Llava(llava.config.replace(reading="original"), None)
        assert original.generate_tokens(params, ids, [image], max_new_tokens=10).tolist() == [tokens.tolist()]


@pytest.mark.parametrize("size", HF_DIFFERS, ids=str)
def test_next_where_transformers_differs_from_the_original(llava_next, size):
    """The default is the original's reading."""
    theirs, _, params = llava_next
    original = Llava(LlavaConfig.from_hf(theirs.config.to_dict()), None)
    assert original.config.reading == "original"
    logits = original.forward(params, [[1, IMAGE, 2]], [picture(size)]).logits
    _, merged = hf_inputs(theirs, picture(size))
    assert (len(merged), logits.shape[1] - 2) == HF_DIFFERS[size]


def test_token_counts_in_the_llava_hf_reading():
    pairs = [list(pair) for pair in PINPOINTS_336]
    config = LlavaConfig.preset("1.6-vicuna-7b")
    sizes = np.random.default_rng(0).integers(1, 1400, (3000, 2))
    sizes = np.concatenate([sizes, [*HF_DIFFERS, (376, 799), (88, 99), (20, 13), (4000, 20)]])
    counts = []
    for width, height in sizes.tolist():
        down, across = hf_next.get_anyres_image_grid_shape((height, width), pairs, 336)
        kept = hf_next.unpad_image(torch.empty(1, 24 * down, 24 * across), (height, width)).shape
        counts.append(576 + kept[1] * (kept[2] + 1))
    np.testing.assert_array_equal(num_image_tokens(*sizes.T, config.replace(reading="llava-hf")), counts)
    assert 0.01 < np.mean(num_image_tokens(*sizes.T, config) != counts) < 0.2


def test_init_params_fills_the_published_tree():
    """float32, finite, and with the layers that the forward pass leaves out."""
    one = {"num_hidden_layers": 1}
    config = small_config({**VISION, **one}, {**TEXT, **one}, mm_vision_select_layer=0)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config)).items()}
    assert {path: leaf.shape for path, leaf in flatten_dict(params).items()} == shapes
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert ("vision_tower", "layers_0", "mlp", "fc2", "kernel") in shapes
