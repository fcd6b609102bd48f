"""The files that a conversion copies as they are: read and checked before anything is written."""

from __future__ import annotations

from llava_jax.config import LlavaConfig
from llava_jax.conversion.published_files import Location
from llava_jax.inputs.tokenizer import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
PROCESSOR_FILES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)  # of llava-hf, for the way back


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
    """ValueError naming the tokens whose ids are beyond an embedding table of so many rows.

    LLaVA's own tokens that the tokenizer lacks are not among them: loading adds those, and their rows.
    """
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows)
    if not beyond:
        return
    told = ", ".join(f"{token!r:.80} is {token_id}" for token_id, token in beyond[:5])
    more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
    raise ValueError(
        f"{what}: its tokenizer gives ids that have no row in the embedding table of vocab_size={rows}: {told}{more}; "
        "take them out of added_tokens.json, tokenizer_config.json and tokenizer.json, or get a model that has them"
    )
