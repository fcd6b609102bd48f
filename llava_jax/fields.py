"""What the fields of JSON may be: tables of field → kind of value, and one check that says what is wrong.

Most kinds are written as what they look like: a tuple of types, `[kind]` for a list of any length, {key: kind} for an
object that has these keys, and perhaps others. A `Check` is any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias, get_type_hints

from llava_jax.errors import listed

TYPES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class Check:
    """What a value may be: `problems(name, value)` are lines such as "vocab_size='365' must be …"."""

    problems: Callable[[str, Any], list[str]]
    expected: str
    required: bool = True  # where it is the kind of an object's key


Kind: TypeAlias = "Check | tuple[type, ...] | list[Kind] | Mapping[str, Kind]"


def shown(value: object) -> str:
    """A value as an error shows it."""
    try:
        return f"{value!r:.100}"
    except (RecursionError, ValueError):  # nested too deep, or of too many digits
        return type(value).__name__


# ---- kinds of values


@cache
def kinds_of(dataclass: type) -> dict[str, Kind]:
    """The kinds of a dataclass's fields, of those whose types are `Annotated` with one."""
    hints = get_type_hints(dataclass, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def check_of(kind: Kind) -> Check:
    if isinstance(kind, Check):
        return kind
    if isinstance(kind, tuple):
        return simple(
            lambda value: isinstance(value, kind) and (bool in kind or not isinstance(value, bool)),  # True is an int
            f"must be {TYPES.get(kind[0], kind[0].__name__)}",
        )
    return a_list(kind[0]) if isinstance(kind, list) else an_object(kind)


def simple(accepts: Callable[[Any], bool], expected: str) -> Check:
    """A value that `accepts` is true of."""
    return Check(lambda name, value: [] if accepts(value) else [f"{name}={shown(value)} {expected}"], expected)


def whole(lowest: int, highest: int) -> Check:
    """An integer; neither true nor 2.0 is one."""
    return simple(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest,
        f"must be a whole number from {lowest} to {highest}",
    )


def number(lowest: float, highest: float) -> Check:
    """An integer or a float, which NaN is not."""
    return simple(
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest,
        f"must be a number from {lowest:g} to {highest:g}",
    )


def one_of(*supported: Any) -> Check:
    """One of these, of the same type."""
    return simple(
        lambda value: any(type(value) is type(one) and value == one for one in supported),
        f"is not supported; supported: {', '.join(map(str, supported))}",
    )


def a_list(kind: Kind, length: int | None = None) -> Check:
    """A list, or a dataclass's tuple, of values of one kind."""
    expected, check = "must be a list" if length is None else f"must be a list of {length}", check_of(kind)

    def problems(name: str, value: Any) -> list[str]:
        if not isinstance(value, list | tuple) or len(value) != (len(value) if length is None else length):
            return [f"{name}={shown(value)} {expected}"]
        return [line for i, item in enumerate(value) for line in check.problems(f"{name}[{i}]", item)]

    return Check(problems, expected)


def an_object(table: Mapping[str, Kind]) -> Check:
    """An object with these keys, of these kinds."""
    expected, checks = "must be an object", {key: check_of(kind) for key, kind in table.items()}

    def problems(name: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            if name:
                return [f"{name}={shown(value)} {expected}"]
            return [f"expected an object with {', '.join(checks)}, got {type(value).__name__}"]
        dot = name and f"{name}."
        missing = [repr(dot + key) for key, check in checks.items() if check.required and key not in value]
        lines = (check.problems(dot + key, value[key]) for key, check in checks.items() if key in value)
        return [f"has no {', '.join(missing)}"] * bool(missing) + [line for some in lines for line in some]

    return Check(problems, expected)


def a_map(kind: Kind, key: Check | None = None) -> Check:
    """An object of any keys (or keys of one kind) to values of one kind."""
    expected, check = "must be an object", check_of(kind)

    def problems(name: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return [f"{name}={shown(value)} {expected}"]
        keys = [line for k in value for line in key.problems(f"{name} key", k)] if key else []
        return keys + [line for k, v in value.items() for line in check.problems(f"{name}[{shown(k)}]", v)]

    return Check(problems, expected)


def either(first: Kind, second: Kind) -> Check:
    """A value of the one kind or of the other."""
    a, b = check_of(first), check_of(second)
    return simple(
        lambda value: not a.problems("", value) or not b.problems("", value),
        f"{a.expected} or {b.expected.removeprefix('must be ')}",
    )


def optional(kind: Kind) -> Check:
    """The kind of a key that may be left out."""
    return replace(check_of(kind), required=False)


def or_null(kind: Kind) -> Check:
    """A value of this kind, or null, which means what leaving the key out means."""
    check = check_of(kind)
    return Check(lambda name, value: [] if value is None else check.problems(name, value), check.expected, False)


# ---- the check


def problem_of(value: object, kind: Kind) -> str | None:
    """What is wrong with a value, in one line; None where nothing is."""
    return listed(check_of(kind).problems("", value), "; ") or None


def require(value: object, kind: Kind, where: object, remedy: str = "", name: str = "") -> None:
    """ValueError unless the value, called `name`, is of this kind: at `where`, what is wrong, and the remedy."""
    refuse(check_of(kind).problems(name, value), where, remedy)


def refuse(problems: Iterable[str], where: object, remedy: str = "") -> None:
    """ValueError if there are any problems, the first of them in one line."""
    if lines := list(problems):
        raise ValueError(f"{where}: {listed(lines, '; ')}{remedy and '; ' + remedy}")
