"""A batch's programs compiled for TPU slices that are not there (libtpu alone is needed), and the roofline."""

import argparse
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llava_jax.capacity import fit, roofline, traffic
from llava_jax.capacity.ahead import abstract_params, chip_bytes, compile_for, slice_mesh
from llava_jax.capacity.fit import Batch, Capacity
from llava_jax.capacity.hlo import parse
from llava_jax.capacity.programs import Moved, Program, Programs
from llava_jax.capacity.roofline import GPUS, SLICES, V5E, WORKLOADS, Precision, Work
from llava_jax.capacity.traffic import Collectives, Watched
from llava_jax.cli import add_command
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import memory_bytes, one_pool, serving_shape
from llava_jax.inputs.groups import CacheLayout
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM, param_shapes
from llava_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("no_tpu")
MIB = 2**20


def small(config: LlavaConfig) -> LlavaConfig:
    """Two layers of each kind, a head for each of eight chips: each layer is the same program again."""
    text = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=8)
    vision = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=8, num_hidden_layers=3)
    return config.replace(
        text=dataclasses.replace(config.text, num_hidden_layers=2, **text),
        vision=dataclasses.replace(config.vision, **vision),
        mm_hidden_size=256,
    )


# ---- the programs


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_has_its_chips(name):
    where = SLICES[name]
    named = dict(topology_name=where.topology, chip_config_name=where.chip_config)
    assert len(topologies.get_topology_desc(platform="tpu", **named).devices) == where.chips


@pytest.mark.long
def test_programs_of_a_batch():
    """Over a v5e-8, 32 prefixes of 1024."""
    config, per_shard = small(LlavaConfig.preset("1.6-vicuna-7b")), 32
    # With 8 MiB of embeddings a chip, libtpu 0.0.52 gathers them by way of 16.6 MiB of VMEM, where it has 16.
    config = config.replace(text=dataclasses.replace(config.text, vocab_size=64000))
    mesh = slice_mesh(SLICES["v5e-8"], data=1, tensor=8)
    of = Programs(config, mesh, one_pool(1, per_shard, 1024, 16, 64, 64), Precision())
    prefix = 1024 * roofline.position_bytes(config.text) // 8
    assert chip_bytes(of.pools) == per_shard * prefix
    assert of.cache_bytes == pytest.approx(
        per_shard * (prefix + 16 * 128 * prefix // 1024), abs=4 * MIB + 16 * 32 * 8000
    )
    (block,) = of.shape.blocks
    encode, prefill, question, decode = of.encode(), of.prefill(), of.questions(block), of.decode()
    assert (
        prefill.outputs < MIB and question.outputs < MIB and decode.outputs < 8 * MIB
    )  # the tokens; the rest in place

    assert encode.collectives == Collectives(0, 0, {"all-gather of features": 1})
    assert (prefill.collectives.decoder, prefill.collectives.tower) == (4, 0)  # along the sequence
    assert (question.collectives.decoder, question.collectives.tower) == (4, 0)
    assert decode.collectives.decoder == 2 and decode.collectives.others["all-reduce of embeddings"] == 1
    assert not any(
        count for program in (question, decode) for counts in program.whole_writes.values() for count in counts.values()
    )


@pytest.mark.long
def test_what_is_planned_is_what_a_cpu_takes():
    """A tower and decoder of two layers, in float32: 20 s."""
    config = small(LlavaConfig.preset("1.6-vicuna-7b"))
    for shape in (one_pool(1, 2, 2048, 8, 64, 64), serving_shape(config, CacheLayout(4), 1 << 30, 2048, 16)):
        of = Programs(config, make_mesh(jax.devices()[:1], data=1), shape, Precision())
        compiled = of.prefill(), of.prefill_next(512), of.questions(shape.blocks[-1]), of.decode()
        needed = of.cache_bytes + max(program.total for program in compiled)
        assert memory_bytes(shape, config, of.layout) == pytest.approx(needed, rel=0.15)


def rewriting_loop(mesh, shape) -> str:
    """The text of a loop that changes one of two arrays whole, reads the other, and updates a slot of a third."""
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))

    def loop(read, rewritten, updated, by):
        def body(i, carried):
            rewritten, updated = carried
            slot = jax.lax.dynamic_slice_in_dim(read, i, 1, axis=1) + read.sum(1, keepdims=True)
            return rewritten * by + read, jax.lax.dynamic_update_slice_in_dim(updated, slot, i, axis=1)

        return jax.lax.fori_loop(0, by.astype(int), body, (rewritten, updated))

    by = jax.ShapeDtypeStruct((), jnp.float32)
    return compile_for(mesh, jax.jit(loop, donate_argnums=(1, 2)), array, array, array, by).text


def test_a_cache_that_is_rewritten_is_seen():
    shape = (32, 4096, 1024)
    text = rewriting_loop(slice_mesh(SLICES["v5e-1"], tensor=1), shape)
    step = traffic.whole_writes(parse(text), Watched(set(), {"any": shape}))["step"]
    assert step == {"any": 1, "kernel": 0}


# ---- what fits


@pytest.mark.parametrize("room", [79, 99, 101, 130, 140, 240, 1000, 1600])
@pytest.mark.parametrize("less", [0, 5, -5])
@pytest.mark.parametrize("refused", [1.01, 1.2, 9])
def test_the_largest_batch_is_found(room, less, refused):
    """Of batches that need 80 bytes and 20 for each prefix, or some less or more for each after the twentieth; the
    compiler refuses those that need much more than there is."""

    def compiled(size):
        batch = Batch(0, 80 + 20 * size - less * max(0, size - 20), 0, None)
        return batch if batch.needed < refused * room else None

    tried = fit.search(compiled, room, params=60, bound=70)
    fits = [size for size, batch in tried.items() if batch.needed <= room]
    assert max(fits, default=0) == max(n for n in range(71) if n == 0 or 80 + 20 * n - less * max(0, n - 20) <= room)


# ---- the roofline


def test_weights_are_those_of_the_parameters():
    config = LlavaConfig.preset("1.6-mistral-7b")
    text, vision = (dataclasses.replace(part, num_hidden_layers=3) for part in (config.text, config.vision))
    config = config.replace(text=text, vision=vision)
    shapes = param_shapes(config)

    def kernels(tree):
        return sum(x.size for x in jax.tree.leaves(tree) if x.ndim > 1)

    text = config.text
    decoder = {name: part for name, part in shapes["language_model"].items() if name.startswith("layers")}
    assert kernels(decoder) == text.num_hidden_layers * roofline.layer_weights(text)
    tower = {n: part for n, part in shapes["vision_tower"].items() if n.startswith("layers") and n != "layers_2"}
    tiles, features = 5 * 3 * 336**2, 2 * 5 * 576 * 4096
    moved = roofline.encode(config, 5, 1).moved
    assert moved == 2 * (kernels(tower) + kernels(shapes["mm_projector"])) + tiles + features


def test_operations_are_those_that_are_lowered():
    """XLA counts them in the unoptimized programs; what it has besides products is little."""
    config = small(LlavaConfig.preset("1.6-vicuna-7b"))
    model, params = LlavaLlamaForCausalLM(config), param_shapes(config)
    tiles = jax.ShapeDtypeStruct((5, 336, 336, 3), jnp.uint8)
    encode = jax.jit(lambda params, tiles: model.apply({"params": params}, tiles, method="encode_images"))
    counted = encode.lower(params, tiles).cost_analysis()["flops"]
    assert roofline.encode(config, 5, 1).flops == pytest.approx(counted, rel=0.03)


def test_seconds():
    assert Work(197e12, 1, 0).seconds(V5E, 1) == 1
    assert Work(1, 2 * 819e9, 0).seconds(V5E, 8) == 2
    assert Work(0, 0, 50e9).seconds(V5E, 4) == 0.75
    assert Work(197e12, 819e9, 50e9).seconds(V5E, 2) == 1.5  # only what chips say to each other adds to it


def test_a_step_reads_weights_and_cache():
    text = LlavaConfig.preset("1.6-vicuna-7b").text
    weights = 2 * (32 * roofline.layer_weights(text) + 4096 * 32000)
    work = roofline.extend(LlavaConfig.preset("1.6-vicuna-7b"), 4, 16, 1, 3072, 192, 8)
    assert work.moved == (weights + 4 * (3072 + 16 * 192) * 2**19) / 8


def test_more_chips_and_larger_waves_are_never_slower():
    config = LlavaConfig.preset("1.6-vicuna-7b")
    for workload in WORKLOADS.values():
        rates = [
            roofline.questions_a_second(workload, config, V5E, data, tensor, groups, 16)
            for data, tensor, groups in [(1, 4, 1), (1, 4, 8), (1, 8, 8), (2, 8, 8)]
        ]
        assert rates == sorted(rates)


# ---- the command


def run(*flags):
    parser = argparse.ArgumentParser()
    add_command(parser, "capacity")
    args = parser.parse_args(flags)
    args.run(args)


@pytest.mark.long
def test_one_chip_needs_int8(capsys):
    run("--topology", "v5e-1")
    assert "13.16 GiB of parameters a chip leave no room" in capsys.readouterr().out
    config, mesh = LlavaConfig.preset("1.6-vicuna-7b"), slice_mesh(SLICES["v5e-1"], tensor=1)
    params = abstract_params(config, mesh, "int8")
    assert chip_bytes(params) / 2**30 == pytest.approx(6.85, abs=0.1)  # but for embeddings, head and projector


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--mesh", "tensor=4"], "must make up the 8 chips of a v5e-8"),
        (["--mesh", "fsdp=8"], "--mesh: fsdp is none of data, tensor"),
        (["--rows", "0"], "--rows 0 must be above 0"),
    ],
)
def test_a_wrong_flag_is_one_error(flags, said):
    with pytest.raises(ValueError, match=said):
        run("--topology", "v5e-8", *flags)


@pytest.mark.parametrize(
    "there, flags, said",
    [
        ("tpu", ["--topology", "v5e-1", "h100"], "pip install 'llava-jax.cuda-ahead.'"),
        ("cuda", ["--topology", "v5e-1", "h100"], "pip install libtpu"),
        ("", [], "pip install libtpu"),
    ],
)
def test_a_missing_compiler_is_one_error(monkeypatch, there, flags, said):
    monkeypatch.setattr("llava_jax.cli.capacity.compiler_is_there", lambda platform: platform == there)
    with pytest.raises(ValueError, match=said):
        run(*flags)


def test_by_default_all_that_can_be_compiled_for(monkeypatch):
    asked = []
    monkeypatch.setattr("llava_jax.cli.capacity.compiler_is_there", lambda platform: platform == "cuda")
    monkeypatch.setattr("llava_jax.cli.capacity.measure", lambda config, name, *_: asked.append(name))
    run("--json")
    assert asked == list(GPUS)


def test_the_report(monkeypatch, capsys):
    met = Collectives(2, 0, {"all-reduce of embeddings": 1})
    program = Program(1.0, 3 << 30, 1 << 30, 0, 1 << 29, Moved(3 << 29, 1 << 29, 7), None, {"program": {}}, met)
    whole = {"before": {"prefix": 0, "suffix": 0}, "step": {"prefix": 0, "suffix": 5}}
    decode = dataclasses.replace(
        program, once=Moved(1 << 29, 0, 0), step=Moved(5 << 28, 1 << 30, 0), whole_writes=whole
    )
    batch = Batch(3 << 30, 7 << 30, 4 << 30, decode)
    found = Capacity(1 << 30, 1 << 28, 8, {"encode": program}, {8: batch})
    monkeypatch.setattr(fit, "largest_batch", lambda of, room: found)
    run("--topology", "v5e-8", "v4-8", "--prefix", "2560")
    out = capsys.readouterr().out
    for said in (
        "v5e-8, data=4, tensor=2: room for 8 prefixes of 2560 positions with 16 rows of 192",
        "8 prefixes need 7.00 of 15.75 GiB a chip, pools and rows 3.00; planned, parameters and code aside: 4.00",
        "decode: inputs 3.00, temporaries 1.00, results 0.00, program 0.50 GiB; moves 0.50 GiB, "
        "1.25 GiB (1.25 of the unavoidable) a step; written whole: 5 of a suffix (step)",
        "moves 1.50 GiB (3.00 of the unavoidable); written whole: nothing",
        "prefixes of up to 4096 positions, each with 4 rows of 128 slots and 2 rows of 512 slots",
    ):
        assert said in out
    assert out.count("2 a decoder layer, 0 a tower layer, 1 all-reduce of embeddings") == 4
    run("--topology", "v5p-8", "--mesh", "data=2,tensor=2", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["groups"] == 8 and report["batches"]["8"]["decode"]["whole_writes"]["step"]["suffix"] == 5
    assert report["batches"]["8"]["decode"]["step"]["ratio"] == 1.25
    assert set(report["questions_a_second"]) == set(WORKLOADS)
    assert math.isclose(report["seconds"]["step"], 0.0061, rel_tol=0.5)
