"""The ZIP layer of an artifact: one mapping of the file, and where each entry lies in it.

The file is not trusted: the names, kinds, sizes and places of entries are checked before any entry
is read.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import stat
import struct
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

from sirius_runtime.errors import ArtifactError
from sirius_runtime.watched_file import WatchedFile

ALIGNMENT = 64  # of every entry's data: a cache line, and the widest vector load of today's CPUs
MAX_JSON_BYTES = 256 * 2**20
MOST_DIRECTORY_BYTES = 16 * 2**20  # a ZIP directory takes about 100 bytes per entry

AGAIN = "the file is damaged or was altered: download it again, or compile it again"
NOT_OURS = "give the path of a model.sirius that sirius-compile wrote"
UPDATE = "update sirius-compile"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_UTF8_NAME, _ENCRYPTED = 0x800, 0x1 | 0x40 | 0x2000  # general purpose flags: APPNOTE.TXT 4.4.4
# Linux counts a private writable mapping against RAM and refuses a larger one, unless the mapping
# reserves no memory (MAP_NORESERVE). Python names the flag from 3.13 on.
_PRIVATE = (
    mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else None
)


@dataclass(frozen=True)
class Image:
    """The mapped file; or a copy of it in memory, for which `file` is None."""

    path: Path
    buffer: mmap.mmap
    file: WatchedFile | None

    def fault(self, what: str, remedy: str = AGAIN) -> ArtifactError:
        return _fault(self.path, what, remedy)

    def view(self, span: Span) -> memoryview:
        return memoryview(self.buffer)[span.start : span.end]


class Span(NamedTuple):
    """Where an entry lies: its local header, its data [start, end); and the data's crc32."""

    header: int
    start: int
    end: int
    crc: int


def name_fault(name: str) -> str | None:
    """Why `name` can't name an entry, or None where it can."""
    parts = name.split("/")
    if name.startswith("/"):
        return "is an absolute path"
    if re.match("[A-Za-z]:", name):
        return "starts with a drive letter"
    if "\\" in name:
        return "has a backslash"
    if ".." in parts:
        return "has a '..' component"
    if "" in parts or "." in parts:
        return "has an empty or '.' component"
    if not name.isprintable():
        return "has characters that can't be printed"
    return None


def _fault(path: Path, what: str, remedy: str = AGAIN) -> ArtifactError:
    return ArtifactError(f"{path}: {what}; {remedy}")


def map_file(path: Path, *, copy: bool = False) -> tuple[Image, list[zipfile.ZipInfo]]:
    """The mapped file and its ZIP directory, both read through one file descriptor. With `copy`,
    the whole file is read into memory, and later changes to it have no effect.

    Asks for pages of 2 MiB: every decoding step reads all weights, and with pages of 4 KiB up to a
    fifth of that time goes to TLB misses.
    """
    try:
        if not path.exists():
            raise _fault(path, "there is no such file", NOT_OURS)
        if not path.is_file():
            raise _fault(path, "it is a folder or a device, not a file", NOT_OURS)
        with path.open("rb") as file:
            infos = _directory(path, file)
            if copy:
                return Image(path, _read(path, file), None), infos
            watched, buffer = WatchedFile(path, file.fileno()), _map(file.fileno())
            return Image(path, buffer, watched), infos
    except OSError as error:
        remedy = "check its permissions and the disk"
        raise _fault(path, f"it can't be read ({error.strerror or error})", remedy) from error


def _map(descriptor: int) -> mmap.mmap:
    if _PRIVATE is None:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    buffer = mmap.mmap(descriptor, 0, flags=_PRIVATE, prot=protection)
    want_large_pages(buffer)
    return buffer


def _read(path: Path, file: BinaryIO) -> mmap.mmap:
    """The whole file, read into anonymous memory."""
    size = file.seek(0, os.SEEK_END)
    buffer = mmap.mmap(-1, size)
    want_large_pages(buffer)
    file.seek(0)
    with memoryview(buffer) as view:
        done = 0
        while done < size and (count := cast(io.BufferedReader, file).readinto(view[done:])):
            done += count
    if done < size:
        raise _fault(path, f"it ended after {done} of its {size} bytes while it was read")
    return buffer


def want_large_pages(buffer: mmap.mmap) -> None:
    """Asks for pages of 2 MiB, where the system has them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)


class _Sparing:
    """A file for zipfile to read, with a limit on the size of one read.

    zipfile reads the whole directory at once, whatever size the file claims for it, and its objects
    take about ten times as much memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self._read = file.read

    def read(self, size: int = -1) -> bytes:
        if size > MOST_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"it claims to have {size} bytes")
        # zipfile passes -1 only to read the last 64 KiB.
        return self._read(size if size >= 0 else MOST_DIRECTORY_BYTES)


def _directory(path: Path, file: BinaryIO) -> list[zipfile.ZipInfo]:
    start = file.read(len(_LOCAL_SIGNATURE))
    if not start:
        raise _fault(path, "the file is empty")
    if start != _LOCAL_SIGNATURE:
        raise _fault(path, "it is not a ZIP file, so not an artifact", NOT_OURS)
    try:
        with zipfile.ZipFile(cast(IO[bytes], _Sparing(file))) as archive:
            return archive.infolist()
    # On a damaged directory zipfile raises many kinds of exceptions.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        what = (
            f"the ZIP directory at the end is missing or broken ({error}): is the file truncated?"
        )
        raise _fault(path, what) from error


def find_spans(image: Image, infos: Iterable[zipfile.ZipInfo]) -> dict[str, Span]:
    """Where each entry lies, by name. Checks names, kinds and places; raises ArtifactError."""
    spans: dict[str, Span] = {}
    for info in infos:
        # Not `filename`: zipfile cuts that at a NUL and replaces separators.
        name = info.orig_filename
        if reason := name_fault(name):
            raise image.fault(f"the name of entry {name!r} {reason}")
        if name in spans:
            raise image.fault(f"entry {name!r} is a duplicate: the name occurs twice")
        if reason := _kind_fault(info):
            raise image.fault(f"entry {name!r} {reason}")
        spans[name] = _span(image, info)
    in_order = sorted(spans.items(), key=lambda item: item[1].header)
    for (first, before), (second, after) in pairwise(in_order):
        if after.header < before.end:
            raise image.fault(f"the data of entries {first!r} and {second!r} overlap")
    return spans


def _kind_fault(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a symbolic link"
    if kind not in (0, stat.S_IFREG):
        return "is not a regular file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return "is compressed, but must be stored"
    if info.orig_filename.endswith(".json") and info.file_size > MAX_JSON_BYTES:
        return f"is too large for JSON: {info.file_size} bytes, at most {MAX_JSON_BYTES}"
    return None


def _span(image: Image, info: zipfile.ZipInfo) -> Span:
    name, header, size = info.orig_filename, info.header_offset, len(image.buffer)
    if not 0 <= header <= size - _LOCAL_HEADER.size:
        raise image.fault(f"entry {name!r} lies outside the file")
    fields = _LOCAL_HEADER.unpack_from(image.buffer, header)
    name_start = header + _LOCAL_HEADER.size
    name_end = name_start + fields[-2]
    start = name_end + fields[-1]
    raw_name = name.encode("utf-8" if info.flag_bits & _UTF8_NAME else "cp437")
    if fields[0] != _LOCAL_SIGNATURE or image.buffer[name_start:name_end] != raw_name:
        raise image.fault(f"the local header of entry {name!r} contradicts the ZIP directory")
    if start + info.file_size > size:
        raise image.fault(f"the data of entry {name!r} end outside the file")
    if start % ALIGNMENT:
        what = f"the data of entry {name!r} are not aligned to {ALIGNMENT} bytes"
        raise image.fault(f"{what}: was the file repacked by a ZIP tool?")
    return Span(header, start, start + info.file_size, info.CRC)
