"""CLIP's vision tower: one scale (`CLIPVisionTower`) or several (`CLIPVisionTowerS2`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.models.attention import full_attention, full_attention_weights
from llava_jax.models.linear import Linear
from llava_jax.models.ops import divide_exactly, quick_gelu
from llava_jax.parallel.sharding import constrain_rows, each_its_own


def normalize_tiles(tiles: jax.Array, config: VisionConfig, dtype=jnp.float32) -> jax.Array:
    """uint8 tiles [T, S, S, 3] to CLIPImageProcessor's pixel values, (x / 255 - mean) / std, to the last bit."""
    mean, std = np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
    scaled = divide_exactly(tiles.astype(jnp.float32), np.array([255.0], np.float32))
    return divide_exactly(scaled - mean, std).astype(dtype)


class CLIPVisionEmbeddings(nn.Module):
    """Patches (a convolution without bias, as one product), the class token in front, learned positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [T, S, S, 3] → [T, 1 + N, E]."""
        config, size, side = self.config, self.config.patch_size, self.config.num_patches_per_side
        normal = nn.initializers.normal(0.02)
        kernel = PatchKernel(config, name="patch_embedding")()
        class_embedding = self.param("class_embedding", normal, (config.hidden_size,))
        positions = self.param("position_embedding", normal, (config.num_patches + 1, config.hidden_size))
        pixels = pixels[:, : side * size, : side * size].astype(kernel.dtype)
        patches = pixels.reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(len(pixels), config.num_patches, -1) @ kernel.reshape(-1, config.hidden_size)
        first = jnp.broadcast_to(class_embedding, (len(pixels), 1, config.hidden_size))
        return jnp.concatenate([first, patches], axis=1) + positions


class PatchKernel(nn.Module):
    """The patch convolution's weight, [patch, patch, 3, E]."""

    config: VisionConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        size = self.config.patch_size
        return self.param("kernel", nn.initializers.normal(0.02), (size, size, 3, self.config.hidden_size))


class CLIPAttention(nn.Module):
    """Full self-attention with biases."""

    config: VisionConfig

    def setup(self):
        width = self.config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, 1 + N, E] → the same shape."""
        v = self._heads(self.v_proj(x))
        return self.out_proj(full_attention(*self._queries_keys(x), v).reshape(x.shape))

    def weights(self, x: jax.Array) -> jax.Array:
        """What each position looks at, float32 [T, H, 1 + N, 1 + N]."""
        return full_attention_weights(*self._queries_keys(x))

    def _queries_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._heads(self.q_proj(x)), self._heads(self.k_proj(x))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, -1)


class CLIPMLP(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(self.config.intermediate_size, name="fc1")(x)
        exact_gelu = self.config.hidden_act == "gelu"
        hidden = jax.nn.gelu(hidden, approximate=False) if exact_gelu else quick_gelu(hidden)
        return Linear(self.config.hidden_size, name="fc2")(hidden)


def _layer_norm(config: VisionConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False)


class CLIPEncoderLayer(nn.Module):
    config: VisionConfig

    def setup(self):
        self.layer_norm1, self.layer_norm2 = _layer_norm(self.config), _layer_norm(self.config)
        self.self_attn, self.mlp = CLIPAttention(self.config), CLIPMLP(self.config)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def attention_weights(self, x: jax.Array) -> jax.Array:
        """Those of its self-attention, float32 [T, H, 1 + N, 1 + N]."""
        return self.self_attn.weights(self.layer_norm1(x))


class CLIPVisionTower(nn.Module):
    """CLIP ViT up to the selected layer (llava's CLIPVisionTower): later layers and the post-norm are never run."""

    config: LlavaConfig

    @property
    def hidden_size(self) -> int:
        """Channels of a feature, known without weights."""
        return self.config.feature_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.vision.num_patches_per_side

    @property
    def num_patches(self) -> int:
        return self.config.vision.num_patches

    @property
    def dummy_feature(self) -> jax.Array:
        """Zeros [1, hidden_size]."""
        return jnp.zeros((1, self.hidden_size))

    def setup(self):
        vision = self.config.vision
        self.embeddings = CLIPVisionEmbeddings(vision)
        self.pre_layrnorm = _layer_norm(vision)
        self.layers = [CLIPEncoderLayer(vision) for _ in range(vision.num_hidden_layers)]
        self.post_layernorm = _layer_norm(vision)

    def hidden_state(self, pixels: jax.Array) -> jax.Array:
        """pixels [T, S, S, 3] → the selected hidden state [T, 1 + N, E]; -1 is the last layer, 0 the embeddings."""
        count = len(self.layers)
        selected = self.config.mm_vision_select_layer
        selected = selected + count + 1 if selected < 0 else selected
        # init makes every parameter that a checkpoint holds, run or not
        runs = count if self.is_initializing() else selected
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.layers[:runs]:
            x = layer(constrain_rows(x))
        if self.is_initializing():
            self.post_layernorm(x[:, 0])
        return x

    def attention_weights(self, tiles: jax.Array, layer: int) -> jax.Array:
        """uint8 tiles [T, S, S, 3] → a layer's attention, float32 [T, H, 1 + N, 1 + N]; those after it are not run."""
        x = self.pre_layrnorm(self.embeddings(normalize_tiles(tiles, self.config.vision)))
        for block in self.layers[:layer]:
            x = block(x)
        return self.layers[layer].attention_weights(x)

    def feature_select(self, pixels: jax.Array) -> jax.Array:
        """pixels [T, S, S, 3] → [T, N, E], with the class token in front for `cls_patch`."""
        features = self.hidden_state(pixels)
        return features[:, 1:] if self.config.mm_vision_select_feature == "patch" else features

    def __call__(self, tiles: jax.Array) -> jax.Array:
        """uint8 tiles [T, S, S, 3] → features [T, tokens_per_tile, hidden_size]."""
        return self.feature_select(normalize_tiles(tiles, self.config.vision))


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """float32 [size_out, size_in]: PyTorch's bicubic (a = -0.75, half-pixel centres, no antialias, clamped edges)."""
    position = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    left = np.floor(position)
    matrix = np.zeros((size_out, size_in))
    for tap in (-1, 0, 1, 2):
        x, a = np.abs(position - left - tap), -0.75
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        column = np.clip(left + tap, 0, size_in - 1).astype(int)
        np.add.at(matrix, (np.arange(size_out), column), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


class CLIPVisionTowerS2(CLIPVisionTower):
    """Several scales of one large square, their features side by side (S², arXiv:2403.13043; s2wrapper.forward)."""

    def at_scale(self, pixels: jax.Array, scale: int) -> jax.Array:
        """Resize to `scale`, run the tower on each base-size tile, put the tiles together, average to the base grid."""
        config, count = self.config, len(pixels)
        base, side = config.vision.image_size, config.vision.num_patches_per_side
        n = scale // base
        resize = bicubic_matrix(pixels.shape[1], scale)
        pixels = jnp.einsum("yh,thwc,xw->tyxc", resize, pixels, resize)
        pixels = pixels.reshape(count, n, base, n, base, 3).transpose(0, 1, 3, 2, 4, 5)
        features = each_its_own(self.feature_select, pixels.reshape(count * n * n, base, base, 3))
        features = features.reshape(count, n, n, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
        blocks = features.reshape(count, side, n, side, n, -1)
        averaged = blocks.mean(axis=(2, 4), dtype=jnp.float32).astype(features.dtype)
        return averaged.reshape(count, side * side, -1)

    def __call__(self, tiles: jax.Array) -> jax.Array:
        """uint8 squares [T, S, S, 3] of the largest scale → features [T, N, hidden_size · scales]."""
        pixels = normalize_tiles(tiles, self.config.vision)
        return jnp.concatenate([self.at_scale(pixels, scale) for scale in self.config.s2_scales], axis=-1)


def build_vision_tower(config: LlavaConfig) -> CLIPVisionTower:
    """The tower that the config asks for: S2 where `s2` is set."""
    return CLIPVisionTowerS2(config) if config.s2 else CLIPVisionTower(config)
