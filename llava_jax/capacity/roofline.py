"""What chips cannot be faster than: operations, bytes of HBM and bytes between chips, from the config alone.

A bound and no measurement: every chip works at its peak, nothing waits for the host, and only what is counted here is
done. A program takes the longer of its operations and its bytes of HBM, and then its all-reduces, which nothing hides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.capacity import cuda
from llava_jax.config import LlavaConfig, TextConfig
from llava_jax.evaluation.benchmarks import BENCHMARKS
from llava_jax.evaluation.benchmarks.benchmark import Workload
from llava_jax.inference.batch_shape import BatchShape, Block
from llava_jax.inputs.anyres import image_length, num_tiles
from llava_jax.inputs.batch import bucket_count, bucket_length
from llava_jax.inputs.groups import bucket_rows

GIB = 2**30
BF16 = 2  # bytes


@dataclass(frozen=True)
class Precision:
    """What is int8 instead of bfloat16: the layers' kernels, prefixes' keys and values, what prefill multiplies."""

    quantize: str | None = None
    int8_prefix: bool = False
    int8_activations: bool = False

    @property
    def kernel(self) -> int:
        """Bytes of a number of a kernel."""
        return BF16 if self.quantize is None else 1

    def prefix(self, text: TextConfig) -> int:
        """Bytes of one position of a prefix, in every layer."""
        if not self.int8_prefix:
            return position_bytes(text)
        return 2 * text.num_hidden_layers * text.num_key_value_heads * (text.head_dim + 4)  # with its scale


@dataclass(frozen=True)
class Chip:
    """Peaks as docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and NVIDIA's data sheets give them (without sparsity).

    A link is one of the two by which a chip is in a ring, one way. Of a TPU: the bidirectional ICI bandwidth of those
    pages over its ports (4 of v5e and v6e, 6 of v4 and v5p); of a GPU: half of what NVLink (or PCIe) carries one way.
    `hbm` is what a program may have: on a TPU by XLA's own message about one that wants more, on a GPU the three
    quarters of its memory that JAX takes by default. `int8` of v5p, which is not in those pages, is what
    jax-ml.github.io/scaling-book/tpus has.
    """

    flops: float  # bfloat16 (float16 where there is none), a second
    hbm: float  # bytes
    bandwidth: float  # HBM bytes a second
    link: float  # bytes a second
    int8: float = 2  # times as many operations with int8


V4 = Chip(275e12, 30.75 * GIB, 1200e9, 50e9, int8=1)
V5E = Chip(197e12, 15.75 * GIB, 819e9, 50e9)
V5P = Chip(459e12, 95.73 * GIB, 2765e9, 100e9)
V6E = Chip(918e12, 31.24 * GIB, 1638e9, 100e9)


@dataclass(frozen=True)
class Slice:
    """A TPU slice: its chips, and what libtpu calls it."""

    chip: Chip
    chips: int
    topology: str
    chip_config: str = "default"

    @property
    def description(self) -> dict[str, str]:
        """For `jax.experimental.topologies.get_topology_desc`."""
        return dict(platform="tpu", topology_name=self.topology, chip_config_name=self.chip_config)


# The names count chips, but v4's and v5p's count TensorCores: two to a chip, which are one device as a "megacore".
SLICES = {
    "v5e-1": Slice(V5E, 1, "v5e:1x1"),
    "v5e-4": Slice(V5E, 4, "v5e:2x2"),
    "v5e-8": Slice(V5E, 8, "v5e:2x4"),
    "v4-8": Slice(V4, 4, "v4:2x2x1", "megacore"),
    "v5p-8": Slice(V5P, 4, "v5p:2x2x1", "megacore"),
    "v6e-8": Slice(V6E, 8, "v6e:2x4"),
}


@dataclass(frozen=True)
class Gpus:
    """Like GPUs of one machine. The link is in bytes a second, as a Chip's."""

    card: cuda.Card
    flops: float
    link: float
    chips: int = 1
    int8: float = 2

    @property
    def chip(self) -> Chip:
        return Chip(self.flops, 0.75 * self.card.memory, self.card.bandwidth, self.link, self.int8)

    @property
    def description(self) -> dict[str, str]:
        """For `jax.experimental.topologies.get_topology_desc`."""
        config = cuda.target_config(self.card)
        machine = f"1x1x{self.chips}"
        return dict(platform="cuda", topology_name=self.card.name, target_config=config, topology=machine)


GPUS = {
    "h100": Gpus(cuda.H100, 989e12, 225e9),
    "h100-8": Gpus(cuda.H100, 989e12, 225e9, 8),
    "h200": Gpus(cuda.H200, 989e12, 225e9),
    "a100": Gpus(cuda.A100, 312e12, 150e9),
    "a100-8": Gpus(cuda.A100, 312e12, 150e9, 8),
    "l4": Gpus(cuda.L4, 121e12, 16e9),
    "rtx4090": Gpus(cuda.RTX4090, 165e12, 16e9, int8=4),  # 661 TOPS; sums in float32 halve what it does in bfloat16
    "t4": Gpus(cuda.T4, 65e12, 8e9),
}
TOPOLOGIES: dict[str, Slice | Gpus] = {**SLICES, **GPUS}


# ---- what each program does, on one of the `tensor` chips that share a model


@dataclass(frozen=True)
class Work:
    """What cannot be avoided. Of HBM: the kernels read once, each prefix read or written once, each slot of a suffix
    (filled or not) read or written once, and a program's own large inputs and results; what passes between its layers
    may stay on the chip."""

    flops: float
    moved: float  # bytes of HBM
    reduced: float  # bytes of the arrays that the chips add up
    int8: float = 0  # of the operations, those that are of int8

    def __add__(self, other: Work) -> Work:
        flops, moved, reduced = self.flops + other.flops, self.moved + other.moved, self.reduced + other.reduced
        return Work(flops, moved, reduced, self.int8 + other.int8)

    def seconds(self, chip: Chip, tensor: int) -> float:
        computing = (self.flops - self.int8 + self.int8 / chip.int8) / chip.flops
        return max(computing, self.moved / chip.bandwidth) + self.reducing_seconds(chip, tensor)

    def reducing_seconds(self, chip: Chip, tensor: int) -> float:
        """An all-reduce is a ring in both directions: of its bytes, 2 (n - 1) / n leave each chip by two links."""
        return (tensor - 1) / tensor * self.reduced / chip.link


def layer_weights(text: TextConfig) -> int:
    """Parameters of one decoder layer's kernels."""
    heads = text.num_attention_heads + text.num_key_value_heads
    return 2 * text.hidden_size * text.head_dim * heads + 3 * text.hidden_size * text.intermediate_size


def position_bytes(text: TextConfig) -> int:
    """Keys and values of one position in every layer."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * BF16


def encode(config: LlavaConfig, tiles: int, tensor: int, precision: Precision = Precision()) -> Work:
    """`encode_images`. Each of the `tensor` chips has all of its kernels, and its share of the tiles; then all of them
    get the features of all."""
    vision, width = config.vision, config.vision.hidden_size
    layers = config.mm_vision_select_layer % (vision.num_hidden_layers + 1)  # those that are run
    kernels = layers * (4 * width**2 + 2 * width * vision.intermediate_size)
    views = sum((scale // vision.image_size) ** 2 for scale in config.s2_scales) if config.s2 else 1
    positions = tiles * views * (vision.num_patches + 1) / tensor
    attention = 4 * layers * positions * (vision.num_patches + 1) * width
    tower = 2 * positions * (kernels + 3 * vision.patch_size**2 * width) + attention
    depth, wide = config.projector_depth, config.text.hidden_size
    projector = config.mm_hidden_size * wide + (depth - 1) * wide**2 if depth else 0
    flops = tower + 2 * tiles * config.tokens_per_tile * projector / tensor
    features = BF16 * tiles * config.tokens_per_tile * wide
    moved = precision.kernel * kernels + BF16 * projector + 3 * tiles * config.tile_size**2 / tensor + features
    return Work(flops, moved, features / 2)  # to gather an array takes half of what it takes to add it up


def prefill(config: LlavaConfig, positions: int, tensor: int, precision: Precision = Precision()) -> Work:
    """The decoder over one prefix; each position sees half of them."""
    text = config.text
    kernels = text.num_hidden_layers * layer_weights(text)
    products = 2 * positions * kernels
    flops, int8 = products + 2 * positions**2 * _attention_width(text), products if precision.int8_activations else 0
    moved = precision.kernel * kernels + positions * precision.prefix(text)
    return Work(flops / tensor, moved / tensor, _reduced(text, positions), int8 / tensor)


def extend(
    config: LlavaConfig,
    groups: int,
    rows: int,
    length: int,
    prefix: int,
    suffix: int,
    tensor: int,
    precision: Precision = Precision(),
) -> Work:
    """`length` new positions in each of groups x rows, after that many positions: questions, or a step of decoding."""
    cache = groups * (prefix * precision.prefix(config.text) + rows * suffix * position_bytes(config.text))
    new = groups * rows * length
    return _decoder(config, new, groups * rows, new * (prefix + suffix), cache, tensor, precision)


def step(
    config: LlavaConfig,
    shape: BatchShape,
    blocks: Sequence[Block],
    tensor: int,
    precision: Precision = Precision(),
) -> Work:
    """A step of decoding of all rows of these blocks: a prefix is read once for all who see it."""
    text, groups = config.text, shape.per_shard
    pools = {block.pool for block in blocks}
    cache = sum(groups * shape.pools[pool].capacity * precision.prefix(text) for pool in pools)
    rows = seen = 0
    for block in blocks:
        count, slots = shape.row_class(block)
        rows += groups * count
        seen += groups * count * (shape.pools[block.pool].capacity + slots)
        cache += groups * count * slots * position_bytes(text)
    return _decoder(config, rows, rows, seen, cache, tensor, precision)


def _decoder(
    config: LlavaConfig, new: int, rows: int, seen: int, cache: int, tensor: int, precision: Precision
) -> Work:
    """The decoder over so many new positions, and the head over the last one of each row.

    Args:
        seen: how many positions all new ones see together; cache: bytes of keys and values that are read or written.
    """
    text = config.text
    kernels, head = text.num_hidden_layers * layer_weights(text), text.hidden_size * text.vocab_size
    products = 2 * new * kernels
    int8 = products if precision.int8_activations and new > rows else 0  # a step's are not
    flops = products + 4 * seen * _attention_width(text) + 2 * rows * head
    moved = precision.kernel * kernels + BF16 * head + cache
    return Work(flops / tensor, moved / tensor, _reduced(text, new), int8 / tensor)


def works(config: LlavaConfig, shape: BatchShape, tensor: int, precision: Precision) -> dict[str, Work]:
    """What each program of a batch does: encoding one picture, the decoder over a prefix of the longest pool, or as
    much of it as is prefilled at a time, the questions that are admitted together, a step of decoding of all rows."""
    longest = shape.pools[-1]
    first = min(longest.capacity, shape.chunk or longest.capacity)
    slots = longest.classes[0].slots
    question = extend(config, 1, shape.admitted, shape.question, longest.capacity, slots, tensor, precision)
    return {
        "encode": encode(config, config.max_tiles_per_image, tensor, precision),
        "prefill": prefill(config, first, tensor, precision),
        "question": question,
        "step": step(config, shape, shape.blocks, tensor, precision),
    }


def _attention_width(text: TextConfig) -> int:
    return text.num_hidden_layers * text.num_attention_heads * text.head_dim


def _reduced(text: TextConfig, positions: int) -> int:
    """Two all-reduces a layer, and one of the embeddings."""
    return (2 * text.num_hidden_layers + 1) * positions * text.hidden_size * BF16


# ---- benchmarks


BEFORE_IMAGE = 36  # tokens of vicuna_v1's prompt in front of the picture
WORKLOADS = {b.workload.title: b.workload for b in BENCHMARKS.values() if b.workload}


def questions_a_second(
    workload: Workload,
    config: LlavaConfig,
    chip: Chip,
    data: int,
    tensor: int,
    groups: int,
    rows: int,
    precision: Precision = Precision(),
) -> float:
    """Each image encoded and prefilled once, its questions asked up to `rows` at a time, while `groups` images decode
    together; `data` such batches at once."""
    tiles = int(num_tiles(workload.size, config))
    prefix = bucket_length(BEFORE_IMAGE + image_length(*workload.size, config), config)
    question, per_image = bucket_count(workload.question), workload.questions / workload.images
    passes = math.ceil(per_image / rows)
    rows = bucket_rows(math.ceil(per_image / passes))
    slots = question + workload.answer
    asked = extend(config, 1, rows, question, prefix, question, tensor, precision).seconds(chip, tensor)
    step_seconds = extend(config, groups, rows, 1, prefix, slots, tensor, precision).seconds(chip, tensor)
    image = encode(config, tiles, tensor, precision).seconds(chip, tensor)
    image += prefill(config, prefix, tensor, precision).seconds(chip, tensor)
    seconds = groups * (image + passes * asked) + passes * (workload.answer - 1) * step_seconds
    return data * groups * per_image / seconds
