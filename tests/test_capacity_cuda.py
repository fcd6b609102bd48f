"""Programs compiled for GPUs that are not there, with llava-jax[cuda-ahead], which .ci/run has in a folder apart."""

import jax
import jax.numpy as jnp
import pytest
from test_capacity import rewriting_loop, small

from llava_jax.capacity import cuda, traffic
from llava_jax.capacity.ahead import abstract_params, slice_mesh
from llava_jax.capacity.hlo import parse
from llava_jax.capacity.programs import Programs
from llava_jax.capacity.report import compiler_is_there
from llava_jax.capacity.roofline import GPUS, Precision
from llava_jax.capacity.traffic import Collectives, Watched
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import one_pool

pytestmark = [
    pytest.mark.usefixtures("no_tpu"),
    pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'"),
]


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_what_its_description_says(name):
    devices = slice_mesh(GPUS[name], tensor=GPUS[name].chips).devices.flatten()
    card = GPUS[name].card
    assert len(devices) == GPUS[name].chips
    assert {device.device_kind for device in devices} == {card.name}
    assert {device.compute_capability for device in devices} == {"{}.{}".format(*card.capability)}


def test_every_card_has_its_own_numbers():
    cards = [cuda.H100, cuda.A100, cuda.L4, cuda.RTX4090, cuda.T4]
    assert len({cuda.target_config(card) for card in cards}) == len(cards)


def test_a_cache_that_is_rewritten_is_seen():
    """1 s."""
    shape = (32, 4096, 1024)
    module = parse(rewriting_loop(slice_mesh(GPUS["h100"], tensor=1), shape))
    counts = traffic.whole_writes(module, Watched(set(), {"any": shape}))
    assert {section: count["any"] for section, count in counts.items()} == {"before": 0, "step": 1, "after": 0}
    (body,) = module.loops
    whole, slot = 4 * 32 * 4096 * 1024, 4 * 32 * 1024
    assert traffic.computation_traffic(module, body).moved == pytest.approx(3 * whole + 4 * slot, abs=100)


def test_below_an_ampere_there_is_no_bfloat16():
    config = small(LlavaConfig.preset("1.6-vicuna-7b"))
    for name, dtype in (("t4", jnp.float16), ("a100", jnp.bfloat16)):
        params = abstract_params(config, slice_mesh(GPUS[name], tensor=1))
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name, axes", [("h100", dict(tensor=1)), ("h100-8", dict(data=2, tensor=4))])
def test_programs_of_a_batch(name, axes):
    """Narrow, two layers: 30 s each."""
    config, shape = small(LlavaConfig.preset("1.6-vicuna-7b")), one_pool(axes.get("data", 1), 4, 1024, 4, 64, 64)
    of = Programs(config, slice_mesh(GPUS[name], **axes), shape, Precision())
    encode, decode = of.encode(), of.decode()
    for program in (encode, of.prefill(), of.questions(of.shape.blocks[0])):
        assert program.step is None and 1 < program.once.ratio < 100
    assert 1 < decode.step.ratio < 2
    assert decode.outputs < 1 << 20  # the suffix is written where it was
    alone = axes["tensor"] == 1
    assert encode.collectives == Collectives(0, 0, {} if alone else {"all-gather of features": 1})
    assert decode.collectives.decoder == (0 if alone else 2)
    assert not any(decode.whole_writes["step"].values())
