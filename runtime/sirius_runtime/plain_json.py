"""JSON of files of strangers: read only where it can't take much more memory than its text."""

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
    """The value of a JSON text; raises ValueError for what is none, or has more values than `most`,
    and RecursionError for what is too deep.
    """
    if sum(map(data.count, (bytes([mark]) for mark in _MARKS))) > most:
        raise ValueError(f"it has more than {most} values")
    return json.loads(data)
