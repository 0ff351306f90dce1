"""How many nodes, slots and tokens there are: arithmetic that every back end shares."""

from __future__ import annotations

import math
import os

PREFILL_CHUNK = 512  # tokens of a prompt that one prefill call takes
MOST_KERNEL_THREADS = 256  # as in kernels/csrc/threads.h
_THREADS_A_CORE = 16  # more only wait for one another


def node_count(size: int, width: int) -> int:
    """Nodes of a whole tree: N = (K - 1) w + 1."""
    return (size - 1) * width + 1


def most_threads() -> int:
    """The most threads of one operator here: what the kernels take, or a machine has. Systems and
    libraries abort where threads can't be started."""
    cores = os.cpu_count() or 1
    return max(cores, min(MOST_KERNEL_THREADS, _THREADS_A_CORE * cores))


def cache_slots(tokens: int, period: int, width: int) -> int:
    """Cache slots for rows of `tokens`, prompt and answer: the block of a period follows the last
    committed token, also that of a row that has ended.
    """
    return math.ceil((tokens + node_count(period, width)) / 64) * 64
