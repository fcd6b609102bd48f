"""Pure functions and the projector against PyTorch, transformers and plain float64 formulas."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from llava_jax.config import LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.models import ops
from llava_jax.models.linear import matmul_few_rows
from llava_jax.models.projector import build_vision_projector
from llava_jax.models.vision import bicubic_matrix, normalize_tiles


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- linear layers


@pytest.mark.parametrize("shape", [(2, 1, 1, 16), (1, 3, 16), (2, 9, 16)])
def test_few_rows_are_padded_for_the_matrix_unit(shape):
    """What a TPU does is the product, with rows added or without."""
    x, kernel, rows = normal(*shape), normal(16, 4, seed=1), int(np.prod(shape[:-1]))
    out = jax.jit(partial(matmul_few_rows, jnp.matmul, rows))(x, kernel)
    np.testing.assert_allclose(out, x @ kernel, atol=1e-5)
    compiled = jax.jit(partial(matmul_few_rows, jnp.matmul, rows)).lower(x, kernel).as_text()
    multiplied = int(re.search(r"dot_general.*\(tensor<(\d+)x16xf32>", compiled).group(1))
    assert multiplied == rows if rows >= 8 else multiplied >= 8


# ---- norm, division, activation


def test_rms_norm_rounds_before_the_weight():
    """bfloat16: rounding the other way round would differ in many places."""
    x, scale = 3 * normal(64, 160), 1 + 0.3 * normal(160, seed=1)
    norm = LlamaRMSNorm(160, eps=1e-5).bfloat16()
    norm.weight.data = torch.from_numpy(scale).bfloat16()
    theirs = norm(torch.from_numpy(x).bfloat16()).detach().float().numpy()
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16)
    ours = np.asarray(jax.jit(ops.rms_norm, static_argnums=2)(*half, 1e-5))
    assert ours.dtype == jnp.bfloat16
    wide = np.asarray(half[0], np.float32)
    wide = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5)
    late = np.asarray(jnp.asarray(wide * np.asarray(half[1], np.float32), jnp.bfloat16), np.float32)
    # one float32 ulp in rsqrt may tip a rounding, once in some thousands
    assert np.mean(ours.astype(np.float32) != theirs) < 1e-3 < 0.1 < np.mean(late != theirs)
    np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=2**-7)


def test_rms_norm_float32():
    x, scale = normal(5, 7, 32), normal(32, seed=1)
    norm = LlamaRMSNorm(32, eps=1e-3)  # an eps that shows
    norm.weight.data = torch.from_numpy(scale)
    np.testing.assert_allclose(ops.rms_norm(x, scale, 1e-3), norm(torch.from_numpy(x)).detach(), atol=2e-6)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_divide_exactly(jit):
    """Every quotient is IEEE's, where XLA's own division is off by an ulp in places."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((3000, 200)) * 2.0 ** rng.integers(-8, 8, (3000, 200))).astype(np.float32)
    by = rng.uniform(0.05, 4, 200).astype(np.float32)
    np.testing.assert_array_equal(jit(ops.divide_exactly)(x, by), x / by)
    levels = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(jit(ops.divide_exactly)(levels, np.float32([255])), levels / np.float32(255))


def test_quick_gelu():
    x = normal(1000) * 5
    tensor = torch.from_numpy(x)
    np.testing.assert_allclose(ops.quick_gelu(x), tensor * torch.sigmoid(1.702 * tensor), atol=1e-6)


# ---- pixels and the projector


@pytest.mark.parametrize("seed", range(4))
def test_normalize_tiles_is_bit_equal(seed):
    rng = np.random.default_rng(seed)
    mean, std = (rng.uniform(0.1, 0.9, 3).tolist() for _ in range(2))
    config = VisionConfig() if seed == 0 else VisionConfig(image_mean=tuple(mean), image_std=tuple(std))
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=list(config.image_mean), image_std=list(config.image_std)
    )
    expected = processor(Image.fromarray(levels), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    ours = jax.jit(normalize_tiles, static_argnums=1)(levels[None], config)
    assert expected.dtype == ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "sizes", [(1008, 336), (1008, 672), (28, 56), (28, 84), (84, 84), (30, 45), (7, 3), (2, 9), (1, 4)], ids=str
)
def test_bicubic_matrix(sizes):
    size_in, size_out = sizes
    x = np.random.default_rng(0).standard_normal((size_in, 5)).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(x)[None, None], size=(size_out, 5), mode="bicubic", align_corners=False
    ).numpy()[0, 0]
    matrix = bicubic_matrix(size_in, size_out)
    assert matrix.shape == (size_out, size_in) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix @ x, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_projector(kind):
    wide = 48 if kind != "identity" else 32
    text = TextConfig(hidden_size=wide, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    config = LlavaConfig(VisionConfig(hidden_size=32), text, mm_hidden_size=32, mm_projector_type=kind)
    depth = {"linear": 1, "identity": 0}.get(kind) if "x_" not in kind else int(kind[3])
    layers = [torch.nn.Linear(32 if i == 0 else wide, wide) for i in range(depth)]
    theirs = torch.nn.Sequential(*(m for layer in layers for m in (torch.nn.GELU(), layer)))[1:]
    params = {
        f"linear_{i}": {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}
        for i, layer in enumerate(layers, start=1)
    }
    x = 2 * np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    projector = build_vision_projector(config)
    assert jax.tree.map(np.shape, projector.init(jax.random.key(0), x).get("params", {})) == jax.tree.map(
        np.shape, params
    )
    np.testing.assert_allclose(projector.apply({"params": params}, x), theirs(torch.from_numpy(x)).detach(), atol=1e-5)


# ---- rotary positions

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [(1e4, 128, None), (5e5, 128, None), (1e6, 64, None), (5e6, 128, None), (12345.0, 80, None)]
    + [
        (1e4, 128, RopeScaling("linear", 2.5)),
        (5e5, 128, LLAMA3),
        (5e5, 64, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
    ],
    ids=lambda value: value.rope_type if isinstance(value, RopeScaling) else str(value),
)
def test_rotary_embedding(theta, head_dim, scaling):
    """Up to position 4095, where one ulp in a frequency near 1 shows as 2e-4."""
    parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= (
            dataclasses.asdict(scaling)
            if scaling.rope_type == "llama3"
            else {
                "rope_type": "linear",
                "factor": scaling.factor,
            }
        )
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=parameters
        )
    )
    positions = np.arange(4096)[None]
    expected = theirs(torch.zeros(1), torch.from_numpy(positions))
    config = TextConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    ours = jax.jit(ops.rotary_embedding, static_argnums=(1, 3))(positions, config, jnp.int32([4096]), 4096)
    # torch's own float32 pow is an ulp off here and there in the slow frequencies;
    # linear divides the positions, as transformers 4.37 does, where 5.x divides the frequencies: an ulp everywhere
    atol = 4e-4 if scaling is not None and scaling.rope_type == "linear" else 1e-5
    for mine, other in zip(ours, expected, strict=True):
        assert mine.shape == (1, 4096, head_dim) and mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, other, atol=atol)


def reference_dynamic(positions, seq_len, head_dim, theta, factor, trained):
    """cos of transformers 4.37's LlamaDynamicNTKScalingRotaryEmbedding.

    The base is a Python float; torch rounds it to float32 when it raises it to a float32 tensor. That rounding, and
    then the power to the last bit, matter: one ulp in a frequency is worth 1e-3 on the logits of 3,000 positions.
    """
    base = theta
    if seq_len > trained:
        base = theta * ((factor * seq_len / trained) - (factor - 1)) ** (head_dim / (head_dim - 2))
    exponent = (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)
    frequencies = np.float32(1) / (np.float64(np.float32(base)) ** exponent).astype(np.float32)
    return np.cos(np.tile(positions[:, None].astype(np.float32) * frequencies, 2))


@pytest.mark.parametrize("seq_len", [7, 2048, 2049, 3000, 4096])
def test_dynamic_rope(seq_len):
    config = TextConfig(head_dim=128, max_position_embeddings=2048, rope_scaling=RopeScaling("dynamic", 2.0))
    positions = np.arange(seq_len)
    cos, _ = jax.jit(ops.rotary_embedding, static_argnums=(1, 3))(
        positions[None], config, jnp.int32([seq_len]), seq_len
    )
    expected = reference_dynamic(positions, seq_len, 128, 1e4, 2.0, 2048)
    np.testing.assert_allclose(cos[0], expected, atol=1e-5)


def test_dynamic_rope_goes_by_each_rows_length():
    config = TextConfig(head_dim=16, max_position_embeddings=8, rope_scaling=RopeScaling("dynamic", 3.0))
    positions = np.stack([np.arange(20)] * 3)
    cos, _ = ops.rotary_embedding(jnp.asarray(positions), config, jnp.int32([5, 12, 20]), 20)
    for row, seq_len in enumerate([5, 12, 20]):
        np.testing.assert_allclose(cos[row], reference_dynamic(positions[row], seq_len, 16, 1e4, 3.0, 8), atol=1e-5)


# ---- loss


def test_causal_lm_loss():
    logits, labels = 4 * normal(3, 9, 17), np.random.default_rng(1).integers(0, 17, (3, 9)).astype(np.int32)
    labels[0, :4] = labels[1] = labels[2, 5] = -100
    flat = torch.from_numpy(logits[:, :-1].reshape(-1, 17)), torch.from_numpy(labels[:, 1:].reshape(-1)).long()
    expected = F.cross_entropy(*flat).item()
    np.testing.assert_allclose(ops.causal_lm_loss(logits, jnp.asarray(labels)), expected, rtol=1e-6)


@pytest.mark.parametrize("first", [-100, 3])
def test_loss_of_nothing_labelled_is_nan(first):
    """The first label is never predicted."""
    labels = np.full((2, 5), -100, np.int32)
    labels[:, 0] = first
    assert np.isnan(ops.causal_lm_loss(normal(2, 5, 7), jnp.asarray(labels)))
