"""Which device a program is for: kernels are chosen by it, so that what is compiled ahead is what runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Compute capabilities by what stands in a device's kind, for GPUs that a program is compiled for without one.
COMPUTE_CAPABILITIES = {
    "T4": "7.5",
    "V100": "7.0",
    "A100": "8.0",
    "A10": "8.6",
    "L4": "8.9",
    "RTX 4090": "8.9",
    "H100": "9.0",
    "H200": "9.0",
    "B200": "10.0",
}

AMPERE = (8, 0)  # the first compute capability with bfloat16, and the first that Triton compiles for


@dataclass(frozen=True)
class Gpu:
    """What kernels are chosen by."""

    compute_capability: tuple[int, int]
    multiprocessors: int


def target_platform() -> str:
    """The platform that the program being traced is for: of the mesh of `jax.set_mesh`, or else this process's own."""
    wanted = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if wanted is None else wanted.platform


def target_gpu() -> Gpu | None:
    """The NVIDIA GPU that the program being traced is for; None where it is for none.

    That is the kind of GPU in the mesh of `jax.set_mesh`, or without a mesh this process's own.
    """
    wanted = jax.sharding.get_abstract_mesh().abstract_device
    own = _own_gpu()
    if own is not None and (wanted is None or wanted.device_kind == own.device_kind):
        return Gpu(_version(own.compute_capability), own.core_count)
    if wanted is None:
        return None
    words = wanted.device_kind.replace("-", " ")
    known = (capability for name, capability in COMPUTE_CAPABILITIES.items() if f" {name} " in f" {words} ")
    capability = next(known, None)
    return None if capability is None else Gpu(_version(capability), wanted.num_cores)


def half_precision(device: jax.Device) -> jnp.dtype:
    """What a device computes in at half the width of float32: float16 for an NVIDIA GPU before Ampere, else bfloat16.

    XLA has no bfloat16 there, and would make float32 of every weight at each step.
    """
    capability = str(getattr(device, "compute_capability", ""))
    nvidia = re.fullmatch(r"\d+\.\d+", capability)
    return jnp.dtype(jnp.float16 if nvidia and _version(capability) < AMPERE else jnp.bfloat16)


def default_dtype(device: jax.Device) -> jnp.dtype:
    """What parameters are loaded as where nothing else is asked for: float32 on a CPU, `half_precision` elsewhere."""
    return jnp.dtype(jnp.float32) if device.platform == "cpu" else half_precision(device)


def _own_gpu():
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:  # this process has none
        return None


def _version(text: str) -> tuple[int, int]:
    major, minor = map(int, text.split("."))
    return major, minor
