"""A forked child lacks its parent's threads; if it waits for them, it hangs.

The thread pools of PyTorch (OpenMP) and ONNX Runtime exist once something has run on several
threads. A forked child that runs on several threads would then wait for its parent's threads for
ever; it gets an error instead.
"""

from __future__ import annotations

import os

from sirius_runtime.errors import GenerationError

_pool = False  # whether this process has started threads that a child would lack
_lost = False  # whether they belong to a parent


def ran_on(threads: int) -> None:
    """Notes that operators have run on so many threads."""
    global _pool
    _pool = _pool or threads > 1


def check_threads_live(threads: int) -> None:
    """Raises GenerationError where running on so many threads would hang."""
    if _lost and threads > 1:
        raise GenerationError(
            "this process was forked from one that had generated before, and its threads did not "
            "come along: generating here would wait for them for ever. Start such processes by "
            "spawn (multiprocessing.get_context('spawn')), fork before anything is generated, or "
            "set one thread (torch.set_num_threads(1))"
        )


def _in_child() -> None:
    global _lost
    _lost = _lost or _pool


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
