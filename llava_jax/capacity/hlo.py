"""The optimised HLO that a compiler writes, as values: libtpu's `*.after_codegen.txt`, and `as_text()` for CUDA."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(:[^{}]*)?\})?")
_OPERAND = re.compile(r"%([\w.-]+(?:#\d+)?)")  # name#1: an element of a tuple
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|\S+)"
)


@dataclass(frozen=True)
class Array:
    """What one array takes."""

    shape: tuple[int, ...]
    bytes: float  # with the padding of a TPU's tiles
    in_hbm: bool  # and not in one of a TPU core's own memories

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Instruction:
    name: str
    operation: str  # "all-reduce-start", say
    made: tuple[Array, ...]  # of what starts another operation: what that one makes
    operands: tuple[str, ...]  # their names
    called: tuple[str, ...]  # computations: of a fusion or a call, the loop's body, the branches of a conditional
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern; "" where it is not found."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    @property
    def only_shows(self) -> bool:
        """Whether it is its operand, in another shape or in other tiles."""
        in_place = self.operation == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in self.attributes
        return self.operation == "bitcast" or in_place

    @property
    def path(self) -> str:
        """The modules and functions that it comes from."""
        return self.attribute(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run, by name."""

    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self if i.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.attributes): i for i in self if i.operation == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        out = defaultdict(list)
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                out[name].append(instruction)
        return out

    @cached_property
    def shares(self) -> dict[str, float]:
        """What `traffic` has found out about its values, by their names."""
        return {}

    def behind(self, name: str) -> Instruction:
        """The instruction of that name, or what it only shows in another shape."""
        while self[name].only_shows:
            name = self[name].operands[0]
        return self[name]


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def called_by(self, instruction: Instruction) -> Computation:
        return self[instruction.called[0]]

    def runs(
        self, name: str, branches: Callable[[Instruction], Iterable[str]] = lambda conditional: conditional.called
    ) -> Iterator[tuple[int, Computation, Instruction]]:
        """(how often, where it stands, the instruction) of all that one run of a computation runs: what it calls, these
        branches of a conditional (all of them), and as many steps of a loop as the compiler knows of. What is in a
        fusion is not apart from it."""
        for instruction in self[name]:
            yield 1, self[name], instruction
            times = (self.trip_count(instruction) or 0) if instruction.operation == "while" else 1
            if times and instruction.operation in ("while", "call", "conditional"):
                for called in branches(instruction) if instruction.operation == "conditional" else instruction.called:
                    yield from ((times * n, where, inside) for n, where, inside in self.runs(called, branches))

    @property
    def loops(self) -> list[str]:
        """The bodies of the entry's loops whose number of steps is not known, such as decoding."""
        return [i.called[0] for _, _, i in self.runs(self.entry) if i.operation == "while" and not self.trip_count(i)]

    def trip_count(self, loop: Instruction) -> int | None:
        """How many steps a loop takes, where the text says so, or where it counts up from 0 to a constant."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition, body = self[loop.attribute(r"condition=%?([\w.-]+)")], self.called_by(loop)
        if condition.root.operation != "compare" or "direction=LT" not in condition.root.attributes:
            return None
        counter, limit = map(condition.behind, condition.root.operands)
        if counter.operation != "get-tuple-element" or limit.operation != "constant":
            return None
        stepped = body.behind(body.root.operands[int(counter.attribute(r"index=(\d+)"))])
        steps = [body.behind(name) for name in stepped.operands]
        by = [int(value.attributes) for value in steps if value.operation == "constant"]
        return -(-int(limit.attributes) // by[0]) if stepped.operation == "add" and by else None


def parse(text: str) -> Module:
    computations: dict[str, Computation] = {}
    entry, lines, types = "", dict[str, Instruction](), dict[str, str]()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines, types = {}, {}
            computations[header[2]] = Computation(lines)
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            made, rest = _until_closed(found[3])  # a type, as "(f32[2]{0}, f32[3]{0}) tuple(…)" begins with it
            instruction = _instruction(found[2], made, rest, bool(found[1]))
            for name in instruction.operands:
                if "#" in name and name not in lines:
                    lines[name] = _element(name, types)
            lines[instruction.name], types[instruction.name] = instruction, made
    return Module(computations, entry)


def _element(name: str, types: dict[str, str]) -> Instruction:
    """What "tuple#1" stands for, in JAX 0.12's texts: what older ones have as an instruction of its own."""
    of, _, index = name.partition("#")
    made = arrays(_elements(types[of])[int(index)])
    return Instruction(name, "get-tuple-element", made, (of,), (), f"index={index}", False)


def _instruction(name: str, made: str, rest: str, is_root: bool) -> Instruction:
    operation, _, rest = rest.lstrip().partition("(")
    inside, attributes = _until_closed("(" + rest)
    if operation in ("parameter", "constant"):
        attributes = inside.strip("()")  # its number, or what it is
    called = tuple(re.findall(r"[\w.-]+", " ".join(_CALLED.findall(attributes))))
    operands = tuple(_OPERAND.findall(inside))
    return Instruction(name, operation, arrays(_result_of(operation, made)), operands, called, attributes, is_root)


def _until_closed(text: str) -> tuple[str, str]:
    """Up to the parenthesis that closes the first one, or else up to a space; and the rest."""
    if not text.startswith("("):
        first, _, rest = text.partition(" ")
        return first, rest
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket.group() == "(" else -1
        if not depth:
            return text[: bracket.end()], text[bracket.end() :]
    return text, ""


def _result_of(operation: str, made: str) -> str:
    """Of what the start of an asynchronous operation makes: the result, without operands and what the wait needs."""
    if not operation.endswith("-start") or operation == "all-reduce-start":
        return made
    return _elements(made)[0 if operation == "copy-start" else 1]


def _elements(tuple_type: str) -> list[str]:
    depth, out = 0, [""]
    for character in tuple_type[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            out.append("")
        else:
            out[-1] += character
    return out


def arrays(type_: str) -> tuple[Array, ...]:
    return tuple(_array(*found) for found in _ARRAY.findall(type_))


def _array(dtype: str, dims: str, order: str, layout: str) -> Array:
    shape = tuple(map(int, dims.split(","))) if dims else ()
    bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])
    padded = [shape[int(axis)] for axis in order.split(",")] if order else list(shape[::-1])  # the minor axis first
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        for axis, size in enumerate(map(int, reversed(tile.group(1).split(",")))):
            if axis < len(padded):
                padded[axis] = -(-padded[axis] // size) * size
    return Array(shape, math.prod(padded) * bits / 8, re.search(r"S\([1-9]", layout) is None)
