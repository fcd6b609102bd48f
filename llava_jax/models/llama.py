"""The Llama-family decoder. It keeps no cache: the caller gives each layer its attention, and gets back its state.

A batch is [B, L, E] in prefill and training, [G, R, L, E] after a shared prefix; layers take either as [B, N, E].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from llava_jax.config import TextConfig
from llava_jax.models.linear import Linear, is_less_than_int8_kernel
from llava_jax.models.ops import apply_rotary, rms_norm, rotary_embedding
from llava_jax.parallel.sharding import constrain_batch, constrain_sequence

# (q [..., L, H, D], k [..., L, K, D], v [..., L, K, D]) → (attended [..., L, H, D], anything to hand back)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, object]]


class LlamaRMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class LlamaAttention(nn.Module):
    """Projections and rotary positions around whatever attention the caller passes in."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, int8_products: bool):
        """x [B, N, E]; cos, sin [..., L, D], of the same positions → (output [B, N, E], what `attend` hands back)."""
        config = self.config

        def project(name: str, heads: int) -> jax.Array:
            linear = Linear(heads * config.head_dim, use_bias=config.attention_bias, name=name)
            out = linear(x, int8_products)
            # As one with the split into heads, a TPU copies the kernel into another layout; apart, what it made.
            if int8_products or (linear.is_int8 and is_less_than_int8_kernel(x)):
                out = jax.lax.optimization_barrier(out)
            return out.reshape(*cos.shape[:-1], heads, config.head_dim)

        q = apply_rotary(project("q_proj", config.num_attention_heads), cos, sin)
        k = apply_rotary(project("k_proj", config.num_key_value_heads), cos, sin)
        out, state = attend(q, k, project("v_proj", config.num_key_value_heads))
        out = out.reshape(*x.shape[:-1], -1)
        o_proj = Linear(config.hidden_size, use_bias=config.attention_bias, name="o_proj")
        return o_proj(out, int8_products), state


class LlamaMLP(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, int8_products: bool) -> jax.Array:
        wide = self.config.intermediate_size
        gate = Linear(wide, use_bias=False, name="gate_proj")(x, int8_products)
        up = Linear(wide, use_bias=False, name="up_proj")(x, int8_products)
        down_proj = Linear(self.config.hidden_size, use_bias=False, name="down_proj")
        return down_proj(jax.nn.silu(gate) * up, int8_products)


class LlamaDecoderLayer(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, int8_products: bool):
        eps = self.config.rms_norm_eps
        normed = constrain_batch(LlamaRMSNorm(eps, name="input_layernorm")(x))
        attended, state = LlamaAttention(self.config, name="self_attn")(normed, cos, sin, attend, int8_products)
        x = constrain_sequence(x + attended)
        normed = constrain_batch(LlamaRMSNorm(eps, name="post_attention_layernorm")(x))
        return constrain_sequence(x + LlamaMLP(self.config, name="mlp")(normed, int8_products)), state


class LlamaModel(nn.Module):
    """Embeddings, decoder layers, final norm and language-model head."""

    config: TextConfig
    remat: bool = False  # compute each layer again in the backward pass, instead of keeping what it computed
    int8_activations: bool = False  # where kernels are int8, all products are of int8 by int8, but for a step's

    def setup(self):
        config = self.config
        layer = nn.remat(LlamaDecoderLayer, static_argnums=(4, 5)) if self.remat else LlamaDecoderLayer
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        self.layers = [layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = LlamaRMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, use_bias=False)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        seq_len: jax.Array,
        max_seq_len: int,
        attends: Sequence[Attend],
        is_step: bool = False,
    ):
        """Run the layers.

        Args:
            x: embeddings [..., L, E].
            positions: int32 [..., L].
            seq_len, max_seq_len: int32 [...], each row's length so far, and its bound (for `dynamic` rope scaling).
            attends: one for each layer.
            is_step: of decoding, which waits for the kernels to be read, not for its products.

        Returns:
            (the normed last hidden state [..., L, E], what each layer's `attend` handed back,
            the hidden states as transformers lists them: embeddings, each layer's, the last one normed)
        """
        cos, sin = rotary_embedding(positions, self.config, seq_len, max_seq_len)
        shape, hidden_states, states = x.shape, [x], []
        x = x.reshape(len(x), -1, shape[-1])
        for layer, attend in zip(self.layers, attends, strict=True):
            x, state = layer(constrain_sequence(x), cos, sin, attend, self.int8_activations and not is_step)
            hidden_states.append(x.reshape(shape))
            states.append(state)
        hidden_states[-1] = self.norm(constrain_sequence(x)).reshape(shape)
        return hidden_states[-1], states, hidden_states

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., E] → float32 [..., V]."""
        tied = self.config.tie_word_embeddings
        return (self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)).astype("float32")
