"""Bounds the resident memory of a process that maps large files.

Weights are memory-mapped from the checkpoint, the workspace and the artifact. Pages that were read
stay resident until the system needs the memory, so a process that reads all weights counts all of
them as its own. A thread checks the resident pages every few milliseconds, and releases those of
the mapped files once they exceed a limit. They stay in the system's page cache, from which the next
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
"""A compilation bounds its resident pages if the weights have more bytes than this."""
SHARE = 0.2
"""The share of the weights' bytes that may be resident."""

_SECONDS = 0.01
_DONTNEED = 4  # Linux's MADV_DONTNEED
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+ +(/.*)")


@contextmanager
def bounded(files: Sequence[str], limit: int) -> Iterator[None]:
    """A context in which at most about `limit` bytes of mapped files are resident.

    Only pages of files whose paths begin with one of `files` are released, so other files must be
    small. These files must not be written through a private mapping: the changes would be lost.
    Does nothing on systems other than Linux.
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
    """Releases the resident pages of the mapped files whose paths begin with one of `files`."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = _MAPPING.match(line)
        if found is not None and found[3].startswith(files):
            start, end = int(found[1], 16), int(found[2], 16)
            libc.madvise(start, end - start, _DONTNEED)
