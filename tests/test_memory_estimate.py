"""What a wave of questions is planned to take, against what the compilers say that its programs take."""

import jax
import pytest
from test_ceilings import PREFIX, QUESTION, SLOTS, prefixes, shallow

from llava_jax.capacity.programs import Programs, chip_bytes, slice_mesh
from llava_jax.capacity.report import compiler_is_there
from llava_jax.capacity.roofline import TOPOLOGIES, Precision, Shapes
from llava_jax.config import LlavaConfig
from llava_jax.inference.engine import Engine
from llava_jax.inputs.groups import MemoryEstimate
from llava_jax.parallel.sharding import num_batch_shards

pytestmark = pytest.mark.usefixtures("no_tpu")
ROWS = 16
GPU = pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'")


def programs(topology: str, axes: dict[str, int], preset: str, layers: int, int8_prefix: bool = False) -> Programs:
    config, mesh = shallow(LlavaConfig.preset(preset), layers), slice_mesh(TOPOLOGIES[topology], **axes)
    return Programs(config, mesh, Shapes(PREFIX, ROWS, QUESTION, SLOTS), Precision(int8_prefix=int8_prefix))


def estimate(of: Programs) -> MemoryEstimate:
    with jax.default_matmul_precision("default"):  # as programs are compiled: "highest" has no splash in bfloat16
        layout = Engine(of.config, of.mesh, of.precision.int8_prefix).cache_layout(of.params())
    assert not layout.keeps_scores
    return MemoryEstimate(of.config, layout, PREFIX, QUESTION, SLOTS)


@pytest.mark.parametrize(
    "topology, axes, preset, int8_prefix",
    [
        pytest.param("h100", {"tensor": 1}, "1.6-vicuna-7b", False, marks=GPU),
        pytest.param("h100", {"tensor": 1}, "1.6-mistral-7b", True, marks=GPU),
        pytest.param("v5e-4", {"data": 2, "tensor": 2}, "1.6-vicuna-7b", False, marks=pytest.mark.long),
    ],
)
def test_answering_is_within_a_tenth(topology, axes, preset, int8_prefix):
    """Eight layers, for activations, which are there once, weigh more beside fewer."""
    of = programs(topology, axes, preset, 8, int8_prefix)
    estimated = estimate(of).bytes(8 // num_batch_shards(of.mesh), ROWS)
    prefix, last_hidden = prefixes(of, 8)
    answer = of.answer(8, (prefix, last_hidden))
    compiled = chip_bytes(prefix) + answer.temporaries + answer.outputs
    assert estimated == pytest.approx(compiled, rel=0.1)


@GPU
def test_prefill_is_within_a_tenth():
    of = programs("h100", {"tensor": 1}, "1.6-vicuna-7b", 2)
    prefill = of.once()[0]["prefill"]
    few = MemoryEstimate(of.config, estimate(of).layout, PREFIX, 1, 1)
    assert few.bytes(1, 1) == pytest.approx(prefill.outputs + prefill.temporaries, rel=0.1)
