"""The linear layer of the decoder, the tower and the projector."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models.quantize import SCALE, to_int8
from llava_jax.parallel.sharding import row_shards
from llava_jax.parallel.target import AMPERE, target_gpu, target_platform


class Linear(nn.Module):
    """x @ kernel + bias. An int8 kernel has a scale beside it, for the product (see `llava_jax.models.quantize`)."""

    features: int
    use_bias: bool = True

    @property
    def is_int8(self) -> bool:
        return self.has_variable("params", SCALE)

    @nn.compact
    def __call__(self, x: jax.Array, int8_product: bool = False) -> jax.Array:
        """x [..., in] → [..., features]; `int8_product`: where the kernel is int8, x becomes int8 too, row by row."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if not self.is_int8:
            x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
            out = _product(x, kernel, jnp.matmul)
            return out if bias is None else out + bias
        if int8_product:
            rows = to_int8(x, -1)
            out = _product(rows.values, kernel, _matmul_int8) * rows.scale[..., None]
        else:
            out = _product(x, kernel, _matmul_at_once, cpu=_matmul_in_strips, **_for_old_gpus(x))
        out = out * self.get_variable("params", SCALE)
        return (out if bias is None else out + bias).astype(x.dtype)


FEW_ROWS = 512  # on each device: up to about here, a TPU takes longer to read a kernel than to multiply by it
MATRIX_UNIT_ROWS = 8  # fewer XLA multiplies on a TPU's vector unit, which takes longer than reading the other factor


def _rows(x) -> int:
    """On each device, of x [..., in]."""
    return math.prod(x.shape[:-1]) // row_shards(x.shape[0])


def is_less_than_int8_kernel(x: jax.Array) -> bool:
    """Whether this is for a TPU, and what an int8 kernel [in, out] makes of x [..., in] is smaller than the kernel: one
    of them is copied where heads are split. Not so of few rows, whose products are apart from that already."""
    rows = _rows(x)
    return target_platform() == "tpu" and rows >= FEW_ROWS and rows * x.dtype.itemsize < x.shape[-1]


def _product(x, kernel, matmul, **platforms):
    """x [..., in] by kernel [in, out], by `matmul` where `platforms` has nothing else."""
    rows = _rows(x)
    if target_platform() == "tpu" and rows < FEW_ROWS:
        return matmul_few_rows(matmul, rows, x, kernel)
    return jax.lax.platform_dependent(x, kernel, default=matmul, **platforms) if platforms else matmul(x, kernel)


def matmul_few_rows(matmul, rows: int, x, kernel):
    """`matmul` on a TPU, apart from what splits its result into heads: as one, they want the kernel in another layout,
    and copy all of it."""
    count = x.shape[-2]
    if rows < MATRIX_UNIT_ROWS:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, MATRIX_UNIT_ROWS - count), (0, 0)])
    out = jax.lax.optimization_barrier(matmul(x.reshape(-1, x.shape[-1]), kernel))
    return out.reshape(*x.shape[:-1], -1)[..., :count, :]


def _matmul_int8(x, kernel):
    """int8 x [..., in] @ int8 kernel [in, out], exactly, in int32: it holds the sum of 133,000 products."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.int32)


def _matmul_at_once(x, kernel):
    """x [..., in] @ int8 kernel [in, out] in float32."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _for_old_gpus(x) -> dict[str, Callable]:
    """A single row on a GPU before Ampere, for which XLA would write the whole kernel to memory as float32."""
    gpu = target_gpu()
    one_row = math.prod(x.shape[:-1]) == 1
    return {"cuda": matmul_of_one_row} if one_row and gpu is not None and gpu.compute_capability < AMPERE else {}


def matmul_of_one_row(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One x [..., in] @ int8 kernel [in, out] in float32, as a sum that reads the kernel as it is."""
    return jnp.sum(x[..., None].astype(jnp.float32) * kernel.astype(jnp.float32), axis=-2)


def _matmul_in_strips(x, kernel):
    """A few outputs after another: a CPU converts a kernel before the product, and would keep all of them converted."""
    strips = next(n for n in (16, 8, 4, 2, 1) if kernel.shape[1] % n == 0)
    width = kernel.shape[1] // strips

    def strip(i):
        return _matmul_at_once(x, jax.lax.dynamic_slice_in_dim(kernel, i * width, width, axis=1))

    return jnp.moveaxis(jax.lax.map(strip, jnp.arange(strips)), 0, -2).reshape(*x.shape[:-1], -1)
