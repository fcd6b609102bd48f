"""A mesh as options have it: (("data", 2), ("fsdp", 4)). Imports no JAX."""


def check_axes(mesh: tuple[tuple[str, int], ...], *known: str) -> None:
    """ValueError if a mesh has another axis than these."""
    if unknown := {axis for axis, _ in mesh} - set(known):
        raise ValueError(f"--mesh: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
