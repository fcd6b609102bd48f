"""Bytes of HBM that a compiled program reads and writes, arrays that it writes whole, and how often its chips meet.

All of it is read from the compiler's own text (`hlo.parse`): compiled, not measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from llava_jax.capacity.hlo import Array, Computation, Instruction, Module

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"}
_FREE |= {"while", "call", "conditional"}  # what they run counts by itself
_FREE_CALLS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place; which operand holds the new numbers
_NEEDS_ALL = {"dot", "convolution", "custom-call", "sort", "reduce-window", "broadcast"}  # for any part of a result


@dataclass(frozen=True)
class Traffic:
    """Bytes of HBM."""

    read: float = 0
    written: float = 0

    @property
    def moved(self) -> float:
        return self.read + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.read * times, self.written * times)


# ---- bytes


def computation_traffic(module: Module, name: str) -> Traffic:
    """What one run of a computation moves, but for loops of an unknown number of steps.

    Of a conditional for what not everybody asks for (its path has `if_asked`), the branch that moves least counts; of
    any other, the one that moves most.
    """
    runs = module.runs(name, partial(_usual_branches, module))
    return sum((instruction_traffic(module, where, i) * times for times, where, i in runs), Traffic())


def _usual_branches(module: Module, conditional: Instruction) -> tuple[str, ...]:
    choose = min if "/if_asked/" in conditional.path else max
    return (choose(conditional.called, key=lambda name: computation_traffic(module, name).moved),)


def instruction_traffic(module: Module, computation: Computation, instruction: Instruction) -> Traffic:
    """What one instruction moves: of each operand what it looks at, once; of its results what is not there already.

    A fusion reads what it slices of an operand, and an update in place writes the slice. A kernel (custom call) is
    taken to read its operands once, whole; results that are an operand's own memory are not counted.
    """
    if moves_nothing(instruction):
        return Traffic()
    read = sum(_read(module, computation, instruction, name) for name in dict.fromkeys(instruction.operands))
    return Traffic(read, sum(size for array, size in written(module, computation, instruction) if array.in_hbm))


def moves_nothing(instruction: Instruction) -> bool:
    """Not even where its operands are in HBM. An asynchronous operation counts where it starts."""
    if instruction.operation == "custom-call":
        return _target(instruction) in _FREE_CALLS
    return instruction.operation in _FREE or instruction.operation.endswith(("-done", "-update", "-id"))


def _target(instruction: Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def _read(module: Module, computation: Computation, instruction: Instruction, name: str) -> float:
    """Bytes of the operand of that name."""
    places = [n for n, operand in enumerate(instruction.operands) if operand == name]
    share = min(1, sum(_share_read(module, instruction, n, computation[name]) for n in places))
    return share * sum(array.bytes for array in computation[name].made if array.in_hbm)


def _share_read(module: Module, instruction: Instruction, place: int, operand: Instruction) -> float:
    """How much of an operand an instruction needs for its whole result; 1 is all of it."""
    if instruction.operation in _SLICES and place == 0:
        return min(1, _bytes(instruction) / max(1, _bytes(operand)))
    if instruction.operation in _UPDATES and place == 0:
        return 0
    if instruction.operation in ("fusion", "async-start"):
        called = module.called_by(instruction)
        return _share_needed(module, called, called.parameters[place])
    return 1


def _share_needed(module: Module, computation: Computation, value: Instruction) -> float:
    """How much of a value within a fusion is needed: most of what is made of it is only made where it is needed."""
    if value.is_root:
        return 1
    if value.name not in computation.shares:  # else each of many paths through a fusion would be gone once more
        users = computation.users[value.name]
        computation.shares[value.name] = min(1, sum(_share_needed_by(module, computation, value, u) for u in users))
    return computation.shares[value.name]


def _share_needed_by(module: Module, computation: Computation, value: Instruction, user: Instruction) -> float:
    places = [n for n, operand in enumerate(user.operands) if operand == value.name]
    if user.operation in _UPDATES and places == [0]:
        return 0 if _is_result(computation, user) else 1
    share = max(_share_read(module, user, place, value) for place in places)
    return share if user.operation in _NEEDS_ALL else share * _share_needed(module, computation, user)


def _is_result(computation: Computation, value: Instruction) -> bool:
    """Whether a value is the fusion's result, or one of them, as it is or with further slices replaced."""
    kept = ("bitcast", "tuple", *_UPDATES)
    users = [user for user in computation.users[value.name] if user.operation in kept]
    keeping = [user for user in users if user.operation == "tuple" or user.operands[0] == value.name]
    return value.is_root or any(_is_result(computation, user) for user in keeping)


def _bytes(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.made)


def written(module: Module, computation: Computation, instruction: Instruction) -> list[tuple[Array, float]]:
    """(a result, bytes of it that are written) of each result of an instruction."""
    made = instruction.made
    if instruction.operation in _UPDATES:
        return [(made[0], _bytes(computation[instruction.operands[_UPDATES[instruction.operation]]]))]
    if instruction.operation == "custom-call":
        return [(array, array.bytes) for array in _made_by_call(instruction)]
    if instruction.operation not in ("fusion", "async-start"):
        return [(array, array.bytes) for array in made]
    called = module.called_by(instruction)
    roots = [called[name] for name in called.root.operands] if called.root.operation == "tuple" else [called.root]
    updates = [_updated_in_place(module, called, root) for root in roots]
    if len(updates) != len(made):  # a nested fusion's results
        return [(array, array.bytes) for array in made]
    return [(array, array.bytes if size is None else size) for array, size in zip(made, updates, strict=True)]


def _made_by_call(instruction: Instruction) -> Iterable[Array]:
    """The results of a custom call, without what is an operand's memory, and without NVIDIA's libraries' workspaces."""
    if _target(instruction).startswith("__cu"):  # cublas adds to an operand: all of it is written
        return [array for n, array in enumerate(instruction.made) if n == 0 or len(array.shape) != 1]
    places = re.findall(r"\{(\d*)\}: \(", instruction.attribute(r"output_to_operand_aliasing=\{(.*?\))\}"))
    return [array for n, array in enumerate(instruction.made) if str(n) not in places and "" not in places]


def _updated_in_place(module: Module, called: Computation, root: Instruction) -> float | None:
    """Bytes that a fusion's result gets, where it is an operand with slices of it replaced; None where it is not."""
    value, total = called.behind(root.name), 0.0
    if value.operation == "fusion":
        ((_, total),) = written(module, called, value)
        return total if total < _bytes(value) else None
    while value.operation in _UPDATES:
        total += _bytes(called[value.operands[_UPDATES[value.operation]]])
        value = called.behind(value.operands[0])
    return total if total and value.operation == "parameter" else None


def estimated_cycles(module: Module, name: str) -> int:
    """libtpu's own estimate for one run of a computation, 0 where there is none: to rank forms of a program by."""
    runs = module.runs(name, partial(_usual_branches, module))
    return sum(times * int(i.attribute(r'"estimated_cycles":"?(\d+)') or 0) for times, _, i in runs)


# ---- arrays that are written whole


_MOVED = {"bitcast", "copy", "copy-start", "copy-done", "async-start", "async-done", "get-tuple-element"}
Shape = tuple[int, ...]
Runs = list[tuple[int, Computation, Instruction]]


@dataclass(frozen=True)
class Watched:
    """Shapes of arrays that are not to be written again, as a chip has them; compilers reorder their axes."""

    kernels: set[Shape]  # also of several side by side
    cache: dict[str, Shape]  # of one layer's keys in each part; an array of that size in another shape is one too

    def name(self, array: Array, is_product: bool) -> str | None:
        """What the array is one of: "kernel", or the part of the cache."""
        axes = _axes(array.shape)
        alike = [name for name, shape in self.cache.items() if _axes(shape) == axes]
        if is_product:
            return alike[0] if alike else None  # another shape is a coincidence
        if not alike and axes in map(_axes, self.kernels):
            return "kernel"
        alike += [name for name, shape in self.cache.items() if math.prod(shape) == array.size]
        return alike[0] if alike else None


def _axes(shape: Shape) -> list[int]:
    return sorted(size for size in shape if size != 1)


def whole_writes(module: Module, watched: Watched) -> dict[str, dict[str, int]]:
    """How many times a program writes a watched array, whole, to HBM: before its loop, at each of its steps and after
    it; or in the whole program, where there is no loop.

    An update in place of one slot is none, nor is what is fetched into a core's own memory to be read. Of kernels only
    arguments that are written again count: what a product makes may have their shape.
    """
    return {section: _whole_writes(module, runs, watched) for section, runs in _sections(module).items()}


def _sections(module: Module) -> dict[str, Runs]:
    runs = list(module.runs(module.entry))
    loops = module.loops
    loop = next((n for n, (_, _, i) in enumerate(runs) if i.operation == "while" and i.called[0] in loops), None)
    if loop is None:
        return {"program": runs}
    step = [run for name in loops for run in module.runs(name)]
    return {"before": runs[:loop], "step": step, "after": runs[loop + 1 :]}


def _whole_writes(module: Module, runs: Runs, watched: Watched) -> dict[str, int]:
    found = Counter(dict.fromkeys([*watched.cache, "kernel"], 0))
    for times, where, instruction in runs:
        if moves_nothing(instruction):
            continue
        is_product = _is_product(module, instruction)
        whole = [a for a, size in written(module, where, instruction) if a.in_hbm and size == a.bytes]
        for name in (watched.name(array, is_product) for array in whole):
            if name and (name != "kernel" or any(_is_argument(where, operand) for operand in instruction.operands)):
                found[name] += times
    return dict(found)


def _is_argument(where: Computation, name: str) -> bool:
    """Whether a value is an argument of the program or of the loop's body, or one that was only moved."""
    maker = where[name]
    moved = maker.operation in _MOVED or (maker.operation == "custom-call" and _target(maker) in _FREE_CALLS)
    return maker.operation == "parameter" or (moved and _is_argument(where, maker.operands[0]))


def _is_product(module: Module, instruction: Instruction) -> bool:
    if instruction.operation == "fusion":
        return any(_is_product(module, inside) for inside in module.called_by(instruction))
    return instruction.operation in ("dot", "convolution", "custom-call")


# ---- what chips say to each other

_COLLECTIVE = r"(?:all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?"


@dataclass(frozen=True)
class Collectives:
    """How often the chips meet: in the layer of the decoder, and of the tower, that does so most, and besides."""

    decoder: int
    tower: int
    others: dict[str, int]


def collectives(module: Module) -> Collectives:
    """Counted by the layers that compiled instructions say they come from (`op_name`), the loop apart from the rest."""
    met: Counter[tuple[str, ...]] = Counter()
    for section, runs in _sections(module).items():
        channels = set[str]()  # of one meeting, where libtpu divides it among the fusions that run meanwhile
        for times, instruction, path in ((n, *found) for n, _, i in runs for found in _collectives(module, i)):
            channel = instruction.attribute(r"channel_id=(\d+)")
            if channel and channel in channels:
                continue
            channels.add(channel)
            kind, layer = instruction.operation.removesuffix("-start"), re.search(r"/layers_\d+/", path)
            if layer:
                met[section, "tower" if "vision_tower" in path else "decoder", layer.group()] += times
            else:
                met[section, f"{kind} of {_subject(path)}"] += times
    most: Counter[str] = Counter()
    for (_, what, *_), count in met.items():
        most[what] = max(most[what], count)
    return Collectives(most.pop("decoder", 0), most.pop("tower", 0), dict(most))


def _subject(path: str) -> str:
    if re.search("encode_images|mm_projector|vision_tower", path):
        return "features"
    return "embeddings" if "embed" in path else "token choice"


def _collectives(module: Module, instruction: Instruction, path: str = "") -> Iterator[tuple[Instruction, str]]:
    """(itself, its `op_name`) of an instruction that is a collective, or of those that it wraps."""
    path = instruction.path or path
    if re.fullmatch(_COLLECTIVE, instruction.operation):
        yield instruction, path
    elif instruction.operation in ("fusion", "async-start"):
        for inside in module.called_by(instruction):
            yield from _collectives(module, inside, path)
