"""On which mesh a TPU slice answers 16 questions about each picture soonest, by libtpu's estimate (no measurement).

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/benchmarks/meshes.py v6e-8      # two to five minutes a mesh

A whole 7B in bfloat16, prefixes of 3,072 positions in batches as large as fit, questions of 64, answers of four steps
more. Of each program two layers and three are compiled, and the difference is taken for every further layer (of the
last layer, prefill computes no more than k and v). Collectives, which libtpu gives no cycles, are added by the
bandwidth of two links. Printed: ms of the whole slice for one picture.
"""

from __future__ import annotations

import dataclasses
import sys

from llava_jax.capacity.ahead import chip_bytes, slice_mesh
from llava_jax.capacity.programs import Programs
from llava_jax.capacity.report import default_axes
from llava_jax.capacity.roofline import SLICES, Precision, works
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import BatchShape, one_pool
from llava_jax.inputs.groups import MAX_GROUPS

CONFIG, PRECISION = LlavaConfig.preset("1.6-vicuna-7b"), Precision()
STEPS = 4
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # Hz, by which their peaks are whole products


def shallow(layers: int) -> LlavaConfig:
    """That many layers of the decoder, and as many of the tower that are run."""
    text = dataclasses.replace(CONFIG.text, num_hidden_layers=layers)
    return CONFIG.replace(text=text, vision=dataclasses.replace(CONFIG.vision, num_hidden_layers=layers + 1))


def batch(shards: int, per_shard: int) -> BatchShape:
    return one_pool(shards, per_shard, 3072, 16, 64, 128)


def cycles(of: Programs) -> dict[str, int]:
    """Of each program."""
    encode, prefill, question = of.encode(), of.prefill(), of.questions(of.shape.blocks[0])
    step = of.decode().step
    return dict(encode=encode.once.cycles, prefill=prefill.once.cycles, question=question.once.cycles, step=step.cycles)


def milliseconds(name: str, axes: dict[str, int]) -> dict[str, float]:
    """Of the whole slice for one picture, by program; {} where not one prefix fits."""
    where, tensor, shards = SLICES[name], axes["tensor"], axes["data"]
    whole = Programs(CONFIG, slice_mesh(where, **axes), batch(shards, 1), PRECISION)
    groups = min(MAX_GROUPS, int((where.chip.hbm - chip_bytes(whole.params)) // whole.cache_bytes))
    if groups < 1:
        return {}
    shape = batch(shards, groups)
    two, three = (cycles(dataclasses.replace(whole, shape=shape, config=shallow(layers))) for layers in (2, 3))
    out = {}
    for program, work in works(CONFIG, shape, tensor, PRECISION).items():
        layers = CONFIG.vision.num_hidden_layers - 1 if program == "encode" else CONFIG.text.num_hidden_layers
        estimate = two[program] + (layers - 2) * (three[program] - two[program])
        pictures = shards * (groups if program == "step" else 1)
        seconds = estimate / CLOCKS[name.split("-")[0]] + work.reducing_seconds(where.chip, tensor)
        out[program] = 1000 * seconds / pictures
    out["step"] *= STEPS
    return out


def main(names: list[str]) -> None:
    print(f"| | mesh | encode | prefill | questions | {STEPS} steps | sum |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in names:
        chips, default = SLICES[name].chips, default_axes(CONFIG, SLICES[name], PRECISION)
        for tensor in (n for n in range(1, chips + 1) if chips % n == 0):
            axes = {"data": chips // tensor, "tensor": tensor}
            took = milliseconds(name, axes)
            cells = [f"{ms:.1f}" for ms in (*took.values(), sum(took.values()))] if took else ["does not fit"]
            mesh = f"data={chips // tensor},tensor={tensor}" + (" (default)" if axes == default else "")
            print(f"| {name} | {mesh} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
