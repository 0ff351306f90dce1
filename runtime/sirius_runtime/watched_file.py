"""The file behind a mapping, which others may change while it is used.

A mapping shows what is written to the file after it was checked; where the file was cut short, the
system kills a process that reads on (SIGBUS). Only a copy prevents either. But the file's size and
time of last change reveal both, and reading them takes a microsecond.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from sirius_runtime.errors import ArtifactError


class WatchedFile:
    """An open file, as it was when it was opened.

    It is held by its descriptor: where another file is renamed over its name, which is how
    artifacts are replaced, the one that is mapped stays as it is.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """`descriptor` is duplicated; the caller may close it."""
        self.path = path
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._seen = self._state()

    def check(self) -> None:
        """Raises ArtifactError where the file has changed since."""
        try:
            state = self._state()
        except OSError as error:
            raise self._fault(f"can't be asked for its size ({error.strerror})") from error
        if state != self._seen:
            (before, _), (now, _) = self._seen, state
            if now != before:
                raise self._fault(f"has {now} bytes now, and had {before} when it was opened")
            raise self._fault("was written to after it was opened")

    def reopened(self, flags: int = 0) -> int:
        """Another descriptor of the same file, opened with these flags of `os.open` more."""
        try:
            return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | flags)
        except FileNotFoundError:  # no Linux
            if flags:
                raise
            return os.dup(self._descriptor)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _fault(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: the file {what}, and its weights are used where they lie; load it "
            "again. To replace it, rename another file over it, or load it with copy=True (--copy)"
        )
