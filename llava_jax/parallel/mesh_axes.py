"""A mesh as options have it: (("data", 2), ("fsdp", 4)). Imports no JAX."""


def check_axes(mesh: tuple[tuple[str, int], ...], *known: str) -> None:
    """ValueError if a mesh has another axis than these."""
    if unknown := {axis for axis, _ in mesh} - set(known):
        raise ValueError(f"--mesh: {', '.join(sorted(unknown))} is none of {', '.join(known)}")


def parse_axes(text: str) -> tuple[tuple[str, int], ...]:
    """A mesh as options take it, like data=2,fsdp=4; ValueError if it is none."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return tuple((name, int(size)) for name, size in pairs)
    except ValueError:
        raise ValueError(f"{text!r} is not like data=2,fsdp=4") from None
