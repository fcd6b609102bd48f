"""What errors say of other people's texts and exceptions: little enough, and on one line that can be printed."""

from __future__ import annotations

from collections.abc import Sequence

READABLE = 200  # characters of somebody else's text in an error
MAX_LISTED = 5  # things that one error names


def shortened(text: str, most: int = READABLE) -> str:
    """`text`, without its middle where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) + 1 :]}"


def listed(lines: Sequence[str], separator: str = ", ") -> str:
    """The first of several lines, and how many more there are."""
    more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return separator.join([*lines[:MAX_LISTED], *more])


def reason_of(error: object) -> str:
    """The first line that an exception says, and its type where it is an unusual one.

    An error of the operating system goes without its number and path.
    """
    said = getattr(error, "strerror", None) or str(error)
    first = next((line.strip() for line in said.split("\n") if line.strip()), "")
    first = " ".join("".join(c if c.isprintable() else " " for c in first).split())
    first, kind = shortened(first, 2 * READABLE), type(error).__name__
    if isinstance(error, OSError | ValueError | MemoryError | str) or first.startswith(kind):
        return first or kind
    return f"{kind}: {first}" if first else kind
