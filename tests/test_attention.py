"""Every path of the attention dispatch against the plain formula, and which path each platform gets."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax.models import attention


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv(length, heads, kv_heads, width, rows=2):
    kinds = (heads, kv_heads, kv_heads)
    return [normal(rows, length, count, width, seed=seed) for seed, count in enumerate(kinds)]


def padded(length, padding, some):
    """bool [2, L]: the first row whole, the second one with `some` positions of padding."""
    valid = np.ones((2, length), bool)
    places = {"right": slice(length - some, None), "left": slice(some), "all": slice(None), "none": slice(0)}
    valid[1, places[padding]] = False
    return valid


def plain_attention(q, k, v, seen):
    """float64: q [L, H, D], k and v [S, K, D], seen bool [L, S] → [L, H, D]; query head h reads kv head h // (H/K)."""
    out = np.zeros(q.shape)
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        scores = q[:, head].astype(np.float64) @ k[:, kv].T / np.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
    return out


def assert_plain(out, q, k, v, valid, atol):
    """The queries that are not padding, by the plain formula; the others finite."""
    out = np.asarray(out, np.float64)
    assert out.shape == q.shape and np.isfinite(out).all()
    for row, tokens in enumerate(valid):
        seen = (np.tril(np.ones((len(tokens),) * 2, bool)) & tokens)[tokens]
        if tokens.any():
            expected = plain_attention(q[row][tokens], k[row], v[row], seen)
            np.testing.assert_allclose(out[row][tokens], expected, atol=atol)


def plain_gradients(q, k, v, valid, weigh):
    """Of sum(attention · weigh) with respect to q, k and v, the whole score matrix at once."""

    def total(q, k, v):
        weights = attention.attention_weights(q, k, attention.causal_mask(valid, 0, q.shape[1]))
        return jnp.sum(attention.weighted_values(weights, v) * weigh)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)


def splash(q, k, v, valid):
    return attention.splash_attention(q, k, v, valid, interpret=True)


# ---- the paths, on short sequences

XLA_PATHS = [attention.chunked_attention, attention.head_by_head_attention, attention.causal_attention]


@pytest.mark.parametrize("path", XLA_PATHS[:2])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("length", [1, 8, 9, 17])
@pytest.mark.parametrize("padding", ["none", "right", "left", "all"])
def test_in_chunks(monkeypatch, path, kv_heads, length, padding):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 8)
    parts, valid = qkv(length, 6, kv_heads, 4), padded(length, padding, length // 3)
    assert_plain(jax.jit(path)(*parts, valid), *parts, valid, atol=5e-6)


@pytest.mark.parametrize("path", XLA_PATHS)
def test_around_the_real_chunk(path):
    parts, valid = qkv(attention.QUERY_CHUNK + 1, 2, 1, 4), np.ones((2, attention.QUERY_CHUNK + 1), bool)
    assert_plain(jax.jit(path)(*parts, valid), *parts, valid, atol=5e-6)


@pytest.mark.parametrize(("length", "heads", "kv_heads", "width"), [(256, 2, 2, 128), (384, 4, 2, 64), (128, 2, 1, 64)])
@pytest.mark.parametrize("padding", ["none", "right", "left", "all"])
def test_splash(length, heads, kv_heads, width, padding):
    parts, valid = qkv(length, heads, kv_heads, width), padded(length, padding, 75)
    assert_plain(jax.jit(splash)(*parts, valid), *parts, valid, atol=2e-5)


@pytest.mark.parametrize("path", [*XLA_PATHS, splash])
def test_no_mask_hides_what_comes_after(path):
    """Without `valid`, padding at the end changes nothing for the tokens before it."""
    q, k, v = qkv(256, 2, 1, 64)
    without = jax.jit(lambda *parts: path(*parts, None))(q, k, v)
    assert_plain(without, q, k, v, np.ones((2, 256), bool), atol=2e-5)
    masked = jax.jit(path)(q, k, v, padded(256, "right", 75))
    np.testing.assert_allclose(without[1, :-75], masked[1, :-75], atol=2e-5)


@pytest.mark.parametrize("path", [*XLA_PATHS, splash])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_gradients(monkeypatch, path, padding):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 96)
    parts, valid = qkv(256, 4, 2, 64), padded(256, padding, 75)
    weigh = normal(*parts[0].shape, seed=9) * valid[..., None, None]
    run = getattr(path, "__wrapped__", path)
    ours = jax.jit(jax.grad(lambda *parts: jnp.sum(run(*parts, valid) * weigh), argnums=(0, 1, 2)))(*parts)
    for mine, expected in zip(ours, plain_gradients(*parts, valid, weigh), strict=True):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(mine, expected, atol=5e-5)


def test_large_scores_stay_finite():
    q, k, v = qkv(40, 2, 2, 64)
    q, valid = 1e3 * q, np.ones((2, 40), bool)  # scores of ±1e5, far beyond what exp can take
    assert_plain(attention.causal_attention(q, k, v, valid), q, k, v, valid, atol=1e-3)


@pytest.mark.parametrize("path", [attention.chunked_attention, attention.head_by_head_attention])
def test_half_precision_has_a_float32_softmax(path):
    """2,000 equal weights would not add up in bfloat16."""
    q, k, v = np.zeros((1, 2000, 1, 8)), np.zeros((1, 2000, 1, 8)), np.ones((1, 2000, 1, 8))
    out = path(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


def test_backward_never_holds_the_whole_score_matrix():
    """On a CPU, forward and backward: less than a quarter of [H, L, L]; kept for the backward pass it were half."""
    shape = jax.ShapeDtypeStruct((1, 3072, 16, 8), jnp.float32)
    run = jax.grad(lambda *parts: jnp.sum(attention.causal_attention(*parts)), argnums=(0, 1, 2))
    memory = jax.jit(run).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 3072 * 3072 * 4 / 4


# ---- which path a platform gets


def lowered(platform, dtype, width=64, length=128, precision="default"):
    """The text of the program for a platform that need not be here."""
    part, valid = jax.ShapeDtypeStruct((2, length, 4, width), dtype), jax.ShapeDtypeStruct((2, length), bool)
    run = jax.jit(lambda q, k, v, valid: attention.causal_attention.__wrapped__(q, k, v, valid))
    with jax.default_matmul_precision(precision):
        return run.trace(part, part, part, valid).lower(lowering_platforms=(platform,)).as_text()


def test_splash_is_for_tpus_alone():
    assert "tpu_custom_call" in lowered("tpu", jnp.bfloat16)
    assert "tpu_custom_call" in lowered("tpu", jnp.float32, precision="highest")
    assert "tpu_custom_call" not in lowered("cpu", jnp.bfloat16) + lowered("cuda", jnp.bfloat16)


@pytest.mark.parametrize("what", [dict(width=16), dict(length=100), dict(precision="highest")])
def test_what_splash_does_not_take_goes_in_chunks(what):
    text = lowered("tpu", jnp.bfloat16, **what)
    assert "tpu_custom_call" not in text and "dot_general" in text


@dataclass
class FakeGpu:
    compute_capability: str
    device_kind: str = "NVIDIA Something"
    core_count: int = 100


def pretend(monkeypatch, capability):
    """A process that sees such a GPU; it is never asked to run anything."""
    here = jax.devices

    def devices(backend=None):
        return [FakeGpu(capability)] if backend == "cuda" else here(backend)

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "flash"),
    [
        (jnp.bfloat16, 128, "9.0", True),
        (jnp.float16, 64, "8.0", True),
        (jnp.bfloat16, 128, "10.0", True),
        (jnp.float32, 128, "9.0", False),
        (jnp.float16, 128, "7.5", False),
        (jnp.bfloat16, 256, "8.0", False),
        (jnp.bfloat16, 12, "9.0", False),
    ],
)
def test_cudnn_is_for_half_precision_on_gpus_that_have_it(monkeypatch, dtype, width, capability, flash):
    pretend(monkeypatch, capability)
    text = lowered("cuda", dtype, width)
    assert ("__cudnn$fmha" in text) == flash and ("dot_general" in text) != flash
    assert "__cudnn$fmha" not in lowered("cpu", dtype, width)


def test_rows_are_turned_for_cudnn(monkeypatch):
    """Its left padding, with the plain formula in cudnn's place, which sees no mask."""

    def stand_in(q, k, v, is_causal, implementation):
        assert is_causal and implementation == "cudnn"
        return attention.chunked_attention(q, k, v, None)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    for padding in ("none", "right", "left", "all"):
        parts, valid = qkv(17, 4, 2, 8), padded(17, padding, 5)
        assert_plain(jax.jit(attention.cudnn_attention)(*parts, valid), *parts, valid, atol=5e-6)


@pytest.mark.accelerator
@pytest.mark.parametrize("padding", ["none", "right", "left", "all"])
def test_the_accelerators_own_path(padding):
    """Whatever the device here has: forward and backward in bfloat16."""
    parts, valid = qkv(640, 8, 2, 128), padded(640, padding, 75)
    half = [jnp.asarray(x, jnp.bfloat16) for x in parts]
    rounded = [np.asarray(x, np.float32) for x in half]
    text = jax.jit(lambda *parts: attention.causal_attention(*parts)).lower(*half, valid).as_text()
    assert "__cudnn$fmha" in text or "tpu_custom_call" in text
    assert_plain(attention.causal_attention(*half, valid), *rounded, valid, atol=0.05)
    weigh = normal(*parts[0].shape, seed=9) * valid[..., None, None]
    total = lambda *parts: jnp.sum(attention.causal_attention(*parts, valid).astype(jnp.float32) * weigh)  # noqa: E731
    ours = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*half)
    for mine, expected in zip(ours, plain_gradients(*rounded, valid, weigh), strict=True):
        difference = np.asarray(mine, np.float32) - np.asarray(expected)
        assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(expected)


# ---- on a mesh

ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import llava_jax
from llava_jax.models.attention import causal_attention
mesh = llava_jax.make_mesh(data=2, tensor=4)
rng = np.random.default_rng(0)
for rows, kv_heads in ((2, 4), (1, 4), (2, 2)):  # both axes divide, one only
    q, k, v = (jnp.float32(rng.standard_normal((rows, 20, heads, 8))) for heads in (8, kv_heads, kv_heads))
    valid = jnp.arange(20) >= jnp.arange(rows)[:, None] * 3
    alone = causal_attention(q, k, v, valid)
    spec = PartitionSpec("data" if rows == 2 else None, None, "tensor" if kv_heads == 4 else None)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
        shared = causal_attention(*placed, valid)
        unmasked = causal_attention(*placed)
    assert shared.sharding.spec == spec, shared.sharding
    np.testing.assert_allclose(shared, alone, atol=1e-6)
    np.testing.assert_allclose(unmasked, causal_attention(q, k, v), atol=1e-6)
"""


def test_divided_over_a_mesh():
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env={**os.environ, **flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(jnp.bfloat16, "default"), pytest.param(jnp.float32, "highest", marks=pytest.mark.long)],
)
def test_splash_compiles_for_a_mesh_of_tpus(no_tpu, dtype, precision, backward):
    """Rows over `data`, heads over `tensor`, and nothing sent between the chips. Scores alone would be 1,152 MiB."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    mesh = Mesh(devices.reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def shape(heads, spec):
        return jax.ShapeDtypeStruct((2, 3072, heads, 128), dtype, sharding=NamedSharding(mesh, spec))

    over = PartitionSpec("data", None, "tensor")
    run = attention.causal_attention
    if backward:
        run = jax.grad(lambda *parts: jnp.sum(attention.causal_attention(*parts).astype(jnp.float32)), (0, 1, 2))
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        compiled = jax.jit(run).lower(shape(32, over), shape(8, over), shape(8, over)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == (3 if backward else 1)
    assert not any(sent in text for sent in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


# ---- positions that all see each other


def test_full_attention_is_the_plain_formula():
    q, k, v = qkv(17, 4, 4, 8)
    out, weights = attention.full_attention(q, k, v), attention.full_attention_weights(q, k)
    for row in range(2):
        np.testing.assert_allclose(
            out[row], plain_attention(q[row], k[row], v[row], np.ones((17, 17), bool)), atol=2e-6
        )
    np.testing.assert_allclose(jnp.einsum("bhqk,bkhd->bqhd", weights, v), out, atol=1e-6)


@pytest.mark.parametrize(("dtype", "capability", "flash"), [(jnp.bfloat16, "8.0", True), (jnp.float32, "9.0", False)])
def test_full_attention_by_cudnn(monkeypatch, dtype, capability, flash):
    pretend(monkeypatch, capability)
    part = jax.ShapeDtypeStruct((2, 577, 4, 64), dtype)  # the tower's positions
    traced = jax.jit(lambda *parts: attention.full_attention(*parts)).trace(part, part, part)
    assert ("__cudnn$fmha" in traced.lower(lowering_platforms=("cuda",)).as_text()) == flash
    assert "__cudnn$fmha" not in traced.lower(lowering_platforms=("cpu",)).as_text()


# ---- the whole matrix


def test_attention_weights_are_the_whole_matrix():
    q, k, v = normal(2, 5, 6, 4), normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    valid = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
    mask = attention.causal_mask(valid, 0, 5)
    weights = attention.attention_weights(q, k, mask)
    assert weights.shape == (2, 2, 3, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert np.all(np.asarray(weights)[~np.broadcast_to(mask[:, None, None], weights.shape)] == 0)
    np.testing.assert_allclose(
        attention.weighted_values(weights, v), attention.causal_attention(q, k, v, valid), atol=1e-6
    )
