"""Records tokens.npz: prompts, ids and texts of the reference's templates and tokenizers.

Runs where the original LLaVA is installed (llava-torch==1.2.2.post1, transformers==4.37.2, sentencepiece, protobuf):

    python tests/golden/record_tokens.py

It reads tokenizers/*/tokenizer.model and writes tokens.npz, both beside this file. The keys:

    inputs                        JSON: cases, strings and ids that were given
    prompts                       JSON: {template: {case: prompt, or "error: ..."}}
    {model}/{kind}/prompts/ids    ids of all the prompts one after another; /ends says where each ends
    {model}/{kind}/strings/ids    the same for the strings
    {model}/{kind}/{skip,keep}    JSON: decoded ids, with and without skip_special_tokens

The models are llama and mistral; the kinds are slow_new and slow_legacy (`legacy=False` and `True`) and fast (whose
flag changes nothing), and each of them once more with the tokens that `initialize_vision_tokenizer` adds (`_added`).
"""

import json
import random
from pathlib import Path

import numpy as np
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from transformers import LlamaTokenizer, LlamaTokenizerFast

HERE = Path(__file__).parent
QUESTION = "What is shown in this image?"

# user's and model's turns in alternation; a list is a tuple message's text; None is the turn to be written
CASES = {
    "one_image": [f"<image>\n{QUESTION}", None],
    "multi_turn": [f"<image>\n{QUESTION}", "It is a cat.", "What colour is it?", None],
    "no_image": ["Hello!", None],
    "two_images": ["<image>\n<image>\nCompare these.", None],
    "by_hand": ["Look at <image> and say why.", None],
    "image_last": ["What is it?\n<image>", None],
    "tuple_message": [["Describe <image> please."], None],
    "tuple_front": [["<image>\nWhat is it?"], None],
    "tuple_later": [["Describe <image> please."], "A cat.", ["And <image> now?"], None],
    "finished": [f"<image>\n{QUESTION}", "It is a cat."],
    "empty_message": ["", None],
    "unicode": ["<image>\n  Déjà vu — 你好 🦙\t\tok  \n\nx <s> </s> y", None],
    "built_in": ["<image>\nHi", None],
}
WORDS = (  # parted by bars
    "Hello|USER:| ASSISTANT:|the|cat|<s>|</s>|<unk>|<image>|<im_start>|<im_end>|<im_patch>|▁|▁▁| |  |    |\n|\n\n|\t|"
    "\r\n|\0|\x01|\x1f|\x7f|\u00a0|\u200b|\u3000|\ufeff|\ufffd|你好|猫|🦙|👨\u200d👩\u200d👧|é|e\u0301|ﬁ|½|İ|ß|Ω|שלום|<0x0A>|<|s|>|/|"
    "[INST]|[/INST]|<<SYS>>|###|1234567|3.14|...|don't|_|~|\u2028|\U0010fffd|ꙮ|  a|b  "
)
STRINGS = [
    "",
    " ",
    "a",
    " a",
    "a ",
    "\n",
    "<s>",
    "<s>a",
    "a</s>",
    "</s> b",
    "</s>USER: x",
    "▁",
    "a▁b",
    "\t",
    " " * 40,
    "x" + " " * 33 + "y",
]


def random_strings(rng, count):
    words = WORDS.split("|")
    return ["".join(rng.choice(words) for _ in range(rng.randint(1, 9))) for _ in range(count)]


def random_ids(rng, count):
    """Sequences of words, bytes (whole and broken characters) and special tokens."""

    def part():
        kind = rng.random()
        if kind < 0.25:
            return [rng.randint(3, 258)]
        if kind < 0.5:
            char = chr(
                rng.choice([rng.randint(0x80, 0x7FF), rng.randint(0x800, 0xD7FF), rng.randint(0x10000, 0x10FFFF)])
            )
            return [byte + 3 for byte in char.encode()][: rng.choice([1, 2, 4, 4])]
        return [rng.choice([0, 1, 2, 13, 259]) if kind < 0.65 else rng.randint(259, 31999)]

    return [[i for _ in range(rng.randint(1, 8)) for i in part()] for _ in range(count)]


def prompt_of(template, case):
    conv = conv_templates[template].copy()
    if case != "built_in":
        conv.messages = []
    for i, message in enumerate(CASES[case]):
        message = (message[0], None, "Default") if isinstance(message, list) else message
        conv.append_message(conv.roles[i % 2], message)
    try:
        return conv.get_prompt()
    except (AssertionError, TypeError) as error:
        return f"error: {type(error).__name__}"


def tokenizers_of(model):
    path = str(HERE / "tokenizers" / model / "tokenizer.model")
    for added in (False, True):
        made = {
            "slow_new": LlamaTokenizer(path, legacy=False, pad_token="<unk>"),
            "slow_legacy": LlamaTokenizer(path, legacy=True, pad_token="<unk>"),
            "fast": LlamaTokenizerFast(vocab_file=path, legacy=True, pad_token="<unk>"),
        }
        for kind, tokenizer in made.items():
            if added:
                tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
                tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
            yield kind + "_added" * added, tokenizer


def packed(rows):
    return np.array([i for row in rows for i in row], np.int32), np.cumsum([len(row) for row in rows], dtype=np.int32)


def main():
    rng = random.Random(0)
    strings, ids = STRINGS + random_strings(rng, 150), random_ids(rng, 150)
    prompts = {template: {case: prompt_of(template, case) for case in CASES} for template in conv_templates}
    flat = [prompt for cases in prompts.values() for prompt in cases.values()]
    out = {"inputs": json.dumps({"cases": CASES, "strings": strings, "ids": ids}), "prompts": json.dumps(prompts)}
    for model in ("llama", "mistral"):
        for kind, tokenizer in tokenizers_of(model):
            key = f"{model}/{kind}"
            rows = {"strings": [tokenizer(text).input_ids for text in strings]}
            if not kind.endswith("added"):
                rows["prompts"] = [tokenizer_image_token(prompt, tokenizer) for prompt in flat]
            for name, ids_of in rows.items():
                out[f"{key}/{name}/ids"], out[f"{key}/{name}/ends"] = packed(ids_of)
            out[f"{key}/skip"] = json.dumps([tokenizer.decode(row, skip_special_tokens=True) for row in ids])
            out[f"{key}/keep"] = json.dumps([tokenizer.decode(row) for row in ids])
    np.savez_compressed(HERE / "tokens.npz", **{key: np.array(value) for key, value in out.items()})


if __name__ == "__main__":
    main()
