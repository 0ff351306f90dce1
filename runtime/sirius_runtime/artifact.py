"""`model.sirius`, the artifact: its layout, and the reader that trusts none of it.

One ZIP, every entry stored, its data at a multiple of 64 bytes of the file:

    manifest.json                a Manifest: version, program, size and sha256 of the other files
    graphs/<entry>.json          one graph document an entry
    weights/<nnn>.safetensors    shards; each weight of the manifest once
    tokenizer/…, generation_config.json, …

The reader maps the file once. Nothing is unpickled and nothing is extracted: weights are views of
the mapping. The safetensors library is the oracle of our tests, but it reads and writes whole files
or whole buffers; using a shard in place inside a ZIP takes the few lines of header code here and in
`artifact_writer`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import torch

from sirius_runtime.errors import ArtifactError, SiriusError
from sirius_runtime.spec import (
    FORMAT_VERSION,
    JSON,
    FileRecord,
    Manifest,
    ProgramSpec,
    WeightSpec,
    from_json,
)

MANIFEST = "manifest.json"
WEIGHTS = "weights/"
ALIGNMENT = 64  # of every entry's data: a cache line, and the widest vector load of today's CPUs
MAX_JSON_BYTES = 256 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""safetensors' names of dtypes."""

_AGAIN = "the file is damaged or was altered: download it again, or compile it again"
_NOT_OURS = "give the path of a model.sirius that sirius-compile wrote"
_UPDATE = "update sirius-compile"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_UTF8_NAME, _ENCRYPTED = 0x800, 0x1 | 0x40 | 0x2000  # general purpose flags: APPNOTE.TXT 4.4.4
_HASH_THREADS = min(8, os.cpu_count() or 1)
# Linux counts a private writable mapping against memory and refuses one larger than RAM, unless it
# reserves nothing. Python names the flag from 3.13 on.
_PRIVATE = (
    mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else None
)


class Artifact:
    """An opened artifact. Every entry was checked on the way in (see `open`)."""

    def __init__(
        self,
        image: _Image,
        spans: dict[str, _Span],
        manifest: Manifest,
        slots: dict[str, _Slot],
    ) -> None:
        self.path = image.path
        self.manifest = manifest
        self._image: _Image | None = image
        self._spans = spans
        self._slots = slots

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Artifact:
        """Opens and checks the artifact at `path`.

        With `verify`, the sha256 of every file is compared with the manifest's; without, those of
        the weight shards are not. All other checks are always made. Raises ArtifactError naming the
        path, what is wrong with it and what to do.
        """
        image, infos = _map(Path(path))
        spans = _spans(image, infos)
        manifest = _manifest(image, spans)
        _check_files(image, spans, manifest.files)
        names = [n for n in manifest.files if verify or not n.startswith(WEIGHTS)]
        _check_hashes(image, spans, manifest.files, names)
        return cls(image, spans, manifest, _slots(image, spans, manifest.program.weights))

    @property
    def program(self) -> ProgramSpec:
        """The compiled program's spec."""
        return self.manifest.program

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the entries (`manifest.json` included) that start with `prefix`."""
        return sorted(name for name in self._spans if name.startswith(prefix))

    def read_bytes(self, name: str) -> bytes:
        """A copy of the entry's bytes; raises ArtifactError where there is none of that name."""
        image = self._opened()
        if name not in self._spans:
            raise image.fault(f"there is no entry {name!r}", "compile it again")
        return bytes(image.view(self._spans[name]))

    def read_json(self, name: str) -> JSON:
        """The entry's JSON value; raises ArtifactError where it is missing or not JSON."""
        return _parse(self._opened(), name, self.read_bytes(name))

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight by name, with the dtype and shape of its spec, without a copy.

        The tensors are views of one private mapping of the file, which lives as long as any of
        them: pages are shared with other processes until written, and what is written never reaches
        the file (but is seen by every view of this `Artifact`).
        """
        buffer = self._opened().buffer
        return {name: _tensor(buffer, slot) for name, slot in self._slots.items()}

    def close(self) -> None:
        """Lets go of the file; tensors from `weights` stay valid."""
        # Not mmap.close(): torch keeps the mmap object alive but holds no buffer export, so closing
        # it would pull the memory away from under the tensors.
        self._image = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self) -> _Image:
        if self._image is None:
            raise SiriusError(f"{self.path}: the artifact is closed; open it again")
        return self._image


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``, as a WeightSpec spells it."""
    return str(dtype).removeprefix("torch.")


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


@dataclass(frozen=True)
class _Image:
    """The mapped file."""

    path: Path
    buffer: mmap.mmap

    def fault(self, what: str, remedy: str = _AGAIN) -> ArtifactError:
        return _fault(self.path, what, remedy)

    def view(self, span: _Span) -> memoryview:
        return memoryview(self.buffer)[span.start : span.end]


class _Span(NamedTuple):
    """Where an entry lies: its local header, its data [start, end); and the data's crc32."""

    header: int
    start: int
    end: int
    crc: int


class _Slot(NamedTuple):
    """Where a tensor lies in the file, [start, end)."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _TensorHeader:
    """One tensor in the header of a safetensors file; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _fault(path: Path, what: str, remedy: str = _AGAIN) -> ArtifactError:
    return ArtifactError(f"{path}: {what}; {remedy}")


def _map(path: Path) -> tuple[_Image, list[zipfile.ZipInfo]]:
    """The mapped file and its directory, both read through one file descriptor."""
    if not path.exists():
        raise _fault(path, "there is no such file", _NOT_OURS)
    if not path.is_file():
        raise _fault(path, "it is a folder or a device, not a file", _NOT_OURS)
    try:
        with path.open("rb") as file:
            infos = _directory(path, file)
            fd = file.fileno()
            if _PRIVATE is None:
                return _Image(path, mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)), infos
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return _Image(path, mmap.mmap(fd, 0, flags=_PRIVATE, prot=protection)), infos
    except OSError as error:
        remedy = "check its permissions and the disk"
        raise _fault(path, f"it can't be read ({error.strerror or error})", remedy) from error


def _directory(path: Path, file: BinaryIO) -> list[zipfile.ZipInfo]:
    start = file.read(len(_LOCAL_SIGNATURE))
    if not start:
        raise _fault(path, "the file is empty")
    if start != _LOCAL_SIGNATURE:
        raise _fault(path, "it is not a ZIP file, so not an artifact", _NOT_OURS)
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    # Of a damaged directory zipfile raises whatever its parts raise.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        what = (
            f"the ZIP directory at the end is missing or broken ({error}): is the file truncated?"
        )
        raise _fault(path, what) from error


def _spans(image: _Image, infos: Iterable[zipfile.ZipInfo]) -> dict[str, _Span]:
    """Each entry's place, once its name, kind and place have been checked."""
    spans: dict[str, _Span] = {}
    for info in infos:
        # `filename` is what zipfile made of it: cut at a NUL, separators replaced.
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


def _span(image: _Image, info: zipfile.ZipInfo) -> _Span:
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
    return _Span(header, start, start + info.file_size, info.CRC)


def _parse(image: _Image, name: str, data: bytes) -> JSON:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise image.fault(f"{name} is not JSON ({error})") from error


def _manifest(image: _Image, spans: dict[str, _Span]) -> Manifest:
    if MANIFEST not in spans:
        raise image.fault(f"it has no {MANIFEST}, so it is not an artifact", _NOT_OURS)
    data = bytes(image.view(spans[MANIFEST]))
    # No hash covers the manifest; the ZIP's own checksum finds accidents.
    if zlib.crc32(data) != spans[MANIFEST].crc:
        raise image.fault(f"the checksum of {MANIFEST} is wrong")
    document = _parse(image, MANIFEST, data)
    _check_version(image, document)
    try:
        return from_json(Manifest, document)
    except (ArtifactError, OverflowError) as error:
        raise image.fault(f"{MANIFEST} is malformed ({error})") from error


def _check_version(image: _Image, document: JSON) -> None:
    """Compares the major version before anything else is read: all else may differ with it."""
    version = document.get("format_version") if isinstance(document, dict) else None
    if not (isinstance(version, list) and [type(v) for v in version] == [int, int]):
        raise image.fault(f"{MANIFEST} is malformed (format_version is not a pair of numbers)")
    if version[0] != FORMAT_VERSION[0]:
        known = FORMAT_VERSION[0]
        what = f"its format version is {version[0]}.{version[1]}, this reader knows {known}.x"
        raise image.fault(what, _UPDATE if version[0] > known else "compile it again")


def _check_files(image: _Image, spans: dict[str, _Span], files: dict[str, FileRecord]) -> None:
    found = spans.keys() - {MANIFEST}
    for name in sorted(files.keys() - found):
        raise image.fault(f"entry {name!r} of the manifest is missing")
    for name in sorted(found - files.keys()):
        raise image.fault(f"extra entry {name!r} is not in the manifest")
    for name, record in files.items():
        size = spans[name].end - spans[name].start
        if size != record.size:
            raise image.fault(f"the size of entry {name!r} is {size}, not {record.size} bytes")


def _check_hashes(
    image: _Image, spans: dict[str, _Span], files: dict[str, FileRecord], names: Sequence[str]
) -> None:
    def digest(name: str) -> str:
        return hashlib.sha256(image.view(spans[name])).hexdigest()  # hashlib lets go of the GIL

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = zip(names, pool.map(digest, names), strict=True)
        wrong = [name for name, found in digests if found != files[name].sha256]
    if wrong:
        raise image.fault(f"wrong sha256 of {', '.join(map(repr, wrong))}")


def _slots(image: _Image, spans: dict[str, _Span], specs: Sequence[WeightSpec]) -> dict[str, _Slot]:
    """The place of every weight, in the manifest's order, once the shards agree with it."""
    found: dict[str, _Slot] = {}
    for shard in sorted(name for name in spans if name.startswith(WEIGHTS)):
        for name, slot in _shard_slots(image, shard, spans[shard]).items():
            if name in found:
                raise image.fault(f"weight {name!r} is a duplicate: two shards hold it")
            found[name] = slot
    slots: dict[str, _Slot] = {}
    for spec in specs:
        if spec.name in slots:
            raise image.fault(f"weight {spec.name!r} is a duplicate: the manifest lists it twice")
        if spec.name not in found:
            raise image.fault(f"weight {spec.name!r} of the manifest is missing from the shards")
        slot = slots[spec.name] = found[spec.name]
        if (dtype_name(slot.dtype), slot.shape) != (spec.dtype, spec.shape):
            stored = f"{dtype_name(slot.dtype)} {list(slot.shape)}"
            expected = f"{spec.dtype} {list(spec.shape)}"
            raise image.fault(f"weight {spec.name!r} is {stored}, the manifest says {expected}")
    for name in sorted(found.keys() - slots.keys()):
        raise image.fault(f"weight {name!r} of the shards is not in the manifest")
    return slots


def _shard_slots(image: _Image, shard: str, span: _Span) -> dict[str, _Slot]:
    """Reads a safetensors header: 8 bytes little-endian length, then JSON; the tensors follow."""
    view = image.view(span)
    length = int.from_bytes(view[:8], "little")
    if not 0 < length <= min(len(view) - 8, MAX_JSON_BYTES):
        raise image.fault(f"the safetensors header of {shard} is malformed (its length is wrong)")
    header = _parse(image, f"the safetensors header of {shard}", bytes(view[8 : 8 + length]))
    if not isinstance(header, dict):
        raise image.fault(f"the safetensors header of {shard} is malformed (not an object)")
    data = range(span.start + 8 + length, span.end)
    slots: dict[str, _Slot] = {}
    for name, fields in header.items():
        if name != "__metadata__":  # free text, by the format; of no use here
            slots[name] = _slot(image, f"weight {name!r} of {shard}", fields, data)
    in_order = sorted((slot.start, slot.end, name) for name, slot in slots.items())
    for (_, end, first), (start, _, second) in pairwise(in_order):
        if start < end:
            raise image.fault(f"the data of weights {first!r} and {second!r} of {shard} overlap")
    return slots


def _slot(image: _Image, what: str, fields: JSON, data: range) -> _Slot:
    """The place of one tensor; `data`: the bytes of the file that hold its shard's tensors."""
    try:
        header = from_json(_TensorHeader, fields, what)
    except ArtifactError as error:
        raise image.fault(f"malformed safetensors header ({error})") from error
    if header.dtype not in DTYPES:
        raise image.fault(f"{what} has the unknown dtype {header.dtype!r}", _UPDATE)
    dtype, shape = DTYPES[header.dtype], header.shape
    begin, end = (data.start + offset for offset in header.data_offsets)
    if not data.start <= begin <= end <= data.stop:
        raise image.fault(f"{what} lies outside its shard")
    # torch multiplies the other sizes of an empty tensor too (strides), in 64 bits.
    sizes_fit = min(shape, default=0) >= 0 and math.prod(s or 1 for s in shape) < 2**59
    if not sizes_fit or end - begin != math.prod(shape) * dtype.itemsize:
        raise image.fault(f"{what}: shape {list(shape)} contradicts its {end - begin} bytes")
    if begin % dtype.itemsize:
        raise image.fault(f"{what} is not aligned to its elements")
    return _Slot(begin, end, dtype, shape)


def _tensor(buffer: mmap.mmap, slot: _Slot) -> torch.Tensor:
    count = math.prod(slot.shape)
    if count == 0:  # torch.frombuffer refuses it
        return torch.empty(slot.shape, dtype=slot.dtype)
    flat = torch.frombuffer(buffer, dtype=slot.dtype, count=count, offset=slot.start)
    return flat.view(slot.shape)
