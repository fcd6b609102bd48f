"""On which mesh a TPU slice answers 16 questions about each picture soonest, by libtpu's estimate (no measurement).

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/benchmarks/meshes.py v6e-8      # two to five minutes a mesh

A whole 7B in bfloat16, prefixes of 3,072 positions in waves as large as fit, questions of 64, answers of four steps
more. Of each program one layer and two are compiled, and the difference is taken for every further layer. Collectives,
which libtpu gives no cycles, are added by the bandwidth of two links. Printed: ms of the whole slice for one picture.
"""

from __future__ import annotations

import dataclasses
import sys

from llava_jax.capacity.programs import Programs, most_groups, slice_mesh
from llava_jax.capacity.report import default_axes
from llava_jax.capacity.roofline import SLICES, Precision, Shapes, works
from llava_jax.config import LlavaConfig
from llava_jax.inputs.groups import MAX_GROUPS
from llava_jax.parallel.sharding import num_batch_shards

CONFIG, PRECISION, SHAPES = LlavaConfig.preset("1.6-vicuna-7b"), Precision(), Shapes(3072, 16, 64, 128)
STEPS = 4
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # Hz, by which their peaks are whole products


def shallow(layers: int) -> LlavaConfig:
    """That many layers of the decoder, and as many of the tower that are run."""
    text = dataclasses.replace(CONFIG.text, num_hidden_layers=layers)
    return CONFIG.replace(text=text, vision=dataclasses.replace(CONFIG.vision, num_hidden_layers=layers + 1))


def cycles(of: Programs, groups: int) -> dict[str, int]:
    """Of each program, `groups` prefixes on each shard; prefill without the tower."""
    once, prefixes = of.once()
    groups *= num_batch_shards(of.mesh)
    question, state = of.question(groups, prefixes)
    encode, prefill = once["encode"].once.cycles, once["prefill"].once.cycles
    step = of.decode(groups, prefixes, state).step.cycles
    return dict(encode=encode, prefill=prefill - encode, question=question.once.cycles, step=step)


def milliseconds(name: str, axes: dict[str, int]) -> dict[str, float]:
    """Of the whole slice for one picture, by program; {} where not one prefix fits."""
    where, tensor = SLICES[name], axes["tensor"]
    whole = Programs(CONFIG, slice_mesh(where, **axes), SHAPES, PRECISION)
    groups = min(MAX_GROUPS, most_groups(whole, where.chip.hbm))
    if groups < 1:
        return {}
    one, two = (cycles(dataclasses.replace(whole, config=shallow(layers)), groups) for layers in (1, 2))
    out = {}
    for program, work in works(CONFIG, SHAPES, groups, tensor, PRECISION).items():
        layers = CONFIG.vision.num_hidden_layers - 1 if program == "encode" else CONFIG.text.num_hidden_layers
        estimate = one[program] + (layers - 1) * (two[program] - one[program])
        pictures = axes["data"] * (groups if program in ("question", "step") else 1)
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
