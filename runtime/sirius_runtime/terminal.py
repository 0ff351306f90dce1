"""Makes untrusted text safe to print: its control sequences do not reach the terminal."""

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
    """`text` with every unprintable character (of escape sequences, line breaks, marks of the
    writing direction) replaced by its Python escape, except those in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def takes_colour(stream: TextIO) -> bool:
    """Whether to print colours: the stream is a terminal with colours, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str) -> str:
    """`text`, which must be safe to print, in a style: SGR numbers, such as ``1;31``."""
    return f"\x1b[{style}m{text}\x1b[0m" if text else text


def without_controls(text: str) -> str:
    """A model's text, with only the characters that control a terminal replaced by escapes. Zero
    width joiners and wide spaces, which `plain` replaces, are kept: they are part of the text.
    """
    return text.translate(_CONTROLS)
