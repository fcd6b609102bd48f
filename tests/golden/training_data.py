"""What the recorded ten steps of training read: conversations about the pictures of this folder, and the settings."""

PICTURES = ("tall_150x900", "sliver_2000x50", "tiny_20x13", "sliver_50x2000", "tall_300x900")
QUESTIONS = ("What is shown in this image?", "Describe it.", "Which colours do you see?", "Is there a cat?")
ANSWERS = (
    "A cat with green eyes, looking past the camera.",
    "There is very little to see.",
    "Red, blue and yellow, and a good deal of brown on the left side.",
    "No.",
    "Yes, there is.",
)

STEPS, ROWS = 10, 2
SETTINGS = dict(  # names as in transformers' TrainingArguments
    learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.2, max_grad_norm=1.0, adam_beta1=0.9, adam_beta2=0.999
)
RUNS = {  # name: (checkpoint, settings)
    "pretrain": ("vicuna", dict(stage="pretrain", version="plain")),
    "finetune": ("vicuna", dict(stage="finetune", version="v1")),
    "projector_lr": ("llava15", dict(stage="finetune", version="v1", mm_projector_lr=3e-4)),
    "accumulate": ("llava15", dict(stage="finetune", version="v1", gradient_accumulation_steps=2)),
    "tower": ("llava15", dict(stage="finetune", version="v1", unfreeze_mm_vision_tower=True)),
    "lora": (  # without dropout: torch's random bits are its own
        "vicuna",
        dict(stage="lora", version="v1", mm_projector_lr=3e-4, lora_r=4, lora_alpha=16, lora_dropout=0.0),
    ),
}
MERGED = "model.layers.1."  # whose merged weights are recorded


def examples(plain):
    """LLaVA's JSON: ROWS for each of STEPS steps, in their order; some with several turns, some without a picture."""
    out = []
    for i in range(STEPS * ROWS):
        picture = None if i % 7 == 3 and not plain else PICTURES[i * 3 % len(PICTURES)]
        turns = []
        for turn in range(1 if plain else 1 + i % 3):
            question = QUESTIONS[(i + turn) % len(QUESTIONS)]
            if picture and turn == 0:
                question = "<image>\n" + question if i % 2 else question + "\n<image>"
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": ANSWERS[(2 * i + turn) % len(ANSWERS)]})
        out.append({"id": str(i), "conversations": turns} | ({"image": picture} if picture else {}))
    return out


def sampled(size):
    """The positions of a parameter of `size` values that are recorded."""
    return slice(None, None, max(1, size // 200))
