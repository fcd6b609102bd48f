"""Batch evaluation on TPU slices and GPUs that are not there, compiled and computed, not measured: what fits, what is
moved and copied, how fast it is at best."""

from __future__ import annotations

import ctypes.util
import importlib.util
import math
from dataclasses import asdict, replace

from llava_jax.capacity import roofline
from llava_jax.capacity.roofline import GIB, TOPOLOGIES, WORKLOADS, Gpus, Precision, Slice
from llava_jax.config import LlavaConfig
from llava_jax.inference.batch_shape import MAX_NUM_SEQS, BatchShape, memory_bytes, one_pool, serving_shape
from llava_jax.inputs.batch import bucket_count
from llava_jax.inputs.groups import MAX_GROUPS, CacheLayout

NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
QUESTION = 64  # positions of a question, padded
ASSUMED = "assumed: " + "; ".join(
    f"{name} has {b.questions:,} questions on {b.images:,} images of {b.size[0]} x {b.size[1]}, {b.question} tokens "
    f"each, answers of up to {b.answer}"
    for name, b in WORKLOADS.items()
)


def compiler_is_there(platform: str) -> bool:
    """Of "tpu" or "cuda", whose attention is cuDNN's where it can be: that must be there to be traced."""
    if platform == "tpu":
        return _is_installed("libtpu")
    cudnn = (_is_installed("nvidia") and _is_installed("nvidia.cudnn")) or ctypes.util.find_library("cudnn")
    return bool(cudnn) and (_is_installed("jax_cuda12_plugin") or _is_installed("jax_cuda13_plugin"))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def measure(
    config: LlavaConfig,
    name: str,
    axes: dict[str, int],
    prefix: int,
    rows: int,
    max_new_tokens: int,
    precision: Precision,
) -> dict:
    """What one slice or GPU makes of it, as plain values; `describe` puts it into words."""
    from llava_jax.capacity.ahead import slice_mesh
    from llava_jax.capacity.fit import largest_batch
    from llava_jax.capacity.programs import Programs

    where = TOPOLOGIES[name]
    axes = axes or default_axes(config, where, precision)
    if math.prod(axes.values()) != where.chips:
        raise ValueError(f"--mesh {axes}: data and tensor must make up the {where.chips} chips of a {name}")
    data, tensor = axes.get("data", 1), axes.get("tensor", 1)
    shape = one_pool(data, 1, prefix, rows, QUESTION, bucket_count(max_new_tokens))
    programs = Programs(config, slice_mesh(where, **axes), shape, precision)
    fit = largest_batch(programs, where.chip.hbm)
    report = dict(topology=name, mesh=axes, shape=asdict(shape), **asdict(precision), hbm=where.chip.hbm)
    report |= asdict(fit)
    for program in [*report["programs"].values(), *(batch["decode"] for batch in report["batches"].values())]:
        _add_ratios(program)
    if fit.groups:
        usual = replace(shape, per_shard=min(MAX_GROUPS, fit.groups // data))
        report |= dict(at_best_with=usual.groups, **at_best(config, where, tensor, usual, precision))
    return report | dict(serving=_serving(config, programs.layout, where.chip.hbm - fit.params))


def _serving(config: LlavaConfig, layout: CacheLayout, free: float) -> str:
    """What `llava-jax serve` makes of so many bytes beside the parameters."""
    from llava_jax.inference.batching import SHARE
    from llava_jax.inference.serving import startup_table

    budget = int(SHARE * free)
    try:
        shape = serving_shape(config, layout, budget, None, MAX_NUM_SEQS)
    except ValueError as error:
        return str(error)
    return startup_table(config, shape, memory_bytes(shape, config, layout), budget)


def default_axes(config: LlavaConfig, where: Slice | Gpus, precision: Precision) -> dict[str, int]:
    """The mesh that evaluation makes of these chips."""
    from llava_jax.models.llava_llama import param_bytes
    from llava_jax.parallel import sharding

    params = param_bytes(config, roofline.BF16, precision.quantize)
    return sharding.default_axes(where.chips, config.text.num_key_value_heads, params, where.chip.hbm)


def _add_ratios(program: dict) -> None:
    from llava_jax.capacity.programs import Moved

    for moved in filter(None, (program["once"], program["step"])):
        moved["ratio"] = Moved(**moved).ratio


def at_best(config: LlavaConfig, where: Slice | Gpus, tensor: int, shape: BatchShape, precision: Precision) -> dict:
    """The roofline: seconds of each program, and questions a second."""
    works = roofline.works(config, shape, tensor, precision)
    seconds = {name: work.seconds(where.chip, tensor) for name, work in works.items()}
    sizes = shape.shards, tensor, shape.per_shard, shape.admitted
    rates = {
        name: roofline.questions_a_second(workload, config, where.chip, *sizes, precision)
        for name, workload in WORKLOADS.items()
    }
    return dict(seconds=seconds, questions_a_second=rates)


def describe(report: dict) -> str:
    """A slice's report in words."""
    shape, room = report["shape"], report["hbm"] / GIB
    ((capacity, ((rows, slots),)),) = shape["pools"]
    title = f"{report['topology']}, " + ", ".join(f"{name}={size}" for name, size in report["mesh"].items())
    one = f"one prefix of {capacity} positions with {rows} rows"
    if not report["groups"]:
        remedy = "" if report["quantize"] else "; --quantize int8 halves them"
        parameters = f"{report['params'] / GIB:.2f} GiB of parameters a chip"
        return f"{title}: {parameters} leave no room for {one} in {room:.2f} GiB{remedy}"
    lines = [
        f"{title}: room for {report['groups']} prefixes of {capacity} positions with {rows} rows of {slots}",
        f"  a chip: {report['params'] / GIB:.2f} GiB of parameters, {report['prefix'] / GIB:.3f} GiB of each prefix",
        *(_describe_program(name, program) for name, program in report["programs"].items()),
    ]
    for groups, batch in report["batches"].items():
        lines.append(
            f"  {groups} prefixes need {batch['needed'] / GIB:.2f} of {room:.2f} GiB a chip, pools and rows "
            f"{batch['cache'] / GIB:.2f}; planned, parameters and code aside: {batch['planned'] / GIB:.2f}"
        )
        lines.append(_describe_program("decode", batch["decode"]))
    usual, rates = report["at_best_with"], report["questions_a_second"].items()
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in report["seconds"].items())
    lines.append(f"  at best (roofline, nothing measured), {usual} prefixes: {times}")
    lines.append("  at best: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates) + " questions a second")
    lines += ["  llava-jax serve there:", *(f"    {line}" for line in report["serving"].splitlines())]
    return "\n".join(lines)


def _describe_program(name: str, program: dict) -> str:
    inputs, made, results, code = (program[key] / GIB for key in ("inputs", "temporaries", "outputs", "code"))
    meetings = program["collectives"]
    others = "".join(f", {count} {what}" for what, count in meetings["others"].items())
    whole = (
        f"{count} of a {part} ({section})"
        for section, counts in program["whole_writes"].items()
        for part, count in counts.items()
        if count
    )
    return (
        f"  {name}: inputs {inputs:.2f}, temporaries {made:.2f}, results {results:.2f}, program {code:.2f} GiB; "
        f"moves {_describe_moved(program['once'])}"
        + (f", {_describe_moved(program['step'])} a step" if program["step"] else "")
        + f"; written whole: {', '.join(whole) or 'nothing'}"
        + f"; collectives: {meetings['decoder']} a decoder layer, {meetings['tower']} a tower layer{others}"
    )


def _describe_moved(moved: dict) -> str:
    ratio = f" ({moved['ratio']:.2f} of the unavoidable)" if moved["ratio"] else ""
    return f"{moved['bytes'] / GIB:.2f} GiB{ratio}"
