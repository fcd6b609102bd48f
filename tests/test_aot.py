"""The jitted `generate` compiled ahead of time for a TPU that is not there (libtpu alone is needed)."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax.capacity.ahead import abstract_params, chip_bytes, compile_for, slice_mesh
from llava_jax.capacity.roofline import SLICES
from llava_jax.compiling import compiler_options
from llava_jax.config import LlavaConfig
from llava_jax.inference import generate
from llava_jax.inference.sampling import Greedy
from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import no_questions
from llava_jax.inputs.types import ProcessedImage
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM

MIB = 2**20


def compile_for_tpu(config, slots=128):
    """`generate` for one 672x672 picture (2,928 tokens) and its question, tensor-parallel over a v5e-8, bf16."""
    mesh = slice_mesh(SLICES["v5e-8"], data=1, tensor=8)
    params = abstract_params(config, mesh)
    row, size = np.array([1, *[5] * 34, -200, *[5] * 40]), config.tile_size
    batch = pack([row], [ProcessedImage(np.zeros((5, size, size, 3), np.uint8), (672, 672))], config)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=whole),
        (batch, no_questions(1), Greedy(), np.int32(slots)),
    )
    program = partial(generate.generate, LlavaLlamaForCausalLM(config), slots)
    return compile_for(
        mesh, jax.jit(program, keep_unused=True, compiler_options=compiler_options(mesh)), params, *arguments
    ), params


@pytest.mark.long  # test_attention.py compiles splash for TPUs every day, test_capacity.py a loop over a cache
@pytest.mark.parametrize("preset", ["1.6-vicuna-7b", "1.6-mistral-7b"])
def test_generate_compiles_for_a_tpu_and_copies_nothing_large(no_tpu, preset):
    """7B's widths, two decoder layers deep (each layer is the same program again)."""
    config = LlavaConfig.preset(preset)
    text = dataclasses.replace(config.text, num_hidden_layers=2)
    config = config.replace(text=text, vision=dataclasses.replace(config.vision, num_hidden_layers=3))
    compiled, params = compile_for_tpu(config)
    memory = compiled.executable.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(chip_bytes(params), rel=0.02, abs=8 * MIB)
    assert compiled.text.count('custom_call_target="tpu_custom_call"') == 2  # splash, one a layer
    assert memory.temp_size_in_bytes < 150 * MIB


if __name__ == "__main__":  # the whole of 7B: TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/test_aot.py
    report = compile_for_tpu(LlavaConfig.preset("1.6-vicuna-7b"))[0].executable.memory_analysis()
    print(f"arguments {report.argument_size_in_bytes / 2**30:.2f} GiB a chip, ", end="")
    print(f"temporaries {report.temp_size_in_bytes / 2**30:.2f} GiB a chip")
