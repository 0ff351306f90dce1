"""The slow tier of a CPU: a file that threads read into our buffers, bypassing the page cache.

A mapping would fault on the hot path, page by page, and fill the page cache with data that is read
once per period. Direct reads (O_DIRECT) do neither. On file systems without them, reads go through
the page cache and are dropped from it afterwards.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap

from sirius_runtime.errors import ArtifactError, BackendError
from sirius_runtime.tiers.placement import PAGE
from sirius_runtime.tiers.stream import Load
from sirius_runtime.watched_file import WatchedFile

READERS = 4
"""Threads that read. A virtual disk gave 0.6 to 0.9 GB/s with one, 1.1 to 1.3 with two or more."""

CHUNK = 4 * 2**20
"""Bytes of one read."""

TRIES = 3
"""Successive reads that may give less than a page each."""


@dataclass(frozen=True)
class _Reads:
    """The reads of one block."""

    parts: list[Future[None]]

    def wait(self) -> None:
        for part in self.parts:
            part.result()

    def cancel(self) -> None:
        """Cancels the reads that have not begun, and waits for the others."""
        for part in self.parts:
            if not part.cancel():
                part.exception()


class DirectFile:
    """Reads the file into `arena`, which is page-aligned. Call `close` at the end."""

    def __init__(self, file: WatchedFile, arena: mmap) -> None:
        if not hasattr(os, "preadv"):
            raise BackendError(
                "this system has no preadv, which streaming weights needs: leave out the memory "
                "budget"
            )
        self._file, self._arena = file, memoryview(arena)
        self._descriptor, self.direct = _opened(file)
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="sirius-read")
        self._closed = weakref.finalize(self, _close, self._pool, self._descriptor)

    def fetch(self, load: Load) -> _Reads:
        """Begins to read a block into its place in the arena."""
        if os.getpid() != self._process:
            raise BackendError(
                "the process was forked after the model was loaded, and a fork does not copy the "
                "threads that read its weights: load the model in the child, or start the child by "
                "spawn"
            )
        return _Reads(
            [
                self._pool.submit(
                    self._read,
                    load.first + begin,
                    self._arena[load.place + begin : load.place + min(begin + CHUNK, load.room)],
                    load.needed - begin,
                )
                for begin in range(0, load.room, CHUNK)
            ]
        )

    def release(self) -> None:
        """See `Tier`. Nothing to do: CPU kernels have read their blocks when they return."""

    def rows(self, start: int, size: int, rows: Sequence[int], into: memoryview) -> None:
        """Reads rows of `size` bytes of the matrix at offset `start` into `into`, one after
        another.
        """
        parts = [
            self._pool.submit(self._read_bytes, start + row * size, into[i * size : (i + 1) * size])
            for i, row in enumerate(rows)
        ]
        for part in parts:
            part.result()

    def chunks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes [start, end) of the file in chunks; each is valid until the next one."""
        first = start // PAGE * PAGE
        view = memoryview(mmap(-1, min(CHUNK, -(-(end - first) // PAGE) * PAGE)))
        for at in range(first, end, CHUNK):
            needed = min(CHUNK, end - at)
            self._read(at, view, needed)
            yield view[max(start - at, 0) : needed]

    def close(self) -> None:
        """Waits for reads that have begun, cancels the others, and closes the file."""
        self._closed()

    def _read_bytes(self, start: int, into: memoryview) -> None:
        begin = 0
        for chunk in self.chunks(start, start + len(into)):
            into[begin : begin + len(chunk)] = chunk
            begin += len(chunk)

    def _read(self, offset: int, into: memoryview, needed: int) -> None:
        """Fills `into` from the file. At least `needed` bytes must be read; the others may lie
        beyond the end of the file, whose last page is rarely whole.
        """
        done, tries = 0, 0
        while done < min(needed, len(into)):
            try:
                count = os.preadv(self._descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(offset + done, error.strerror or str(error)) from error
            if not count:
                self._file.check()
                raise ArtifactError(
                    f"{self._file.path}: the file ended at byte {offset + done:,}, within its "
                    "weights; load a whole file"
                )
            done += count
            if self.direct and done < min(needed, len(into)):
                done -= done % PAGE  # a read may be short, and a direct one begins at a page
                tries = tries + 1 if count < PAGE else 0
                if tries == TRIES:
                    self._file.check()
                    raise self._unreadable(offset + done, f"a read gives only {count:,} bytes")
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, done, os.POSIX_FADV_DONTNEED)

    def _unreadable(self, offset: int, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self._file.path}: its weights can't be read, at byte {offset:,} ({reason}); check "
            "the disk, and load the model again"
        )


def _opened(file: WatchedFile) -> tuple[int, bool]:
    """A new descriptor of the same file, and whether its reads are direct."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            descriptor = file.reopened(direct)
        except OSError:
            return file.reopened(), False
        with mmap(-1, PAGE) as page, memoryview(page) as view:
            try:
                os.preadv(descriptor, [view], 0)
                return descriptor, True
            except OSError:  # the file system accepts O_DIRECT but can't read
                os.close(descriptor)
    return file.reopened(), False


def _close(pool: ThreadPoolExecutor, descriptor: int) -> None:
    pool.shutdown(cancel_futures=True)
    os.close(descriptor)
