"""GPUs that are not there, as XLA's compiler for CUDA wants to know them. It runs without one, and without a driver."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What a driver says of a card (as in the descriptions in XLA's own repository); a core is a multiprocessor."""

    name: str
    capability: tuple[int, int]  # compute capability
    memory: int  # bytes
    bandwidth: float  # bytes a second
    cores: int
    units: int  # for float32, of a core
    threads: int  # of a core
    shared_memory: int  # KiB of a core
    shared_memory_of_a_block: int  # KiB, at most
    l2: int  # MiB
    clock: float  # GHz


H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 84942979072, 3352.32e9, 132, 128, 2048, 228, 227, 50, 1.98)
# As a driver said and, its bandwidth, NVIDIA's data sheet; XLA has no description of it.
H200 = Card("NVIDIA H200", (9, 0), 150754820096, 4800e9, 132, 128, 2048, 228, 227, 60, 1.98)
A100 = Card("NVIDIA A100-SXM4-40GB", (8, 0), 42481549312, 1555e9, 108, 64, 2048, 164, 163, 40, 1.41)
L4 = Card("NVIDIA L4", (8, 9), 23659347968, 300.096e9, 58, 128, 1536, 100, 99, 48, 2.04)
RTX4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 25393692672, 1008.096e9, 128, 128, 1536, 100, 99, 72, 2.52)
T4 = Card("Tesla T4", (7, 5), 15655829504, 320.064e9, 40, 64, 1024, 64, 64, 4, 2.04)

CUDNN = (9, 10)


def target_config(card: Card) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    (major, minor), (cudnn, cudnn_minor) = card.capability, CUDNN
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared_memory << 10}
  threads_per_core_limit: {card.threads}
  core_count: {card.cores}
  fpus_per_core: {card.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth:.0f}
  l2_cache_size: {card.l2 << 20}
  clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory}
  shared_memory_per_block_optin: {card.shared_memory_of_a_block << 10}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn} minor: {cudnn_minor} patch: 0 }}
device_description_str: "{card.name}"
"""
