"""Writes `model.sirius` (`artifact` describes its layout), completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import torch

from sirius_runtime.artifact import MANIFEST, WEIGHTS, Artifact
from sirius_runtime.artifact_zip import ALIGNMENT, MAX_JSON_BYTES, name_fault
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.errors import ArtifactError, ConfigError, SiriusError
from sirius_runtime.manifest_schema import validate
from sirius_runtime.new_file import NewFile
from sirius_runtime.safetensors_file import header_of, in_order, size_of
from sirius_runtime.spec import (
    FORMAT_VERSION,
    JSON,
    NESTED_FORMAT_VERSION,
    FileRecord,
    Manifest,
    ProgramSpec,
    SelfTestSpec,
    WeightSpec,
    to_json,
)

SHARD_BYTES = 512 * 2**20  # large enough to stream, small enough to hash shards in parallel

_PADDING_ID = 0xD935  # extra field of Android's zipalign: the alignment, then zeros
_PADDING_BYTES = 6  # of an extra field without zeros
_ZIP64_BYTES = (
    2**30
)  # from this size on an entry gets ZIP64 sizes; below zipfile's own limit (2 GiB)
# A chunk of this size is checksummed and written while it is still in the CPU's cache. Each write
# ends at a multiple of this size in the file. Where the file system supports it, Linux then keeps
# the file in 2 MiB pages of the page cache, and reading a mapping takes far fewer address lookups
# (see `artifact_zip.map_file`).
_CHUNK_BYTES = 4 * 2**20
_REGULAR_FILE = 0o100644 << 16


class ArtifactWriter:
    """Writes an artifact under a temporary name beside `path`; `finish` renames it into place.

    Leaving the `with` block without `finish` removes the temporary file; an older artifact stays as
    it was. Raises ConfigError where `path` exists (unless `force`) or its folder doesn't, and
    ArtifactError where the file can't be written. A wrong name, tensor or call is a bug of the
    compiler and raises SiriusError.
    """

    def __init__(self, path: str | os.PathLike[str], force: bool = False) -> None:
        self.path = Path(path)
        self._new = NewFile(self.path)
        if self.path.exists() and not force:
            raise ConfigError(f"{self.path} exists; choose another path or pass --force")
        with self._disk_faults(), self._new:
            pass  # a folder that can't be written to is reported now, not after the compilation
        self._files: dict[str, FileRecord] = {}
        self._weights: dict[str, WeightSpec] = {}
        self._shards = 0
        self._opened: zipfile.ZipFile | None = None

    def __enter__(self) -> Self:
        with self._disk_faults():
            self._new.__enter__()
        self._opened = zipfile.ZipFile(self._new.file, "w")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            with contextlib.suppress(OSError):  # a full disk may refuse the last bytes
                self._opened.close()
            self._opened = None
        self._new.__exit__(kind, error, trace)

    def add_bytes(self, name: str, data: bytes) -> None:
        """Adds the entry `name` with these bytes."""
        with self._entry(name, len(data)) as sink:
            sink.write(memoryview(data))

    def add_json(self, name: str, document: JSON) -> None:
        """Adds the entry `name`: compact JSON in the document's own order."""
        try:
            text = json.dumps(document, separators=(",", ":"), allow_nan=False)
        except (ValueError, TypeError) as error:
            raise SiriusError(f"{name} can't be written as JSON: {error}") from error
        if len(text) > MAX_JSON_BYTES:
            raise SiriusError(f"{name} has {len(text)} bytes; readers take {MAX_JSON_BYTES}")
        self.add_bytes(name, text.encode())

    def add_weights(
        self,
        specs: Sequence[WeightSpec],
        get: Callable[[WeightSpec], torch.Tensor],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Adds the shards of `specs`, each of about `shard_bytes`.

        `get` is called once for each spec, in the order of writing; its tensor, of the spec's dtype
        and shape and on any device, is dropped before the next call.
        """
        for spec in specs:
            if spec.name in self._weights:
                raise SiriusError(f"weight {spec.name!r} is added twice")
            self._weights[spec.name] = spec
        for shard in _shards(specs, shard_bytes):
            header = header_of(shard)
            size = len(header) + sum(map(size_of, shard))
            with self._entry(f"{WEIGHTS}{self._shards:03d}.safetensors", size) as sink:
                sink.write(memoryview(header))
                for spec in shard:
                    _write_tensor(sink, spec, get)
            self._shards += 1

    def add_copies(self, artifact: Artifact, changed: Mapping[str, bytes]) -> None:
        """Adds all entries of another artifact, its weights among them, byte for byte; those of
        `changed` with other contents. Raises ArtifactError for an entry that is not what its hash
        says.
        """
        for name, data in artifact.entries():
            if name in changed:
                self.add_bytes(name, changed[name])
                continue
            with self._entry(name, len(data)) as sink:
                sink.write(data)
            if self._files[name] != artifact.manifest.files[name]:
                raise ArtifactError(
                    f"{artifact.path}: wrong sha256 of {name!r}; the file is damaged: download it "
                    "again, or compile it again"
                )
        self._weights |= {spec.name: spec for spec in artifact.program.weights}

    def finish(
        self, program: ProgramSpec, check: Callable[[Path], SelfTestSpec | None] = lambda _: None
    ) -> None:
        """Writes the manifest and makes the artifact appear at `path`, whole and on disk.

        Before the file is renamed, the reader opens it, and `check` gets its temporary path. The
        self-test that `check` returns is written to the manifest. Where either raises a
        SiriusError, no artifact appears.
        """
        if {weight.name: weight for weight in program.weights} != self._weights:
            raise SiriusError("the program's weights are not those that were added")
        if MANIFEST in self._files:
            raise SiriusError(f"entry {MANIFEST!r} is added twice")
        version = NESTED_FORMAT_VERSION if program.nested else FORMAT_VERSION
        manifest = Manifest(version, _timeless(program), dict(sorted(self._files.items())))
        body = self._end_body()
        self._add_manifest(body, manifest)
        try:
            with Artifact.open(self._new.temporary, verify=False):
                pass
            self_test = check(self._new.temporary)
        except SiriusError as error:
            raise SiriusError(
                f"{self.path} is not written: the artifact's reader refuses it ({error}); please "
                "report this, with the model's config.json"
            ) from error
        if self_test is not None:
            self._add_manifest(body, replace(manifest, self_test=self_test))
        with self._disk_faults():
            self._new.finish()

    def _end_body(self) -> _Body:
        """Closes the ZIP, which then holds all entries but the manifest."""
        archive, file = self._state(), self._new.file
        end = file.tell()
        with self._disk_faults():
            archive.close()
            file.seek(end)
            return _Body(end, file.read())

    def _add_manifest(self, body: _Body, manifest: Manifest) -> None:
        """Writes the manifest after `body`, replacing an earlier one."""
        document = to_json(manifest)
        validate(document)
        file = self._new.file
        with self._disk_faults():
            file.seek(body.end)
            file.write(body.directory)
            file.truncate()
        self._opened = zipfile.ZipFile(file, "a")
        self._files.pop(MANIFEST, None)
        self.add_json(MANIFEST, document)
        with self._disk_faults():
            self._opened.close()
            file.flush()
        self._opened = None

    @contextlib.contextmanager
    def _entry(self, name: str, size: int) -> Iterator[_Sink]:
        """Opens the entry `name` of `size` bytes, with its data aligned to `ALIGNMENT`."""
        if reason := name_fault(name):
            raise SiriusError(f"the name of entry {name!r} {reason}")
        if name in self._files:
            raise SiriusError(f"entry {name!r} is added twice")
        archive, file = self._state(), self._new.file
        info = zipfile.ZipInfo(name)  # its time is 1980: equal contents give equal bytes
        info.external_attr = _REGULAR_FILE
        info.file_size = size
        info.CRC = info.compress_size = 0  # filled in by zipfile when the entry is closed
        zip64 = size >= _ZIP64_BYTES
        unpadded = file.tell() + len(info.FileHeader(zip64)) + _PADDING_BYTES
        zeros = -unpadded % ALIGNMENT
        info.extra = struct.pack("<HHH", _PADDING_ID, 2 + zeros, ALIGNMENT) + bytes(zeros)
        with archive.open(info, "w", force_zip64=zip64) as stream:
            sink = _Sink(stream, file.tell(), self._disk_faults)
            yield sink
            with self._disk_faults():
                file.flush()
        info.extra = b""  # the directory at the end needs no padding
        self._files[name] = FileRecord(size, sink.digest.hexdigest())

    def _state(self) -> zipfile.ZipFile:
        if self._opened is None:
            raise SiriusError("an ArtifactWriter is used inside its `with` block, before finish()")
        return self._opened

    @contextlib.contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            remedy = "free some space, or write to a folder where you may"
            raise ArtifactError(f"{self.path} can't be written ({reason}); {remedy}") from error


class _Sink:
    """An open entry, which hashes the bytes that it writes."""

    def __init__(
        self,
        stream: IO[bytes],
        start: int,
        guard: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """`start`: offset of the entry's data in the file."""
        self.digest = hashlib.sha256()
        self._stream = stream
        self._at = start
        self._guard = guard

    def write(self, data: memoryview) -> None:
        # Hashing takes about as long as writing: a large tensor is hashed on a thread of its own.
        hashing = threading.Thread(target=self.digest.update, args=(data,))
        if len(data) > _CHUNK_BYTES:
            hashing.start()
        else:
            self.digest.update(data)
        try:
            self._write(data)
        finally:
            if hashing.ident is not None:
                hashing.join()

    def _write(self, data: memoryview) -> None:
        with self._guard():
            while len(data) > 0:
                chunk = data[: _CHUNK_BYTES - self._at % _CHUNK_BYTES]
                self._stream.write(chunk)
                self._at += len(chunk)
                data = data[len(chunk) :]


class _Body(NamedTuple):
    """Where the last entry before the manifest ends, and the ZIP directory up to there."""

    end: int
    directory: bytes


def _timeless(program: ProgramSpec) -> ProgramSpec:
    """The program without the times that its passes took: equal inputs give equal bytes."""
    return replace(program, passes=tuple(replace(record, seconds=0.0) for record in program.passes))


def _shards(specs: Sequence[WeightSpec], shard_bytes: int) -> Iterator[list[WeightSpec]]:
    """Splits `specs` into shards of at most `shard_bytes`; a larger tensor has its own shard."""
    shard: list[WeightSpec] = []
    total = 0
    for spec in specs:
        size = size_of(spec)
        if shard and total + size > shard_bytes:
            yield in_order(shard)
            shard, total = [], 0
        shard.append(spec)
        total += size
    if shard:
        yield in_order(shard)


def _write_tensor(sink: _Sink, spec: WeightSpec, get: Callable[[WeightSpec], torch.Tensor]) -> None:
    """Fetches and writes one tensor. It is a function of its own so that the tensor is freed on
    return.
    """
    tensor = get(spec)
    if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (spec.dtype, spec.shape):
        given = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        raise SiriusError(
            f"weight {spec.name!r} is {given}, its spec says {spec.dtype} {list(spec.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().view(-1)  # a 0-d tensor can't be viewed as bytes
    sink.write(flat.view(torch.uint8).numpy().data)
