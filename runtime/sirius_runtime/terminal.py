"""Text of unknown origin, made fit to print: no control sequence of it reaches the terminal."""

from __future__ import annotations

import os
from typing import TextIO

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


def takes_colour(stream: TextIO) -> bool:
    """Whether colours are wanted there: it is a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str) -> str:
    """Text, made fit to print, in a style: numbers of SGR, such as ``1;31``."""
    return f"\x1b[{style}m{text}\x1b[0m" if text else text


def without_controls(text: str) -> str:
    """A model's text: as `plain`, but only of the characters that control a terminal. Joiners and
    wide spaces, which `plain` takes for marks, are part of what is written.
    """
    return text.translate(_CONTROLS)
