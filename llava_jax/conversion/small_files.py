"""A checkpoint's small files: those that a conversion copies, checked before anything is written, and the tower's."""

from __future__ import annotations

import dataclasses

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.conversion.published_files import Location
from llava_jax.errors import listed
from llava_jax.inputs.tokenizer import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
BUFFERS_FILE = "buffers.safetensors"  # what a published checkpoint holds beside its parameters, for the way back
PROCESSOR_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja")  # llava-hf's, for the way back


def check_small_files(location: Location, text: Location, config: LlavaConfig) -> None:
    """See that the JSON files hold what they should, and that the tokenizer is one and fits the model.

    Args:
        location: where the processor's files stand.
        text: where the tokenizer's do.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: a file is damaged, or the embedding table lacks a row for an id that the tokenizer gives.
    """
    for place, names in ((location, PROCESSOR_FILES), (text, TOKENIZER_FILES)):
        for name in names:
            if name.endswith(".json"):
                place.read_json(name)
    check_rows(load_tokenizer(text.path, config.name, config.reading), config.text.vocab_size, text.given)


def check_rows(tokenizer, rows: int, what: str) -> None:
    """ValueError that names the tokens whose ids have no row in an embedding table of this size.

    LLaVA's own tokens that the tokenizer lacks are not among them: loading adds those, and their rows.
    """
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows)
    if not beyond:
        return
    told = listed([f"{token!r:.80} is {token_id}" for token_id, token in beyond])
    raise ValueError(
        f"{what}: its tokenizer gives ids that have no row in the embedding table of vocab_size={rows}: {told}; "
        "take them out of added_tokens.json, tokenizer_config.json and tokenizer.json, or get a model that has them"
    )


def vision_config_json(vision: VisionConfig) -> dict:
    """A tower's `config.json`."""
    pixels = ("image_mean", "image_std")
    shape = {name: value for name, value in dataclasses.asdict(vision).items() if name not in pixels}
    return {"model_type": "clip_vision_model", **shape}


def preprocessor_config_json(vision: VisionConfig) -> dict:
    """A tower's `preprocessor_config.json`."""
    size = vision.image_size
    mean, std = list(vision.image_mean), list(vision.image_std)
    return {"size": size, "crop_size": size, "image_mean": mean, "image_std": std}
