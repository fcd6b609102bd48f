"""`initialize_vision_tokenizer` as a pure function: what grows, with what, and that nothing else changes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params

from llava_jax.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.inference.llava import Llava
from llava_jax.inputs.tokenizer import LlamaTokenizer
from llava_jax.models.llava_llama import param_shapes
from llava_jax.models.vocabulary import initialize_vision_tokenizer, resize_rows

TOKENIZER = LlamaTokenizer((Path(__file__).parent / "golden/tokenizers/llama/tokenizer.model").read_bytes())
WIDTH = 8


def config_with(patch=False, start_end=False, tied=False, vocab_size=32000):
    text = TextConfig(WIDTH, 8, 1, 2, 2, 4, vocab_size, tie_word_embeddings=tied)
    return LlavaConfig(
        VisionConfig(16, 16, 1, 2, 28, 14),
        text,
        mm_hidden_size=16,
        mm_use_im_patch_token=patch,
        mm_use_im_start_end=start_end,
    )


def params_for(config, seed=0):
    rng = np.random.default_rng(seed)
    rows = config.text.vocab_size
    language_model = {
        "embed_tokens": {"embedding": (3 + rng.standard_normal((rows, WIDTH))).astype(np.float32)},
        "norm": {"scale": np.ones(WIDTH, np.float32)},
    }
    if not config.text.tie_word_embeddings:
        language_model["lm_head"] = {"kernel": (rng.standard_normal((WIDTH, rows)) - 2).astype(np.float32)}
    return {"language_model": language_model, "image_newline": np.ones(WIDTH, np.float32)}


def tables(params):
    """The embedding, and the head where there is one, as [V, E]."""
    language_model = params["language_model"]
    head = [language_model["lm_head"]["kernel"].T] if "lm_head" in language_model else []
    return [np.asarray(x, np.float64) for x in (language_model["embed_tokens"]["embedding"], *head)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("patch", "start_end", "tokens"),
    [
        (True, False, ["<im_patch>"]),
        (False, True, ["<im_start>", "<im_end>"]),
        (True, True, ["<im_patch>", "<im_start>", "<im_end>"]),
    ],
    ids=["patch", "start_end", "both"],
)
def test_new_rows_are_the_mean(patch, start_end, tokens, tied):
    config = config_with(patch, start_end, tied)
    params = params_for(config)
    before = jax.tree.map(np.copy, params)
    grown_params, grown_config, grown = initialize_vision_tokenizer(params, config, TOKENIZER)
    # the original's order, and so its ids
    assert [grown.encode(token)[1:] for token in tokens] == [[32000 + i] for i in range(len(tokens))]
    assert grown_config == config.replace(text=dataclasses.replace(config.text, vocab_size=32000 + len(tokens)))
    assert len(tables(grown_params)) == (1 if tied else 2)
    for old, new in zip(tables(params), tables(grown_params), strict=True):
        assert len(new) == grown_config.text.vocab_size
        np.testing.assert_array_equal(new[:32000], old)
        np.testing.assert_allclose(new[32000:], np.tile(old.mean(0), (len(tokens), 1)), rtol=1e-5)
    # nothing is changed in place, and what does not grow is the same object
    assert len(TOKENIZER) == 32000 and config.text.vocab_size == 32000
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert grown_params["image_newline"] is params["image_newline"]
    assert grown_params["language_model"]["norm"] is params["language_model"]["norm"]


def test_without_new_tokens_everything_is_the_same_object():
    config = config_with()
    params = params_for(config)
    same_params, same_config, _ = initialize_vision_tokenizer(params, config, TOKENIZER)
    assert same_params is params and same_config is config


def test_twice_is_once():
    config = config_with(patch=True, start_end=True)
    once = initialize_vision_tokenizer(params_for(config), config, TOKENIZER)
    twice = initialize_vision_tokenizer(*once)
    assert twice[0] is once[0] and twice[1] is once[1] and len(twice[2]) == 32003


def test_only_the_missing_tokens_are_new():
    config = config_with(patch=True)
    params, config, tokenizer = initialize_vision_tokenizer(params_for(config), config, TOKENIZER)
    config = config.replace(mm_use_im_start_end=True)
    grown, config, tokenizer = initialize_vision_tokenizer(params, config, tokenizer)
    assert config.text.vocab_size == len(tokenizer) == 32003
    for old, new in zip(tables(params), tables(grown), strict=True):
        np.testing.assert_array_equal(new[:32001], old)
        np.testing.assert_allclose(new[32001:], np.tile(old.mean(0), (2, 1)), rtol=1e-5)


def test_a_padded_table_is_cut_to_the_tokenizer():
    """As resize_token_embeddings does: rows that no token has go, and do not count in the mean."""
    config = config_with(start_end=True, vocab_size=32064)
    params = params_for(config)
    params["language_model"]["embed_tokens"]["embedding"][32000:] = 1e6
    grown, grown_config, _ = initialize_vision_tokenizer(params, config, TOKENIZER)
    new = tables(grown)[0]
    assert grown_config.text.vocab_size == len(new) == 32002
    np.testing.assert_allclose(new[32000:], np.tile(tables(params)[0][:32000].mean(0), (2, 1)), rtol=1e-5)


def test_resize_rows_by_hand():
    table = np.float32([[1, 2], [3, 6], [5, 1]])
    np.testing.assert_array_equal(resize_rows(table, 5, 2), [[1, 2], [3, 6], [5, 1], [3, 3], [3, 3]])
    half = jnp.asarray(table, jnp.bfloat16)
    grown = resize_rows(half, 4, 1)
    assert grown.dtype == jnp.bfloat16 and np.array_equal(grown[3], [3, 3])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_grown_model_runs(tied):
    config = config_with(patch=True, start_end=True, tied=tied)
    params = random_params(config)
    grown, grown_config, tokenizer = initialize_vision_tokenizer(params, config, TOKENIZER)
    assert jax.tree.map(np.shape, grown) == jax.tree.map(lambda leaf: leaf.shape, param_shapes(grown_config))
    ids = [tokenizer.encode("a <im_start> b")]
    assert 32001 in ids[0]
    logits = Llava(grown_config, tokenizer).forward(grown, ids).logits
    assert logits.shape[-1] == 32003 and np.isfinite(logits).all()
    plain = [TOKENIZER.encode("a b")]
    before = Llava(config, TOKENIZER).forward(params, plain).logits
    after = Llava(grown_config, tokenizer).forward(grown, plain).logits
    np.testing.assert_allclose(after[..., :32000], before, atol=1e-5)
