"""A random LLaVA-1.6 in transformers' own layout, and what our converter makes of it: equal weights on both sides."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for golden.checkpoints

from golden import checkpoints

from llava_jax.conversion.from_hf import convert

NAME = "llava-v1.6-vicuna-random"  # picks the conversation template
WORDS = checkpoints.VOCAB + 64  # as llava-hf pads the table: <image>, <pad> and 62 unused words
END = 2  # </s>
VISION = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8)
DECODERS = {
    "scale": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    | dict(num_key_value_heads=8),
}


def write(directory: Path, decoder: str) -> tuple[Path, Path]:
    """Write both checkpoints under `directory`: (transformers', ours). The model never ends a text by itself."""
    import torch
    import transformers

    theirs, ours = directory / decoder / NAME, directory / decoder / "converted"
    if ours.is_dir():
        return theirs, ours
    config = transformers.LlavaNextConfig(
        vision_config=dict(model_type="clip_vision_model", image_size=336, patch_size=14, **VISION),
        text_config=dict(
            model_type="llama",
            vocab_size=WORDS,
            max_position_embeddings=4096,
            initializer_range=0.06,
            **DECODERS[decoder],
        ),
        image_grid_pinpoints=checkpoints.PINPOINTS,
        image_token_index=checkpoints.VOCAB,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[END] = 0  # its logit is 0, and never the largest of 32,000
    model.save_pretrained(theirs)
    side = {"height": 336, "width": 336}
    processor = transformers.LlavaNextImageProcessorPil(
        image_grid_pinpoints=checkpoints.PINPOINTS, size={"shortest_edge": 336}, crop_size=side
    )
    processor.save_pretrained(theirs)
    checkpoints.write_tokenizer(theirs, "llama", 4096, extra=("<image>", "<pad>"))
    convert(theirs, ours, progress=False)
    return theirs, ours
