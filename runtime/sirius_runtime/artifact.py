"""`model.sirius`, the artifact: its layout, and its reader, which does not trust the file.

One ZIP, every entry stored, its data at a multiple of 64 bytes of the file:

    manifest.json                a Manifest: version, program, size and sha256 of the other files
    graphs/<entry>.json          one graph document per entry
    weights/<nnn>.safetensors    shards; together they hold each weight of the manifest once
    tokenizer/…, generation_config.json, …

The reader maps the file once. Nothing is unpickled and nothing is extracted: weights are views of
the mapping (`safetensors_file` says why we read its headers ourselves). Only `weights` needs
PyTorch.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from sirius_runtime import plain_json
from sirius_runtime.artifact_zip import (
    MAX_JSON_BYTES,
    NOT_OURS,
    UPDATE,
    Image,
    Span,
    find_spans,
    map_file,
)
from sirius_runtime.errors import ArtifactError, SiriusError
from sirius_runtime.manifest_check import check_manifest
from sirius_runtime.safetensors_file import STORED_TYPES, StoredType
from sirius_runtime.spec import (
    JSON,
    KNOWN_MAJORS,
    FileRecord,
    Manifest,
    ProgramSpec,
    WeightSpec,
    from_json,
)
from sirius_runtime.watched_file import WatchedFile

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
WEIGHTS = "weights/"

_HASH_THREADS = min(8, os.cpu_count() or 1)


class Artifact:
    """An opened artifact, whose entries `open` has checked."""

    def __init__(
        self,
        image: Image,
        spans: dict[str, Span],
        manifest: Manifest,
        slots: dict[str, Slot],
    ) -> None:
        self.path = image.path
        self.manifest = manifest
        self._image: Image | None = image
        self._spans = spans
        self._slots = slots
        self._hashing: _Hashing | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: bool = True,
        copy: bool = False,
        *,
        weights_later: bool = False,
    ) -> Artifact:
        """Opens and checks the artifact at `path`.

        verify: compare the sha256 of the weight shards with the manifest's. All other files are
        always hashed, and all other checks are always made. copy: read the file into memory instead
        of mapping it. weights_later: hash the shards on other threads while the caller works; the
        caller must call `check_weights` before it trusts the weights. Raises ArtifactError naming
        the path, what is wrong with it and what to do.
        """
        image, infos = map_file(Path(path), copy=copy)
        spans = find_spans(image, infos)
        manifest = _manifest(image, spans)
        _check_files(image, spans, manifest.files)
        shards = [name for name in manifest.files if name.startswith(WEIGHTS)]
        others = [name for name in manifest.files if not name.startswith(WEIGHTS)]
        hashing = _Hashing(image, spans, manifest.files, shards) if verify else None
        try:
            _Hashing(image, spans, manifest.files, others).check()
            if hashing is not None and not weights_later:
                hashing.check()
            artifact = cls(image, spans, manifest, _slots(image, spans, manifest.program.weights))
        except BaseException:
            if hashing is not None:
                hashing.stop()
            raise
        artifact._hashing = hashing
        return artifact

    @property
    def program(self) -> ProgramSpec:
        """The compiled program's spec."""
        return self.manifest.program

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the entries (`manifest.json` included) that start with `prefix`."""
        return sorted(name for name in self._spans if name.startswith(prefix))

    def entries(self) -> Iterator[tuple[str, memoryview]]:
        """Every entry but the manifest, in the file's order, without a copy."""
        image = self._opened()
        for name, span in sorted(self._spans.items(), key=lambda item: item[1].start):
            if name != MANIFEST:
                yield name, image.view(span)

    def read_bytes(self, name: str) -> bytes:
        """A copy of the entry's bytes; raises ArtifactError where no entry has that name."""
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
        them. Pages are shared with other processes until they are written. A write never reaches
        the file, but every view of this `Artifact` sees it.
        """
        buffer = self._opened().buffer
        return {name: _tensor(buffer, slot) for name, slot in self._slots.items()}

    def weight_slots(self) -> tuple[mmap.mmap, Mapping[str, Slot]]:
        """The mapping that `weights` views, and where each weight lies in it. For back ends that
        do not use torch tensors, or read the file themselves.
        """
        return self._opened().buffer, self._slots

    @property
    def file(self) -> WatchedFile | None:
        """The mapped file; None where it was read into memory."""
        return self._opened().file

    def check_unchanged(self) -> None:
        """Raises ArtifactError where the mapped file has changed since it was opened."""
        if self.file is not None:
            self.file.check()

    def check_weights(self) -> None:
        """Waits until all shards are hashed; raises ArtifactError where a hash is wrong."""
        if self._hashing is not None:
            self._hashing.check()

    def check_weights_by(self, read: Callable[[int, int], Iterable[memoryview]]) -> None:
        """As `check_weights`, but without touching the mapping: `read(start, end)` gives the bytes
        [start, end) of the file, in parts.
        """
        image = self._opened()
        for name, record in self.manifest.files.items():
            if name.startswith(WEIGHTS):
                digest = hashlib.sha256()
                for part in read(self._spans[name].start, self._spans[name].end):
                    digest.update(part)
                if digest.hexdigest() != record.sha256:
                    raise image.fault(f"wrong sha256 of {name!r}")

    def close(self) -> None:
        """Releases the mapping; tensors from `weights` stay valid."""
        if self._hashing is not None:
            self._hashing.stop()
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

    def _opened(self) -> Image:
        if self._image is None:
            raise SiriusError(f"{self.path}: the artifact is closed; open it again")
        return self._image


class Slot(NamedTuple):
    """Where a tensor lies in the file, [start, end)."""

    start: int
    end: int
    dtype: StoredType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _TensorHeader:
    """One tensor in the header of a safetensors file; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _parse(image: Image, name: str, data: bytes) -> JSON:
    try:
        return plain_json.read(data)
    except (ValueError, RecursionError) as error:
        raise image.fault(f"{name} is not JSON ({error})") from error


def _manifest(image: Image, spans: dict[str, Span]) -> Manifest:
    if MANIFEST not in spans:
        raise image.fault(f"it has no {MANIFEST}, so it is not an artifact", NOT_OURS)
    data = bytes(image.view(spans[MANIFEST]))
    # No hash covers the manifest; the ZIP's own checksum finds accidents.
    if zlib.crc32(data) != spans[MANIFEST].crc:
        raise image.fault(f"the checksum of {MANIFEST} is wrong")
    document = _parse(image, MANIFEST, data)
    _check_version(image, document)
    try:
        manifest = from_json(Manifest, document)
        check_manifest(manifest)
        return manifest
    except (ArtifactError, RecursionError) as error:
        raise image.fault(f"{MANIFEST} is malformed ({error})") from error


def _check_version(image: Image, document: JSON) -> None:
    """Checks the major version first: all other fields may differ between major versions."""
    version = document.get("format_version") if isinstance(document, dict) else None
    if not (isinstance(version, list) and [type(v) for v in version] == [int, int]):
        raise image.fault(f"{MANIFEST} is malformed (format_version is not a pair of numbers)")
    if version[0] not in KNOWN_MAJORS:
        known = " and ".join(f"{major}.x" for major in KNOWN_MAJORS)
        what = f"its format version is {version[0]}.{version[1]}, this reader knows {known}"
        raise image.fault(what, UPDATE if version[0] > max(KNOWN_MAJORS) else "compile it again")


def _check_files(image: Image, spans: dict[str, Span], files: dict[str, FileRecord]) -> None:
    found = spans.keys() - {MANIFEST}
    for name in sorted(files.keys() - found):
        raise image.fault(f"entry {name!r} of the manifest is missing")
    for name in sorted(found - files.keys()):
        raise image.fault(f"extra entry {name!r} is not in the manifest")
    for name, record in files.items():
        size = spans[name].end - spans[name].start
        if size != record.size:
            raise image.fault(f"the size of entry {name!r} is {size}, not {record.size} bytes")


class _Hashing:
    """Hashes some entries by sha256, on background threads that start at once."""

    def __init__(
        self,
        image: Image,
        spans: dict[str, Span],
        files: dict[str, FileRecord],
        names: Sequence[str],
    ) -> None:
        def is_wrong(name: str) -> bool:
            # hashlib releases the GIL
            return hashlib.sha256(image.view(spans[name])).hexdigest() != files[name].sha256

        self._image, self._names = image, names
        self._pool = ThreadPoolExecutor(_HASH_THREADS)
        self._wrong = [self._pool.submit(is_wrong, name) for name in names]

    def check(self) -> None:
        """Waits for all hashes; raises ArtifactError where one differs from the manifest's."""
        found = zip(self._names, self._wrong, strict=True)
        wrong = [name for name, is_wrong in found if is_wrong.result()]
        self.stop()
        if wrong:
            raise self._image.fault(f"wrong sha256 of {', '.join(map(repr, wrong))}")

    def stop(self) -> None:
        """Cancels the hashes that have not begun, and waits for the others."""
        self._pool.shutdown(cancel_futures=True)


def _slots(image: Image, spans: dict[str, Span], specs: Sequence[WeightSpec]) -> dict[str, Slot]:
    """Where each weight lies, in the manifest's order. Checks that the shards hold exactly the
    manifest's weights.
    """
    found: dict[str, Slot] = {}
    for shard in sorted(name for name in spans if name.startswith(WEIGHTS)):
        for name, slot in _shard_slots(image, shard, spans[shard]).items():
            if name in found:
                raise image.fault(f"weight {name!r} is a duplicate: two shards hold it")
            found[name] = slot
    slots: dict[str, Slot] = {}
    for spec in specs:
        if spec.name in slots:
            raise image.fault(f"weight {spec.name!r} is a duplicate: the manifest lists it twice")
        if spec.name not in found:
            raise image.fault(f"weight {spec.name!r} of the manifest is missing from the shards")
        slot = slots[spec.name] = found[spec.name]
        if (slot.dtype.name, slot.shape) != (spec.dtype, spec.shape):
            stored = f"{slot.dtype.name} {list(slot.shape)}"
            expected = f"{spec.dtype} {list(spec.shape)}"
            raise image.fault(f"weight {spec.name!r} is {stored}, the manifest says {expected}")
    for name in sorted(found.keys() - slots.keys()):
        raise image.fault(f"weight {name!r} of the shards is not in the manifest")
    return slots


def _shard_slots(image: Image, shard: str, span: Span) -> dict[str, Slot]:
    """Reads a safetensors header: 8 bytes little-endian length, then JSON; the tensors follow."""
    view = image.view(span)
    length = int.from_bytes(view[:8], "little")
    if not 0 < length <= min(len(view) - 8, MAX_JSON_BYTES):
        raise image.fault(f"the safetensors header of {shard} is malformed (its length is wrong)")
    header = _parse(image, f"the safetensors header of {shard}", bytes(view[8 : 8 + length]))
    if not isinstance(header, dict):
        raise image.fault(f"the safetensors header of {shard} is malformed (not an object)")
    data = range(span.start + 8 + length, span.end)
    slots: dict[str, Slot] = {}
    for name, fields in header.items():
        if name != "__metadata__":  # free text by the format; not used
            slots[name] = _slot(image, f"weight {name!r} of {shard}", fields, data)
    in_order = sorted((slot.start, slot.end, name) for name, slot in slots.items())
    for (_, end, first), (start, _, second) in pairwise(in_order):
        if start < end:
            raise image.fault(f"the data of weights {first!r} and {second!r} of {shard} overlap")
    return slots


def _slot(image: Image, what: str, fields: JSON, data: range) -> Slot:
    """Where one tensor lies. `data`: the range of the file that holds its shard's tensors."""
    try:
        header = from_json(_TensorHeader, fields, what)
    except ArtifactError as error:
        raise image.fault(f"malformed safetensors header ({error})") from error
    if header.dtype not in STORED_TYPES:
        raise image.fault(f"{what} has the unknown dtype {header.dtype!r}", UPDATE)
    dtype, shape = STORED_TYPES[header.dtype], header.shape
    begin, end = (data.start + offset for offset in header.data_offsets)
    if not data.start <= begin <= end <= data.stop:
        raise image.fault(f"{what} lies outside its shard")
    # For the strides, torch multiplies the other sizes of an empty tensor too, in 64 bits.
    sizes_fit = min(shape, default=0) >= 0 and math.prod(s or 1 for s in shape) < 2**59
    if not sizes_fit or end - begin != math.prod(shape) * dtype.itemsize:
        raise image.fault(f"{what}: shape {list(shape)} contradicts its {end - begin} bytes")
    if begin % dtype.itemsize:
        raise image.fault(f"{what} is not aligned to its elements")
    return Slot(begin, end, dtype, shape)


def _tensor(buffer: mmap.mmap, slot: Slot) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, slot.dtype.name)
    count = math.prod(slot.shape)
    if count == 0:  # torch.frombuffer refuses it
        return torch.empty(slot.shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=slot.start)
    return flat.view(slot.shape)
