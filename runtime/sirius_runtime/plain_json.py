"""Reads untrusted JSON, with a limit on the number of values and so on memory."""

from __future__ import annotations

import json

from sirius_runtime.spec import JSON

MOST_VALUES = 2 * 2**20
"""Most values of a document: a graph of a hundred layers has a tenth of that."""
_MARKS = b"[{,:"
"""Every value except the outermost follows one of these characters, so their number bounds that of
the values. A Python value takes up to a hundred bytes, so many short values would take fifty times
the memory of their text.
"""


def read(data: bytes, most: int = MOST_VALUES) -> JSON:
    """The value of a JSON text. Raises ValueError if the text is not JSON or has more than `most`
    values, and RecursionError if it is nested too deeply.
    """
    if sum(map(data.count, (bytes([mark]) for mark in _MARKS))) > most:
        raise ValueError(f"it has more than {most} values")
    return json.loads(data)
