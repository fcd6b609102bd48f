"""The training step compiled ahead of time for TPU slices that are not there (libtpu alone is needed).

The whole of 7B, several minutes a stage:

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/test_train_aot.py [--rows 1 2 4]
"""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llava_jax.batch import Batch, Targets
from llava_jax.config import LlavaConfig
from llava_jax.models.llava import param_shapes
from llava_jax.sharding import param_shardings
from llava_jax.training.lora import init_lora
from llava_jax.training.optimizer import make_optimizer, split_params, trainable_pattern
from llava_jax.training.options import TrainOptions
from llava_jax.training.step import LORA, TrainState, batch_shardings
from llava_jax.training.train import compiled_step

GIB = 2**30
LENGTH = 3072  # 1.6's longest picture, 2,928 positions, and a conversation
SLICES = {  # stage: (topology, chips, mesh)
    "finetune": ("v5e:8x8", dict(fsdp=64)),
    "pretrain": ("v5e:2x4", dict(fsdp=8)),
    "lora": ("v5e:2x4", dict(fsdp=8)),
}


def compile_step(stage: str, config: LlavaConfig, rows: int):
    """The step of `rows` rows a chip, each a five-tile picture and a conversation with 256 labels: bf16, remat."""
    topology, axes = SLICES[stage]
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    options = TrainOptions(
        stage=stage, model_path="-", data_path="-", output_dir="-", bf16=True, per_device_train_batch_size=rows
    )
    state, frozen = _abstract_state(options, config, mesh)
    batch = _abstract_batch(config, rows, len(devices), mesh)
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        step = compiled_step(options, config, state, 1000, mesh).jitted
        return step.lower(state, frozen, *batch).compile(), (state, frozen)


def _abstract_state(options, config, mesh):
    trained, frozen = split_params(param_shapes(config), trainable_pattern(options.stage, config))
    if options.stage == "lora":
        trained[LORA] = jax.eval_shape(lambda: init_lora(frozen, 128, jax.random.key(0)))

    def start(trained):
        return TrainState(trained, make_optimizer(options, 1000).init(trained), jnp.int32(0))

    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    return tuple(_placed(tree, param_shardings(tree, mesh)) for tree in (jax.eval_shape(start, trained), frozen))


def _abstract_batch(config, rows, chips, mesh):
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    total, side = rows * chips, config.tile_size
    batch = Batch(
        tiles=jax.ShapeDtypeStruct((5 * total, side, side, 3), jnp.uint8),
        text_ids=ints(chips, 256 * rows),
        index=ints(total, LENGTH),
        position_ids=ints(total, LENGTH),
        attention_mask=jax.ShapeDtypeStruct((total, LENGTH), bool),
        labels=ints(total, LENGTH),
        lengths=ints(total),
    )
    targets = Targets(ints(total, 256), ints(total, 256))
    return _placed((batch, targets), batch_shardings(batch, targets, mesh))


def _placed(tree, shardings):
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def bytes_per_chip(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("stage", SLICES)
def test_a_step_of_7b_compiles_for_its_slice(stage, monkeypatch):
    """7B's widths, two decoder layers deep: what each chip holds is its share, and no logits of all positions exist."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    config = LlavaConfig.preset("1.6-vicuna-7b")
    text = dataclasses.replace(config.text, num_hidden_layers=2)
    config = config.replace(text=text, vision=dataclasses.replace(config.vision, num_hidden_layers=3))
    compiled, held = compile_step(stage, config, 1)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(bytes_per_chip(held), rel=0.05, abs=32 * 2**20)
    assert memory.temp_size_in_bytes < 4 * GIB
    assert f"{LENGTH},{config.text.vocab_size}]" not in compiled.as_text()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", nargs="+", default=list(SLICES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4])
    args = parser.parse_args()
    for stage in args.stages:
        for rows in args.rows:
            try:
                report = compile_step(stage, LlavaConfig.preset("1.6-vicuna-7b"), rows)[0].memory_analysis()
            except jax.errors.JaxRuntimeError as error:
                print(
                    f"{stage} on {SLICES[stage][0]}, {rows} rows a chip: does not fit ({str(error)[:200]})", flush=True
                )
                break
            held, spare = report.argument_size_in_bytes / GIB, report.temp_size_in_bytes / GIB
            print(
                f"{stage} on {SLICES[stage][0]}, {rows} rows a chip: {held:.2f} GiB held, {spare:.2f} GiB more",
                flush=True,
            )
