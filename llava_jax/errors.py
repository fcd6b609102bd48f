"""Why something failed, on one line that can be printed."""

from __future__ import annotations

READABLE = 200  # characters of somebody else's text in an error


def shortened(text: str, most: int = READABLE) -> str:
    """`text`, without its middle where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) + 1 :]}"


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
