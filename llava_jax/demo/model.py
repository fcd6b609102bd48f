"""The small LLaVA-1.6 of this package: its shape, its tokenizer, where its training starts, and its published files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.conversion.published_files import write_json
from llava_jax.demo.scene_questions import vocabulary
from llava_jax.inputs.conversation import conv_templates

NAME = "llava-v1.6-scenes"
TILE = 56
PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))  # the published ones, in tiles of 56
BUNDLED = Path(__file__).parent / NAME  # the conversation template is picked by the name
TOWER = "tower"  # the folder of the tower's config beside the weights


def scenes_config(vocab_size: int, **changes) -> LlavaConfig:
    """LLaVA-1.6's architecture in small; `changes` are fields of LlavaConfig."""
    vision = VisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=TILE
    )
    text = TextConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        pad_token_id=0,
    )
    settings = dict(
        mm_vision_tower=TOWER,
        mm_hidden_size=128,
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS,
        tokenizer_model_max_length=512,
        unfreeze_mm_vision_tower=True,
        name=NAME,
    )
    return LlavaConfig(vision=vision, text=text, **{**settings, **changes})


# ---- the tokenizer


def tokenizer_model() -> bytes:
    """A SentencePiece model whose pieces are whole words, the template's fixed text, and bytes for all else.

    Every piece has the same score, so a text is cut into as few pieces as can be.
    """
    from sentencepiece import sentencepiece_model_pb2 as format

    template = conv_templates["llava_v1"]
    user, assistant = template.roles
    words = vocabulary()
    pieces = ["▁", "▁" + template.system.replace(" ", "▁"), f"{user}:", f"▁{assistant}:", *"?.,"]
    pieces += [f"▁{word}" for word in words]
    pieces += [word for word in words if len(word) == 1 or word[0].isupper()]  # in a sign; after a line break

    kind = format.ModelProto.SentencePiece
    proto = format.ModelProto()
    special = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    special += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    for piece, of_kind in special:
        proto.pieces.add(piece=piece, score=0.0, type=of_kind)
    for piece in dict.fromkeys(pieces):
        proto.pieces.add(piece=piece, score=-1.0, type=kind.NORMAL)
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = spec.UNIGRAM, True, len(proto.pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    spec.split_by_whitespace = False
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString(deterministic=True)


def write_tokenizer(directory: Path) -> None:
    """tokenizer.model and tokenizer_config.json."""
    (directory / "tokenizer.model").write_bytes(tokenizer_model())
    write_json(directory / "tokenizer_config.json", {"legacy": False, "tokenizer_class": "LlamaTokenizer"})


# ---- where training starts


def first_params(config: LlavaConfig, seed: int) -> dict:
    """Random parameters from which so small a decoder learns at once: what a token is outweighs what layers add."""
    from llava_jax.models.llava_llama import init_params

    flat = flatten_dict(jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed)), sep="/")
    deep = (2 * config.text.num_hidden_layers) ** -0.5
    width = config.text.hidden_size**0.5

    def scale(path: str) -> float:
        if path.endswith(("embed_tokens/embedding", "image_newline")):
            return width
        if path.endswith(("o_proj/kernel", "down_proj/kernel")):
            return deep
        return {"position_embedding": 10.0, "class_embedding": 10.0}.get(path.rsplit("/", 1)[-1], 1.0)

    return unflatten_dict({path: value * scale(path) for path, value in flat.items()}, sep="/")


# ---- the published layout


def write_published(directory: Path, config: LlavaConfig, params: dict, dtype: str = "bfloat16") -> Path:
    """A checkpoint as liuhaotian/llava-v1.6-vicuna-7b has it: config.json, model.safetensors, the tokenizer; beside it
    the tower's own config. The tower's weights are among the others, as it was trained too."""
    from safetensors.numpy import save_file

    from llava_jax.conversion.key_table import invert_transform, liuhaotian_rules, published_name
    from llava_jax.conversion.small_files import preprocessor_config_json, vision_config_json

    (directory / TOWER).mkdir(parents=True, exist_ok=True)
    write_json(directory / TOWER / "config.json", vision_config_json(config.vision))
    write_json(directory / TOWER / "preprocessor_config.json", preprocessor_config_json(config.vision))
    write_json(directory / "config.json", config.to_hf())
    write_tokenizer(directory)
    tensors, kept = {}, np.dtype(getattr(ml_dtypes, dtype, dtype))
    for path, value in flatten_dict(params, sep="/").items():
        name, transform = published_name(path, liuhaotian_rules(config))
        tensors[name] = np.ascontiguousarray(invert_transform(transform, np.asarray(value, np.float32)).astype(kept))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def convert_published(published: Path, directory: Path) -> Path:
    """Such a checkpoint as a directory that `llava_jax.load` takes."""
    from llava_jax.conversion.from_hf import convert

    return convert(published, output=directory, vision_tower=str(published / TOWER), progress=False)


@contextlib.contextmanager
def converted(published: str | None, output: str | None):
    """A directory that `llava_jax.load` takes. If what is done with it fails, it is removed again.

    Args:
        published: a checkpoint of `write_published`; None is the bundled one.
        output: where it is kept; None is a temporary directory.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = convert_published(Path(published or BUNDLED), Path(output or Path(scratch) / NAME))
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
