"""On a real GPU or TPU: `JAX_PLATFORMS=cuda pytest -m accelerator` (or tpu). Left out of the default run."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.accelerator


@pytest.mark.parametrize("variant, name", [("vicuna", "chelsea"), ("mistral", "astronaut"), ("s2", "coffee")])
def test_recorded_tokens_and_logits(golden, model, pictures, variant, name):
    """Float32 at the highest precision; looser than on a CPU, whose sums the reference shares."""
    assert jax.default_backend() != "cpu"
    recorded, (llava, params) = golden(variant), model(variant)
    ids, picture = recorded["image/input_ids"], pictures[name]
    logits = llava.forward(params, ids, picture).logits[0, -1]
    np.testing.assert_allclose(logits[::11], recorded[f"image/{name}/logits_last"], atol=1e-3)
    tokens = llava.generate_tokens(params, ids, picture, max_new_tokens=16)
    assert tokens.tolist() == recorded[f"image/{name}/generated"].tolist()


def test_bfloat16_is_the_default_there(converted, pictures):
    import llava_jax

    llava, params = llava_jax.load(converted("vicuna"))
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(params))
    assert llava.generate(params, pictures["chelsea"], "What is it?", max_new_tokens=8)
