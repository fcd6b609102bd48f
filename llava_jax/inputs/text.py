"""Text from anywhere, checked once: what passes can be tokenized, printed and written as UTF-8."""

from __future__ import annotations

READABLE = 200  # characters of somebody else's text in an error


def text_problem(text: object) -> str | None:
    """Why this is no text that can be encoded; None where it is one."""
    if not isinstance(text, str):
        return f"expected a text, got {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # A command line's byte that is not UTF-8 comes as the second half of a pair (os.fsdecode's surrogateescape).
        return (
            f"has {error.object[error.start]!r}, half of a surrogate pair or a byte that is not UTF-8, at {error.start}"
        )
    return None


def check_text(text: object, what: str) -> str:
    """`text` itself.

    Args:
        what: what an error calls it, such as "prompt".

    Raises:
        ValueError: it is no text, or has half a character.
    """
    if problem := text_problem(text):
        raise ValueError(f"{what}: {problem}")
    assert isinstance(text, str)
    return text


def shortened(text: str, most: int = READABLE) -> str:
    """`text`, without its middle where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) + 1 :]}"


def reason_of(error: object) -> str:
    """What an exception says: printable, on one line, and with its type where it is an unusual one."""
    said = shortened(str(error).strip(), 2 * READABLE)
    said = " ".join("".join(c if c.isprintable() else " " for c in said).split())
    kind = type(error).__name__
    if isinstance(error, OSError | ValueError | str) or said.startswith(kind):
        return said or kind
    return f"{kind}: {said}" if said else kind


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
