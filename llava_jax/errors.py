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
    """What an exception says, and its type where it is an unusual one; of a long text, the first line.

    An error of the operating system goes without its number and path.
    """
    text = getattr(error, "strerror", None) or str(error)
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    lines = [" ".join(line.split()) for line in printable.split("\n") if line.strip()]
    said = " ".join(lines)
    if len(said) > 2 * READABLE:
        said = shortened(lines[0], 2 * READABLE)
    kind = type(error).__name__
    if isinstance(error, OSError | ValueError | str) or said.startswith(kind):
        return said or kind
    return f"{kind}: {said}" if said else kind
