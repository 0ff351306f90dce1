"""Raises an error in a forked child that would hang.

A forked child does not have its parent's threads. PyTorch (OpenMP) and ONNX Runtime start thread
pools when something first runs on several threads. A child that is forked after that, and runs on
several threads, would wait forever for threads of its parent.
"""

from __future__ import annotations

import os

from sirius_runtime.errors import GenerationError

_pool = False  # whether this process has started threads that a child would lack
_lost = False  # whether this process is a child without them


def ran_on(threads: int) -> None:
    """Records that operators have run on so many threads."""
    global _pool
    _pool = _pool or threads > 1


def check_threads_live(threads: int) -> None:
    """Raises GenerationError where running on so many threads would hang."""
    if _lost and threads > 1:
        raise GenerationError(
            "this process was forked from one that had generated before, and a fork does not copy "
            "threads: generating here would wait for them forever. Start such processes by spawn "
            "(multiprocessing.get_context('spawn')), fork before anything is generated, or set one "
            "thread (torch.set_num_threads(1))"
        )


def _in_child() -> None:
    global _lost
    _lost = _lost or _pool


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
