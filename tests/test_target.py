"""Which GPU a program is for: of a mesh, here or not, or this process's own."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from test_attention import FakeGpu, pretend

from llava_jax import make_mesh
from llava_jax.parallel.target import Gpu, half_precision, target_gpu


def gpu_mesh(kind, multiprocessors):
    gpu = AbstractDevice(device_kind=kind, num_cores=multiprocessors, platform="gpu")
    return use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=gpu))


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA A100-SXM4-40GB", (8, 0)),
        ("NVIDIA A10", (8, 6)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("Tesla T4", (7, 5)),
    ],
)
def test_the_gpu_of_a_mesh_that_is_not_here(kind, capability):
    with gpu_mesh(kind, 100):
        assert target_gpu() == Gpu(capability, 100)


def test_a_gpu_that_nobody_knows_gets_no_kernels():
    with gpu_mesh("NVIDIA Something", 100):
        assert target_gpu() is None


def test_this_process_has_a_gpu(monkeypatch):
    """It is asked itself; a mesh of others is asked for what is in it."""
    assert target_gpu() is None
    pretend(monkeypatch, "12.0")
    assert target_gpu() == Gpu((12, 0), 100)
    with gpu_mesh("NVIDIA Something", 100):
        assert target_gpu() == Gpu((12, 0), 100)
    with gpu_mesh("NVIDIA L4", 58):
        assert target_gpu() == Gpu((8, 9), 58)
    with jax.set_mesh(make_mesh(data=1)):
        assert target_gpu() is None


@pytest.mark.parametrize(
    ("capability", "dtype"), [("7.5", "float16"), ("8.0", "bfloat16"), ("12.0", "bfloat16"), ("gfx942", "bfloat16")]
)
def test_half_precision_of_a_gpu(capability, dtype):
    assert half_precision(FakeGpu(capability)) == dtype


def test_half_precision_of_another_chip():
    assert half_precision(jax.devices()[0]) == "bfloat16"
