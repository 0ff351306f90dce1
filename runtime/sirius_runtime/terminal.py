"""Text of unknown origin, made fit to print: no control sequence of it reaches the terminal."""

from __future__ import annotations

LINES = "\n"
_CONTROLS = {
    code: ascii(chr(code))[1:-1]
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\t\n"
}


def plain(text: str, keep: str = "") -> str:
    """`text` with every character that can't be printed written as Python writes it in a string
    (escape sequences, line breaks, marks that turn the direction of writing), but those in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def without_controls(text: str) -> str:
    """A model's text: as `plain`, but only of the characters that control a terminal. Joiners and
    wide spaces, which `plain` takes for marks, are part of what is written.
    """
    return text.translate(_CONTROLS)
