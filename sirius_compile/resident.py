"""Bounds the pages of mapped files that a process holds.

Weights are mapped from files: the checkpoint's, the workspace's, the artifact's. What was read
stays resident until the system needs the memory, so a process that reads all weights seems to need
all of them. Here a thread looks every few milliseconds, and where the pages of these files are more
than a limit, it gives them back to the system. They stay in its page cache, from which the next
read maps them again.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LARGE = 4 << 30
"""Bytes of weights from which on a compilation bounds its pages."""
SHARE = 0.2
"""Of the weights' bytes, that may be resident."""

_SECONDS = 0.01
_DONTNEED = 4  # Linux's MADV_DONTNEED
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+ +(/.*)")


@contextmanager
def bounded(files: Sequence[str], limit: int) -> Iterator[None]:
    """Within it, at most about `limit` bytes of mapped files are resident, if those whose paths
    begin with one of `files` are most of them. Nothing may be written to these through a mapping:
    it would be lost. Does nothing but on Linux.
    """
    if sys.platform != "linux":
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS):
            if resident_files() > limit:
                release(tuple(files))

    thread = threading.Thread(target=watch, name="resident", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def resident_files() -> int:
    """Bytes of mapped files that are resident in this process."""
    shared = int(Path("/proc/self/statm").read_text().split()[2])
    return shared * os.sysconf("SC_PAGE_SIZE")


def release(files: tuple[str, ...]) -> None:
    """Gives back the pages of the mapped files whose paths begin with one of `files`."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = _MAPPING.match(line)
        if found is not None and found[3].startswith(files):
            start, end = int(found[1], 16), int(found[2], 16)
            libc.madvise(start, end - start, _DONTNEED)
