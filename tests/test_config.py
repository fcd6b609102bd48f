"""Reading, writing and checking configs: the published layouts, the presets, and every value that is refused."""

import copy
import dataclasses
import json
import math

import jax
import pytest
import transformers as tf

from llava_jax.config import PINPOINTS_336, PRESETS, LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.models.llava_llama import param_shapes

VICUNA = json.loads("""{
"_name_or_path": "./checkpoints/vicuna-7b-v1-5", "architectures": ["LlavaLlamaForCausalLM"],
"attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
"freeze_mm_mlp_adapter": false, "freeze_mm_vision_resampler": false, "hidden_act": "silu", "hidden_size": 4096,
"image_aspect_ratio": "anyres", "image_crop_resolution": 224,
"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
"image_split_resolution": 224, "initializer_range": 0.02, "intermediate_size": 11008,
"max_position_embeddings": 4096, "mm_hidden_size": 1024, "mm_patch_merge_type": "spatial_unpad",
"mm_projector_lr": null, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": null,
"mm_use_im_patch_token": false, "mm_use_im_start_end": false, "mm_vision_select_feature": "patch",
"mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_tower_lr": 2e-06,
"model_type": "llava", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
"pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
"tie_word_embeddings": false, "tokenizer_model_max_length": 4096, "tokenizer_padding_side": "right",
"torch_dtype": "bfloat16", "transformers_version": "4.36.2", "tune_mm_mlp_adapter": false,
"tune_mm_vision_resampler": false, "unfreeze_mm_vision_tower": true, "use_cache": true, "use_mm_proj": true,
"vocab_size": 32000}""")
MISTRAL = {k: v for k, v in VICUNA.items() if k not in ("pad_token_id", "pretraining_tp", "rope_scaling")} | {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["LlavaMistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "llava_mistral",
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
ONLY_16 = ("image_grid_pinpoints", "mm_patch_merge_type", "tokenizer_model_max_length", "tokenizer_padding_side")
V15 = {k: v for k, v in VICUNA.items() if k not in (*ONLY_16, "rope_theta", "attention_bias")} | {
    "image_aspect_ratio": "pad",
    "max_length": 4096,
    "torch_dtype": "float16",
    "unfreeze_mm_vision_tower": False,
}
S2 = {**V15, "mm_hidden_size": 3072, "s2": True, "s2_scales": "1008,336,672"}
HF_OLD = json.loads("""{
"architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100,
"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
"image_token_index": 32000, "model_type": "llava_next", "projector_hidden_act": "gelu",
"text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
  "max_position_embeddings": 4096, "model_type": "llama", "pad_token_id": 0, "rms_norm_eps": 1e-05,
  "torch_dtype": "float16", "vocab_size": 32064},
"torch_dtype": "float16", "transformers_version": "4.39.0.dev0", "use_image_newline_parameter": true,
"vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
  "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
  "projection_dim": 768, "vocab_size": 32000},
"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064}""")


def hf_new(next_=True, text=None):
    """What transformers 5 itself writes (rope_parameters instead of rope_theta and rope_scaling)."""
    kind = tf.LlavaNextConfig if next_ else tf.LlavaConfig
    text = text or tf.LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    vision = tf.CLIPVisionConfig(**HF_OLD["vision_config"])
    return json.loads(json.dumps(kind(vision_config=vision, text_config=text).to_dict()))


LAYOUTS = {
    "vicuna": VICUNA,
    "mistral": MISTRAL,
    "1.5": V15,
    "s2": S2,
    "pinpoints as a string": {**VICUNA, "image_grid_pinpoints": "[(336, 672), (672, 336)]"},
    "unknown keys": {**VICUNA, "my_key": {"nested": [1, {"deep": None}]}, "quantization": [0.5]},
    "linear rope": {**VICUNA, "rope_scaling": {"type": "linear", "factor": 2.0, "note": "kept"}},
    "llava_llama": {**VICUNA, "model_type": "llava_llama", "eos_token_id": [2, 32000], "head_dim": None},
    "hf old": HF_OLD,
    "hf next, new": hf_new(),
    "hf 1.5 mistral, new": hf_new(False, tf.MistralConfig(sliding_window=None)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_gives_back_what_was_read(layout):
    source = LAYOUTS[layout]
    given = copy.deepcopy(source)
    config = LlavaConfig.from_hf(given)
    given["hidden_size"] = None  # the config holds its own copy
    written = config.to_hf()
    assert written == source
    assert json.dumps(written) == json.dumps(source)  # key order and number types too


@pytest.mark.parametrize("layout", ["vicuna", "mistral"])
def test_the_name_changes_nothing_that_is_written(layout):
    for name in ("llava-v1.6-mistral-7b", "llava-v1.6-vicuna-7b"):
        assert LlavaConfig.from_hf(LAYOUTS[layout], name=name).to_hf() == LAYOUTS[layout]


def test_what_was_written_shares_nothing_with_the_config():
    config = LlavaConfig.from_hf(HF_OLD)
    written = config.to_hf()
    written["image_grid_pinpoints"].clear()
    written["text_config"]["vocab_size"] = 1
    assert config.to_hf() == HF_OLD


def test_published_configs_mean_the_presets():
    assert LlavaConfig.from_hf(VICUNA, name="llava-v1.6-vicuna-7b") == LlavaConfig.preset("1.6-vicuna-7b")
    assert LlavaConfig.from_hf(V15, name="llava-v1.5-7b") == LlavaConfig.preset("1.5-7b")
    mistral = LlavaConfig.from_hf(MISTRAL, name="llava-v1.6-mistral-7b")
    assert dataclasses.replace(mistral.text, pad_token_id=0) == LlavaConfig.preset("1.6-mistral-7b").text


def test_s2_keys():
    config = LlavaConfig.from_hf(S2)
    assert config.s2 and config.s2_scales == (336, 672, 1008) and config.tile_size == 1008
    assert config.feature_size == config.mm_hidden_size == 3072 and config.tokens_per_tile == 576
    assert LlavaConfig.from_hf({**S2, "s2_scales": "336,672", "mm_hidden_size": 2048}).s2_scales == (336, 672)


def test_llava_hf_keys():
    old = LlavaConfig.from_hf(HF_OLD)
    assert (old.image_aspect_ratio, old.mm_patch_merge_type, old.mm_projector_type) == (
        "anyres",
        "spatial_unpad",
        "mlp2x_gelu",
    )
    assert old.vision == VisionConfig() and old.image_grid_pinpoints == PINPOINTS_336
    assert old.text == TextConfig(max_position_embeddings=4096, pad_token_id=0, rms_norm_eps=1e-5, vocab_size=32064)
    assert old.reading == "original" and old.has_image_newline and old.max_tiles_per_image == 5
    full = LlavaConfig.from_hf({**HF_OLD, "model_type": "llava", "vision_feature_select_strategy": "full"})
    assert (full.image_aspect_ratio, full.mm_vision_select_feature, full.tokens_per_tile) == ("pad", "cls_patch", 577)
    new = LlavaConfig.from_hf(hf_new()).text
    assert new.rope_theta == 5e5 and new.rope_scaling == RopeScaling("linear", 2.0)
    assert LlavaConfig.from_hf({**hf_new(), "vision_feature_layer": -1}).mm_vision_select_layer == -1


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_text_keys_left_out_mean_transformers_defaults(kind):
    theirs = getattr(tf, f"{kind}Config")().to_dict()
    ours = LlavaConfig.from_hf({"model_type": "llava", "architectures": [f"Llava{kind}ForCausalLM"]}).text
    same = {f.name for f in dataclasses.fields(TextConfig)} - {"rope_theta", "rope_scaling", "head_dim"}
    assert {k: getattr(ours, k) for k in same} == {k: theirs.get(k, False) for k in same}
    assert ours.head_dim == 128 and ours.rope_theta == theirs["rope_parameters"]["rope_theta"] == 1e4


def test_kv_heads_and_head_dim_follow_from_the_heads():
    text = LlavaConfig.from_hf({"model_type": "llava", "hidden_size": 64, "num_attention_heads": 4}).text
    assert (text.num_key_value_heads, text.head_dim) == (4, 16)


def test_vision_keys_left_out_mean_transformers_defaults():
    theirs = tf.CLIPVisionConfig()
    vision = LlavaConfig.from_hf({"model_type": "llava"}, {"model_type": "clip_vision_model"}).vision
    for field in dataclasses.fields(VisionConfig)[:8]:
        assert getattr(vision, field.name) == getattr(theirs, field.name)


def test_mm_keys_left_out_mean_the_originals_defaults():
    config = LlavaConfig.from_hf({"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"})
    assert (config.mm_projector_type, config.mm_patch_merge_type, config.image_aspect_ratio) == (
        "linear",
        "flat",
        "square",
    )
    assert config.mm_use_im_patch_token and not config.mm_use_im_start_end and not config.s2
    assert config.vision.image_size == 224 and config.mm_hidden_size == 1024
    assert config.tokenizer_padding_side == "right" and config.tokenizer_model_max_length is None


def test_tower_from_a_directory_and_its_pixels(tmp_path):
    tower = {"vision_config": {**HF_OLD["vision_config"], "hidden_size": 64, "num_attention_heads": 4}}
    (tmp_path / "config.json").write_text(json.dumps(tower))
    changes = {"mm_vision_tower": str(tmp_path), "mm_hidden_size": 64}
    stats = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    config = LlavaConfig.from_hf({**VICUNA, **changes}, preprocessor_config=stats)
    assert (config.vision.hidden_size, config.vision.num_hidden_layers) == (64, 24)
    assert (config.vision.image_mean, config.vision.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert config.to_hf() == {**VICUNA, **changes}


def test_generation_config():
    assert LlavaConfig.from_hf(VICUNA).generation == LlavaConfig.preset("1.6-vicuna-7b").generation
    given = {"eos_token_id": [2, 7], "pad_token_id": 5, "top_p": 0.6, "top_k": 3}
    generation = LlavaConfig.from_hf(VICUNA, generation_config=given).generation
    assert dataclasses.astuple(generation) == ((2, 7), 5, 0.6, 3)
    assert LlavaConfig.from_hf(MISTRAL).generation.pad_token_id == 2  # transformers pads with EOS


# ---- changes

LINEAR, DYNAMIC = RopeScaling("linear", 3.0), RopeScaling("dynamic", 4.0)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)
MM_CHANGES = [
    dict(mm_vision_select_layer=-1),
    dict(mm_vision_select_feature="cls_patch", mm_patch_merge_type="flat"),
    dict(mm_projector_type="mlp3x_gelu"),
    dict(mm_patch_merge_type="spatial"),
    dict(image_aspect_ratio="pad"),
    dict(image_grid_pinpoints=((672, 672), (336, 1344))),
    dict(mm_use_im_start_end=True, mm_use_im_patch_token=True),
    dict(tokenizer_padding_side="left", tokenizer_model_max_length=None),
    dict(unfreeze_mm_vision_tower=False),
    dict(image_aspect_ratio="pad", s2=True, s2_scales=(336, 672), mm_hidden_size=2048),
    dict(
        mm_vision_tower="openai/clip-vit-large-patch14", vision=VisionConfig(image_size=224), image_aspect_ratio="pad"
    ),
    dict(vision=VisionConfig(hidden_size=512), mm_hidden_size=512),
]
TEXT_CHANGES = [
    dict(
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
    ),
    dict(head_dim=16),
    dict(rope_theta=5e6),
    dict(rope_scaling=LINEAR),
    dict(rope_scaling=DYNAMIC),
    dict(rope_scaling=LLAMA3),
    dict(rms_norm_eps=1e-3, attention_bias=True, attention_dropout=0.1, tie_word_embeddings=True),
    dict(vocab_size=32003, max_position_embeddings=123, bos_token_id=5, eos_token_id=(6, 7), pad_token_id=None),
]


def reread(config, source):
    vision = None if "text_config" in source else dataclasses.asdict(config.vision)
    return LlavaConfig.from_hf(config.to_hf(), vision).replace(generation=config.generation)


@pytest.mark.parametrize("changes", MM_CHANGES, ids=" ".join)
def test_changed_mm_keys_are_written(changes):
    source = {**VICUNA, "my_key": 1}
    changed = LlavaConfig.from_hf(source).replace(**changes)
    assert reread(changed, source) == changed
    written = changed.to_hf()
    assert {k for k in source if written[k] != source[k]} <= changes.keys()  # and nothing else


@pytest.mark.parametrize("changes", TEXT_CHANGES, ids=" ".join)
@pytest.mark.parametrize("layout", ["vicuna", "linear rope", "hf old", "hf next, new"])
def test_changed_text_keys_are_written(layout, changes):
    source = LAYOUTS[layout]
    config = LlavaConfig.from_hf(source)
    changed = config.replace(text=dataclasses.replace(config.text, **changes))
    if layout.startswith("hf") and "max_position_embeddings" in changes:
        changed = changed.replace(tokenizer_model_max_length=123)  # the layout has no key of its own for it
    assert reread(changed, source) == changed


@pytest.mark.parametrize("to", [None, LINEAR, DYNAMIC, LLAMA3], ids=lambda s: s and s.rope_type)
@pytest.mark.parametrize("of", [LINEAR, LLAMA3], ids=lambda s: s.rope_type)
def test_rope_scaling_replaces_another(of, to):
    source = {**VICUNA, "rope_scaling": dataclasses.asdict(of)}
    config = LlavaConfig.from_hf(source)
    changed = config.replace(text=dataclasses.replace(config.text, rope_scaling=to))
    assert reread(changed, source) == changed


def test_s2_can_be_switched_off():
    changed = LlavaConfig.from_hf(S2).replace(s2=False, mm_hidden_size=1024, s2_scales=(336, 672, 1008))
    assert reread(changed, S2) == changed


def test_frozen_and_hashable():
    one, other = LlavaConfig.from_hf(VICUNA), LlavaConfig.from_hf({**VICUNA, "my_key": [1]})
    assert one == other and hash(one) == hash(other) and len({one, other, one.replace(s2_scales=(336,))}) == 2
    for part, field in ((one, "s2"), (one.text, "hidden_size"), (one.vision, "hidden_size")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, 1)


# ---- presets

TOWER = 303_507_456  # CLIP ViT-L/14-336, with the last layer and post_layernorm
DECODERS = {  # the parameter counts of vicuna, Mistral-7B, Yi-34B and Llama-3-8B
    "1.5-7b": 6_738_415_616,
    "1.5-13b": 13_015_864_320,
    "1.6-vicuna-7b": 6_738_415_616,
    "1.6-vicuna-13b": 13_015_864_320,
    "1.6-mistral-7b": 7_241_732_096,
    "1.6-34b": 34_388_917_248,
    "llama3-llava-next-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    config = LlavaConfig.preset(name)
    width, is_16 = config.text.hidden_size, not name.startswith("1.5")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))
    projector = 1024 * width + width + width * width + width
    assert count == DECODERS[name] + TOWER + projector + is_16 * width
    assert config.image_aspect_ratio == ("anyres" if is_16 else "pad") and config.has_image_newline == is_16
    if name == "1.6-vicuna-7b":
        assert count == 7_062_906_880


def test_presets_are_the_seven_and_round_trip():
    assert PRESETS.keys() == DECODERS.keys()
    for name, preset in PRESETS.items():
        written = preset.to_hf()
        assert LlavaConfig.from_hf(json.loads(json.dumps(written)), name=preset.name) == preset, name
    with pytest.raises(ValueError, match=r"preset='1\.6-70b'.*1\.6-vicuna-7b"):
        LlavaConfig.preset("1.6-70b")


# ---- what is refused


def refused(source, *mentioned, **kwargs):
    with pytest.raises(ValueError) as error:
        LlavaConfig.from_hf(source, **kwargs)
    for text in mentioned:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("mm_projector_type", "mlp2x_relu", "identity"),
        ("mm_projector_type", "mlp0x_gelu", "linear"),
        ("mm_patch_merge_type", "spatial_max", "spatial_unpad"),
        ("mm_vision_select_feature", "cls", "cls_patch"),
        ("image_aspect_ratio", "anyres_max_9", "anyres, pad, square"),
        ("tokenizer_padding_side", "both", "right, left"),
        ("hidden_act", "gelu", "silu"),
        ("model_type", "llava_gemma", "llava_mistral"),
        ("model_type", None, "llava_mistral"),
        ("mm_vision_select_layer", 25, "-25"),
        ("mm_vision_select_layer", -26, "24"),
        ("image_grid_pinpoints", "(1x1),...,(6x6)", "[width, height]"),
        ("image_grid_pinpoints", [[336]], "[width, height]"),
        ("image_grid_pinpoints", 336, "[width, height]"),
        ("image_grid_pinpoints", [[336, 500]], "image_size=336"),
        ("image_grid_pinpoints", [[0, 336]], "image_size=336"),
        ("image_grid_pinpoints", [[-336, 336]], "image_size=336"),
        ("image_grid_pinpoints", [], "image_size=336"),
        ("image_grid_pinpoints", None, "image_size=336"),
        ("mm_hidden_size", 768, "1024"),
        ("num_key_value_heads", 5, "num_attention_heads=32"),
        ("num_attention_heads", 30, "hidden_size=4096"),
        ("mm_patch_merge_type", ["flat"], "flat"),
    ],
)
def test_unsupported_values(key, value, supported):
    shown = str(value) if isinstance(value, int | list) else "[]" if value is None and "pin" in key else repr(value)
    shown = shown.replace("[[", "(").replace("]]", ")") if supported == "image_size=336" else shown
    source = {**VICUNA, key: value}
    if key == "num_attention_heads":
        source["num_key_value_heads"] = value
    refused(source, key, shown, supported)


def test_unsupported_rope_scaling():
    for kind in ("type", "rope_type"):
        scaling = {kind: "yarn", "factor": 2.0}
        refused({**VICUNA, "rope_scaling": scaling}, "rope_scaling.type='yarn'", "linear, dynamic, llama3")
    refused({**VICUNA, "rope_scaling": {"type": "linear"}}, "rope_scaling", "factor")


def test_unsupported_combinations():
    refused({**VICUNA, "s2": True, "mm_hidden_size": 3072}, "s2=True", "image_aspect_ratio='anyres'", "pad")
    refused({**VICUNA, "mm_vision_select_feature": "cls_patch"}, "'cls_patch'", "'spatial_unpad'", "'flat'")
    refused({**S2, "mm_vision_select_feature": "cls_patch"}, "'cls_patch'", "s2=True", "'patch'")
    refused({**S2, "s2_scales": "336,500", "mm_hidden_size": 2048}, "s2_scales", "500", "336")
    refused({**S2, "s2_scales": "672,1008", "mm_hidden_size": 2048}, "s2_scales", "672", "336")
    refused({**S2, "s2_scales": "a,b"}, "s2_scales='a,b'", "336,672,1008")
    refused({**S2, "mm_hidden_size": 1024}, "mm_hidden_size=1024", "3072")
    refused({**MISTRAL, "sliding_window": 4096}, "sliding_window=4096", "null")
    refused({**V15, "mm_projector_type": "identity"}, "'identity'", "1024", "4096")
    tower = {**HF_OLD["vision_config"], "hidden_act": "silu"}
    refused(VICUNA, "vision_config.hidden_act='silu'", "quick_gelu", "gelu", vision_config=tower)
    refused(
        VICUNA,
        "hidden_size=1000",
        "num_attention_heads=16",
        vision_config={**tower, "hidden_size": 1000} | {"hidden_act": "gelu"},
    )
    with pytest.raises(ValueError, match=r"reading='hf' .*original, llava-hf"):
        LlavaConfig.from_hf(VICUNA).replace(reading="hf")


def test_unsupported_in_the_llava_hf_layout():
    refused({**HF_OLD, "model_type": "llava_onevision"}, "model_type='llava_onevision'", "llava_next")
    refused({**HF_OLD, "projector_hidden_act": "relu"}, "projector_hidden_act='relu'", "gelu")
    refused({**HF_OLD, "vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls'", "full")
    refused({**HF_OLD, "vision_feature_layer": [-2, -5]}, "[-2, -5]", "-25")
    refused({**HF_OLD, "text_config": {"model_type": "qwen2"}}, "text_config.model_type='qwen2'", "llama, mistral")
    vision = {**HF_OLD["vision_config"], "model_type": "siglip_vision_model"}
    refused({**HF_OLD, "vision_config": vision}, "vision_config.model_type='siglip_vision_model'", "clip_vision_model")
    refused({**HF_OLD, "multimodal_projector_bias": False}, "multimodal_projector_bias=False", "True")
    refused({**VICUNA, "mlp_bias": True}, "mlp_bias=True", "False")
