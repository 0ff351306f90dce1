"""How many threads one operator may have: where they can't be started, libraries abort."""

from __future__ import annotations

import os

from sirius_runtime.errors import ConfigError, shown

MOST_KERNEL_THREADS = 256  # as in kernels/csrc/threads.h
_A_CORE = 16  # more only wait for one another


def most_threads() -> int:
    """The most threads of one operator here: what the kernels take, or what the machine has."""
    cores = os.cpu_count() or 1
    return max(cores, min(MOST_KERNEL_THREADS, _A_CORE * cores))


def check_threads(threads: int) -> None:
    """Raises ConfigError for threads of one operator that this machine can't have."""
    if threads < 1:
        raise ConfigError(f"threads must be >= 1, got {threads}")
    if threads > (most := most_threads()):
        raise ConfigError(
            f"threads must be at most {most} here ({os.cpu_count()} cores), got "
            f"{shown(str(threads))}"
        )
