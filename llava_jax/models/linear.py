"""The linear layer of the decoder, the tower and the projector."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.quantize import SCALE


class Linear(nn.Module):
    """x @ kernel + bias. An int8 kernel has a scale beside it, for the product (see `llava_jax.quantize`)."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] → [..., features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if not self.has_variable("params", SCALE):
            x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
            out = x @ kernel
            return out if bias is None else out + bias
        scale = self.get_variable("params", SCALE)
        out = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) * scale
        return (out if bias is None else out + bias).astype(x.dtype)
