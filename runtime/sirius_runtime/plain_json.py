"""Reads untrusted JSON, if its values can't take much more memory than its text."""

from __future__ import annotations

import json

from sirius_runtime.spec import JSON

MOST_VALUES = 2 * 2**20
"""Of a document: a graph of a hundred layers has a tenth of it."""
_MARKS = b"[{,:"
"""There are at least as many of these as values, but for the outermost. A value of Python's has up
to a hundred bytes, so that short ones would take fifty times their text.
"""


def read(data: bytes, most: int = MOST_VALUES) -> JSON:
    """The value of a JSON text. Raises ValueError if the text is not JSON or has more than `most`
    values, and RecursionError if it is nested too deeply.
    """
    if sum(map(data.count, (bytes([mark]) for mark in _MARKS))) > most:
        raise ValueError(f"it has more than {most} values")
    return json.loads(data)
