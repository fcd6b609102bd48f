"""Text from anywhere, checked once: what passes can be tokenized, printed and written as UTF-8."""

from __future__ import annotations


def text_problem(text: object) -> str | None:
    """Why this is no text that can be encoded; None where it is one."""
    if not isinstance(text, str):
        return f"expected a text, got {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # A command line's byte that is not UTF-8 comes as the second half of a pair (os.fsdecode's surrogateescape).
        half = error.object[error.start]
        return f"has {half!r}, half of a surrogate pair or a byte that is not UTF-8, at {error.start}"
    return None


def check_text(text: object, what: str) -> str:
    """`text` itself; ValueError, which calls it `what`, if it is no text or has half a character."""
    if problem := text_problem(text):
        raise ValueError(f"{what}: {problem}")
    assert isinstance(text, str)
    return text
