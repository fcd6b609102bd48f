"""The training step compiled ahead of time for TPU slices that are not there (libtpu alone is needed).

The whole of 7B, some ten minutes for each line of its report:

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/test_train_aot.py [--stages finetune] [--rows 1 2 4]
"""

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llava_jax.capacity.ahead import chip_bytes
from llava_jax.config import LlavaConfig
from llava_jax.inputs.types import Batch, Targets
from llava_jax.models.llava_llama import param_shapes
from llava_jax.parallel.sharding import batch_sharding, constrain_batch, param_shardings
from llava_jax.training.lora import init_lora
from llava_jax.training.optimizer import make_optimizer, split_params, trainable_pattern
from llava_jax.training.step import LORA, TrainState, train_step
from llava_jax.training.train import compiled_step
from llava_jax.training.train_options import TrainOptions

MIB, GIB = 2**20, 2**30
LENGTH = 3072  # 1.6's longest picture, 2,928 positions, and a conversation
LABELS = 256
SLICES = {"finetune": "v5e:8x8", "pretrain": "v5e:2x4", "lora": "v5e:2x4"}  # chips of 16 GiB


def chips(stage: str) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[stage]).devices
    return Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))


def options_of(stage: str, rows: int) -> TrainOptions:
    lora = dict(lora_r=128, lora_alpha=256)
    paths = dict.fromkeys(("model_path", "data_path", "output_dir"), "-")
    return TrainOptions(stage=stage, bf16=True, per_device_train_batch_size=rows, **lora, **paths)


def compile_step(stage: str, config: LlavaConfig, rows: int):
    """The step of `rows` rows a chip, each a five-tile picture and a conversation, fsdp over all chips: bf16, remat.

    Returns:
        (compiled, the state and the frozen parameters that it takes)
    """
    mesh, options = chips(stage), options_of(stage, rows)
    optimizer = make_optimizer(options, 1000)
    held = _abstract_state(options, config, mesh, optimizer)
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):  # "highest" has no splash in bf16
        step = compiled_step(options, config, held[0], optimizer, mesh).jitted
        return step.lower(*held, *_abstract_batch(config, rows, mesh)).compile(), held


def _abstract_state(options, config, mesh, optimizer):
    trained, frozen = split_params(param_shapes(config), trainable_pattern(options.stage, config))
    if options.stage == "lora":
        trained[LORA] = jax.eval_shape(lambda: init_lora(frozen, options.lora_r, jax.random.key(0)))

    def start(trained):
        return TrainState(trained, optimizer.init(trained), jnp.int32(0))

    state = jax.eval_shape(start, trained)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, options.dtype), frozen)
    return _placed((state, frozen), param_shardings((state, frozen), mesh))


def _abstract_batch(config, rows, mesh):
    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    total, side = rows * mesh.size, config.tile_size
    batch = Batch(
        tiles=array(5 * total, side, side, 3, dtype=jnp.uint8),
        text_ids=array(mesh.size, rows * LABELS),
        gather_indices=array(total, LENGTH),
        position_ids=array(total, LENGTH),
        attention_mask=array(total, LENGTH, dtype=bool),
        lengths=array(total),
    )
    targets = Targets(array(total, LABELS), array(total, LABELS))
    return _placed((batch, targets), jax.tree.map(lambda _: batch_sharding(mesh), (batch, targets)))


def _placed(tree, shardings):
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def narrow(config: LlavaConfig) -> LlavaConfig:
    """The same lengths, tiles and vocabulary, with few and narrow layers."""
    text = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=4, num_key_value_heads=4)
    vision = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, num_hidden_layers=2)
    return config.replace(
        text=dataclasses.replace(config.text, num_hidden_layers=2, **text),
        vision=dataclasses.replace(config.vision, **vision),
        mm_hidden_size=128,
    )


@pytest.mark.parametrize("stage", SLICES)
def test_all_that_is_held_of_7b_is_divided(stage, no_tpu):
    """But for norms, biases, image_newline and the tower's embeddings, which together are under 3 MiB."""
    config = LlavaConfig.preset("1.6-vicuna-7b")
    mesh = chips(stage)
    options = options_of(stage, 1)
    held = _abstract_state(options, config, mesh, make_optimizer(options, 1000))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert chip_bytes(held) == pytest.approx(whole / mesh.size, abs=8 * MIB)


@pytest.mark.long
def test_a_chip_works_on_its_own_rows(no_tpu):
    """What finetune makes on one of 64 chips: activations of its row, a layer's weights, no logits of all positions."""
    config = narrow(LlavaConfig.preset("1.6-vicuna-7b"))
    compiled, held = compile_step("finetune", config, 1)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(chip_bytes(held), abs=4 * MIB)
    assert memory.temp_size_in_bytes < 200 * MIB
    assert f"{LENGTH},{config.text.vocab_size}]" not in compiled.as_text()


@pytest.mark.long
def test_a_chip_keeps_its_slices_of_the_gradients_alone(no_tpu):
    """Eight kernels of 32 MiB in bfloat16: no chip has the gradients of all of them whole."""
    mesh, options, width = chips("finetune"), options_of("finetune", 1), 4096
    optimizer = make_optimizer(options, 1000)

    def loss(trained, frozen, x, targets, step):
        for layer in trained.values():
            x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w.astype(x.dtype)))(
                constrain_batch(x), layer["up_proj"]["kernel"]
            )
        return jnp.mean(x.astype(jnp.float32) ** 2)

    def start():
        trained = {f"layers_{i}": {"up_proj": {"kernel": jnp.zeros((width, width))}} for i in range(8)}
        return TrainState(trained, optimizer.init(trained), jnp.int32(0))

    state = jax.eval_shape(start)
    state = _placed(state, param_shardings(state, mesh))
    x = _placed(jax.ShapeDtypeStruct((128 * mesh.size, width), jnp.bfloat16), batch_sharding(mesh))
    step = jax.jit(partial(train_step, loss, optimizer), out_shardings=(param_shardings(state, mesh), None))
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        memory = step.lower(state, {}, x, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 200 * MIB


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", nargs="+", default=list(SLICES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4])
    args = parser.parse_args()
    for stage in args.stages:
        for rows in args.rows:
            print(f"{stage} on {SLICES[stage]}, {rows} rows a chip: ", end="", flush=True)
            try:
                memory = compile_step(stage, LlavaConfig.preset("1.6-vicuna-7b"), rows)[0].memory_analysis()
            except jax.errors.JaxRuntimeError as error:
                print(f"does not fit ({str(error)[:200]})", flush=True)
                break
            given, made = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
            code = memory.generated_code_size_in_bytes / GIB
            print(f"{given:.2f} GiB of arguments, {made:.2f} of temporaries, {code:.2f} of program a chip", flush=True)
