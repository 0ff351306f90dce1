"""Who may trace: one thread at a time.

Tracing changes what belongs to the whole process: transformers' registries of functions, torch's
default dtype, methods that torch.export patches, and the entries that the trace of a period calls.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_LOCK = threading.RLock()
_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function that traces wait until no other thread runs one."""

    @functools.wraps(function)
    def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting
