"""Detects changes of a mapped file while it is used.

A mapping shows bytes that are written to the file after it was checked. If the file is truncated,
the system kills a process that reads beyond its end (SIGBUS). Only a copy prevents both. But both
change the file's size or modification time, and reading these takes a microsecond.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from sirius_runtime.errors import ArtifactError


class WatchedFile:
    """An open file, with its size and modification time when it was opened.

    It is identified by its descriptor: renaming another file over its path, which is how artifacts
    are replaced, does not change the mapped file.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """`descriptor` is duplicated; the caller may close it."""
        self.path = path
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._seen = self._state()

    def check(self) -> None:
        """Raises ArtifactError where the file has changed since it was opened."""
        try:
            state = self._state()
        except OSError as error:
            raise self._fault(f"has a size that can't be read ({error.strerror})") from error
        if state != self._seen:
            (before, _), (now, _) = self._seen, state
            if now != before:
                raise self._fault(f"has {now} bytes now, and had {before} when it was opened")
            raise self._fault("was written to after it was opened")

    def reopened(self, flags: int = 0) -> int:
        """A new descriptor of the same file, opened with these additional flags of `os.open`."""
        try:
            return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | flags)
        except FileNotFoundError:  # not Linux
            if flags:
                raise
            return os.dup(self._descriptor)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _fault(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: the file {what}, and its weights are used from the file itself; load it "
            "again. To replace it, rename another file over it, or load it with copy=True (--copy)"
        )
