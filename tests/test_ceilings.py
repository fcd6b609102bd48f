"""Ceilings for what decoding and the prefill of questions move, write and need, by the compilers' own account.

The widths are the 7B's: with narrower kernels and heads, activations and padded tiles weigh more than they do there,
and a cache fits into a TPU core's own memory. Each layer is the same program again, so two are enough.
"""

import dataclasses
import sys

import pytest

from llava_jax.capacity.ahead import slice_mesh
from llava_jax.capacity.programs import Program, Programs
from llava_jax.capacity.report import compiler_is_there, default_axes
from llava_jax.capacity.roofline import GPUS, TOPOLOGIES, Precision
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import BatchShape, Block, PoolShape, RowClass, memory_bytes, one_pool
from llava_jax.parallel.sharding import num_batch_shards

pytestmark = pytest.mark.usefixtures("no_tpu")
QUESTION, SLOTS, PREFIX = 64, 128, 3072
MIB = 2**20

# Bytes of HBM that a step moves, over those that cannot be avoided: by topology, of one row, of 8 prefixes x 16 rows on
# each shard. What a chip of a v5e-4 runs is what one of a v5e-8 does, with half as many shards.
CEILINGS = {"h100": (1.01, 1.15), "v5e-1": (1.01, 1.05), "v5e-8": (1.01, 1.03), "v6e-8": (1.01, 1.03)}
SERVING_CEILINGS = {"h100": 1.15, "v5e-8": 1.05}  # of all rows of a batch with two pools and two classes of rows
TEMPORARIES_MIB = 150  # of the prefill of 16 questions after one prefix of each shard, and of decoding: no scores
ADMISSION_SHARE = 0.75  # of the estimated cycles of a prefill of 3,072 positions, for 16 questions of 64
MOVED_MIB = 12  # when a row of 128 slots, 4 MiB in two layers, goes on in one of 512


def shallow(config: LlavaConfig, layers: int) -> LlavaConfig:
    text, vision = (dataclasses.replace(part, num_hidden_layers=layers) for part in (config.text, config.vision))
    return config.replace(text=text, vision=vision)


def programs(topology: str, layers: int, shape_of, preset: str = "1.6-vicuna-7b", **precision) -> Programs:
    """`shape_of`: the number of shards → a BatchShape."""
    where, config = TOPOLOGIES[topology], LlavaConfig.preset(preset)
    int8 = Precision("int8", True) if topology == "v5e-1" else Precision(**precision)  # it has no room for bfloat16
    mesh = slice_mesh(where, **default_axes(config, where, int8))
    return Programs(shallow(config, layers), mesh, shape_of(num_batch_shards(mesh)), int8)


def evaluation(per_shard: int, rows: int):
    """The batch of many questions that are known beforehand."""
    return lambda shards: one_pool(shards, per_shard, PREFIX, rows, QUESTION, SLOTS)


def serving(per_shard: int):
    """Two pools, with short rows and long ones."""

    def shape(shards: int) -> BatchShape:
        classes = RowClass(4, 128), RowClass(2, 512)
        pools = PoolShape(512, classes), PoolShape(PREFIX, classes)
        return BatchShape(shards, per_shard, pools, QUESTION, 1, 4, 512, PREFIX)

    return shape


def topologies(names):
    """A GPU's tests are for where its compiler is, which is quick; a TPU's take a minute each."""
    of_a_gpu = pytest.mark.skipif(not compiler_is_there("cuda"), reason="pip install 'llava-jax[cuda-ahead]'")
    return [pytest.param(name, marks=of_a_gpu if name in GPUS else pytest.mark.long) for name in names]


def writes_nothing_whole(*of: Program) -> bool:
    found = [
        (n, *item) for n, program in enumerate(of) for item in program.whole_writes.items() if any(item[1].values())
    ]
    print(found)
    return not found


def is_as_planned(of: Programs, *compiled: Program) -> bool:
    """Whether what pools, rows and the largest of the programs take is within 15 % of what decides G and R."""
    needed = of.cache_bytes + max(program.total for program in compiled)
    return memory_bytes(of.shape, of.config, of.layout) == pytest.approx(needed, rel=0.15)


@pytest.mark.parametrize("topology", topologies([*CEILINGS, "v5e-4"]))
def test_one_answer_alone(topology):
    decode = programs(topology, 2, evaluation(1, 1)).decode()
    assert decode.step.ratio < CEILINGS.get(topology, CEILINGS["v5e-8"])[0]
    assert writes_nothing_whole(decode), decode.whole_writes


@pytest.mark.parametrize("topology", topologies(CEILINGS))
def test_a_batch_of_many(topology):
    of = programs(topology, 2, evaluation(8, 16))
    decode, question, prefill = of.decode(), of.questions(of.shape.blocks[0]), of.prefill()
    assert decode.step.ratio < CEILINGS[topology][1]
    assert decode.collectives.decoder == (0 if of.layout.tensor == 1 else 2)
    assert max(decode.temporaries, question.temporaries) < TEMPORARIES_MIB * MIB
    assert writes_nothing_whole(decode, question), (decode.whole_writes, question.whole_writes)
    assert not any(n for name, n in prefill.whole_writes["program"].items() if name != "kernel"), prefill.whole_writes
    assert is_as_planned(of, decode, question, prefill)
    if topology not in GPUS:
        assert question.once.cycles < ADMISSION_SHARE * prefill.once.cycles


@pytest.mark.parametrize("topology", topologies(SERVING_CEILINGS))
def test_a_batch_that_serves(topology):
    """Every program that `llava-jax serve` compiles."""
    of = programs(topology, 2, serving(8))  # 6 x 512 would be one of 3072
    decode, longs = of.decode(), Block(1, 1)
    others = [of.encode(), of.prefill(), of.prefill_next(512), of.copy(), of.questions(longs), of.score()]
    others.append(move := of.move(Block(1, 0)))
    assert decode.step.ratio < SERVING_CEILINGS[topology]
    assert writes_nothing_whole(decode, *others), [program.whole_writes for program in (decode, *others)]
    assert move.once.bytes < MOVED_MIB * MIB
    assert is_as_planned(of, decode, *others)


def main(names: list[str]) -> None:
    print("| | batch | a step moves, MiB | of the unavoidable | estimated cycles | temporaries, MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for topology in names:
        for groups, rows in ((1, 1), (8, 16)):
            of = programs(topology, 2, evaluation(groups, rows))
            decode = of.decode()
            step, cycles = decode.step, f"{decode.step.cycles:,}" if decode.step.cycles else ""
            figures = f"{step.bytes / MIB:,.0f} | {step.ratio:.2f} | {cycles} | {decode.temporaries / MIB:.0f}"
            print(f"| {topology} | {groups} x {rows} | {figures} |", flush=True)
        question = of.questions(of.shape.blocks[0])
        moved, made = question.once.bytes / MIB, question.temporaries / MIB
        print(f"{topology}, 16 questions: {moved:,.0f} MiB moved, {made:.0f} MiB of temporaries", flush=True)


if __name__ == "__main__":  # TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/test_ceilings.py v5e-8 h100
    main(sys.argv[1:])
