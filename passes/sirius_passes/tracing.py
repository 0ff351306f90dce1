"""A lock for tracing, so that one thread traces at a time.

Tracing changes state of the whole process: transformers' registries of functions, torch's default
dtype, methods that torch.export patches, and the entries that the trace of a period calls.
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
    """Decorates a function that traces: a call waits while another thread is in such a function."""

    @functools.wraps(function)
    def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting
