"""Small checkpoints as they are published, written to disk, and the check of what the converter makes of them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from make_7b import decoder_shapes, projector_shapes, tower_shapes
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from llava_jax.config import LlavaConfig

TOWER = "model.vision_tower.vision_tower.vision_model."
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
}
PREPROCESSOR = {"crop_size": 28, "size": 28, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}

# The prefixes of llava-hf checkpoints, one generation each, as `hf_checkpoint` takes them.
OLD = (
    "language_model.model.",
    "language_model.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "image_newline",
)
NEW = (
    "model.language_model.",
    "",
    "model.vision_tower.vision_model.",
    "model.multi_modal_projector.",
    "model.image_newline",
)
FIVE = (*OLD[:2], "vision_tower.", *OLD[3:])  # as transformers 5 saves
BARE = (*NEW[:2], "model.vision_tower.", *NEW[3:])


def write_json(path, value):
    path.write_text(json.dumps(value))


def tokenizer_model(words=TEXT["vocab_size"], stem="word"):
    """A `tokenizer.model` of so many pieces."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    for i in range(words):
        piece = ("<unk>", "<s>", "</s>")[i] if i < 3 else f"{stem}{i}"
        model.pieces.add(piece=piece, score=-i, type=(2, 3, 3)[i] if i < 3 else 1)  # unknown, control, or normal
    return model.SerializeToString()


def random_tensors(shapes, dtype=ml_dtypes.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_clip(directory, seed=7, prefix="vision_model.", dtype=np.float32):
    """A CLIP directory, text model and all, and its tensors."""
    directory.mkdir()
    write_json(directory / "config.json", {"model_type": "clip", "vision_config": VISION, "text_config": {}})
    write_json(directory / "preprocessor_config.json", PREPROCESSOR)
    vision = LlavaConfig.from_hf(config_dict("unused"), VISION).vision
    tensors = random_tensors(tower_shapes(vision, prefix), dtype, seed)
    others = {
        "logit_scale": (),
        "visual_projection.weight": (4, 8),
        "text_projection.weight": (4, 8),
        "text_model.final_layer_norm.bias": (8,),
        "text_model.embeddings.token_embedding.weight": (9, 8),
    }
    tensors |= {name: np.ones(shape, np.float32) for name, shape in others.items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(5)[None]
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, directory / "model.safetensors")
    return tensors


def config_dict(tower, **changes):
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **TEXT,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 8,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 56], [56, 28]],
        "unfreeze_mm_vision_tower": True,
    }
    return {**config, **changes}


def liuhaotian_shapes(config, tower=True):
    names = {"linear": ("model.mm_projector",), "identity": ()}.get(
        config.mm_projector_type, tuple(f"model.mm_projector.{2 * n}" for n in range(config.projector_depth))
    )
    shapes = decoder_shapes(config.text, head=None if config.text.tie_word_embeddings else "")
    shapes |= projector_shapes(config, names) | (tower_shapes(config.vision, TOWER) if tower else {})
    return shapes | ({"model.image_newline": (config.text.hidden_size,)} if config.has_image_newline else {})


class Checkpoint:
    """A tiny published checkpoint under `tmp_path`: `path`, `clip`, its parsed `config` and its `tensors`."""

    def __init__(self, tmp_path, tower=True, dtype=ml_dtypes.bfloat16, **changes):
        self.clip = tmp_path / "clip"
        self.clip_tensors = write_clip(self.clip)
        self.path = tmp_path / "llava-v1.6-tiny"
        self.path.mkdir()
        self.published = config_dict(self.clip, **changes)
        self.config = LlavaConfig.from_hf(self.published, VISION)
        self.tensors = random_tensors(liuhaotian_shapes(self.config, tower), dtype)
        write_json(self.path / "config.json", self.published)
        write_json(self.path / "generation_config.json", {"eos_token_id": 2})
        (self.path / "tokenizer.model").write_bytes(tokenizer_model())
        self.save()

    def save(self):
        save_file(self.tensors, self.path / "model.safetensors")


def hf_checkpoint(tmp_path, decoder, head, tower, projector, newline, kind="llava_next"):
    """A tiny llava-hf checkpoint under the given prefixes, and the original name of each of its tensors."""
    path = tmp_path / "llava-hf-tiny"
    path.mkdir()
    config = {
        "model_type": kind,
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": VISION,
        "image_grid_pinpoints": [[28, 56], [56, 28]],
    }
    write_json(path / "config.json", config)
    write_json(path / "preprocessor_config.json", PREPROCESSOR)
    (path / "tokenizer.model").write_bytes(tokenizer_model())
    parsed = LlavaConfig.from_hf(config)
    linears = tuple(f"{projector}linear_{n}" for n in (1, 2))
    shapes = decoder_shapes(parsed.text, decoder, head) | tower_shapes(parsed.vision, tower)
    shapes |= projector_shapes(parsed, linears) | ({newline: (16,)} if kind == "llava_next" else {})
    originals = decoder_shapes(parsed.text) | tower_shapes(parsed.vision, TOWER)
    originals |= projector_shapes(parsed, ("model.mm_projector.0", "model.mm_projector.2"))
    originals |= {"model.image_newline": (16,)} if kind == "llava_next" else {}
    tensors = random_tensors(shapes, np.float16)
    save_file(tensors, path / "model.safetensors")
    return path, dict(zip(originals, tensors.values(), strict=True))


def read_params(output):
    return flatten_dict(ocp.load(Path(output).absolute() / "params"), sep="/")


def original_name(path):
    """A parameter's liuhaotian name, worked out the other way round than the table does."""
    name = path.replace("/", ".").replace("layers_", "layers.")
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("kernel", "scale", "embedding", "position_embedding"):
        name = name if leaf == "position_embedding" else name.rsplit(".", 1)[0]
        name += ".weight"
    if name.startswith("vision_tower."):
        return TOWER + name.removeprefix("vision_tower.").replace("layers.", "encoder.layers.", 1)
    for n in range(1, 5):
        name = name.replace(f"mm_projector.linear_{n}", f"model.mm_projector.{2 * n - 2}")
    if "lm_head" in name:
        return "lm_head.weight"
    return "model.image_newline" if name == "image_newline" else name.replace("language_model.", "model.")


def check_values(output, tensors, name_of=original_name):
    """Bit for bit: every parameter is its tensor, turned where the layout says; every tensor is used."""
    params, used = read_params(output), set()
    for path, value in params.items():
        name = name_of(path)
        expected = tensors[name]
        if path.endswith("kernel"):
            expected = expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected.T
        assert value.dtype == expected.dtype, path
        assert value.shape == expected.shape, path
        assert np.asarray(value).tobytes() == np.ascontiguousarray(expected).tobytes(), path
        used.add(name)
    return used
