"""Limits the threads of one operator: libraries abort if they can't start the threads."""

from __future__ import annotations

import os

from sirius_runtime.errors import ConfigError, shown

MOST_KERNEL_THREADS = 256  # as in kernels/csrc/threads.h
_PER_CORE = 16


def most_threads() -> int:
    """The most threads of one operator on this machine: 16 per core up to the kernels' limit, and
    always one per core.
    """
    cores = os.cpu_count() or 1
    return max(cores, min(MOST_KERNEL_THREADS, _PER_CORE * cores))


def check_threads(threads: int) -> None:
    """Raises ConfigError for a number of threads that is out of range on this machine."""
    if threads < 1:
        raise ConfigError(f"threads must be >= 1, got {threads}")
    if threads > (most := most_threads()):
        raise ConfigError(
            f"threads must be at most {most} here ({os.cpu_count()} cores), got "
            f"{shown(str(threads))}"
        )
