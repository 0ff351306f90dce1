"""Text of unknown origin, made fit to print: no control sequence of it reaches the terminal."""

from __future__ import annotations


def plain(text: str, keep: str = "") -> str:
    """`text` with every character that can't be printed written as Python writes it in a string
    (escape sequences, line breaks, marks that turn the direction of writing), but those in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]
