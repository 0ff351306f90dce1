"""Small artifacts to write, read and spoil."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from sirius_runtime.artifact import MANIFEST, Artifact
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.artifact_zip import ALIGNMENT
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.errors import ArtifactError
from sirius_runtime.spec import (
    DType,
    EntrySpec,
    Method,
    ModelSpec,
    PeriodSpec,
    ProgramSpec,
    SiteSpec,
    SparsitySpec,
    StateSpec,
    TensorSpec,
    ToolVersions,
    WeightSpec,
)

SHARD = "weights/000.safetensors"
Tensors = Mapping[str, torch.Tensor]


def program_of(tensors: Tensors) -> ProgramSpec:
    """A tiny program whose weights are `tensors`."""
    return ProgramSpec(
        model=ModelSpec("tiny", None, "llama", DType.FLOAT32, 8, 16, 100),
        entries=(EntrySpec("full", (TensorSpec("tokens", "int64", ("B", "T")),), ()),),
        weights=tuple(
            WeightSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()
        ),
        state=StateSpec(1, 1, 4, 4),
        sparsity=SparsitySpec(
            Method.CATS, 0.5, (SiteSpec(0, "gate", 8, 4.0, 12, 0.25, True),), step=192, density=0.75
        ),
        period=PeriodSpec(),
        eos_token_ids=(2,),
        pad_token_id=None,
        passes=(),
        tools=ToolVersions("0.1.0", "2.13", "5.23"),
    )


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(8, 4, generator=generator),
        "scale": torch.tensor(3.0, dtype=torch.bfloat16),
        "empty": torch.empty(0, 5, dtype=torch.float16),
        "gate": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
    }


def write(path: Path, tensors: Tensors, *, shard_bytes: int = 128, force: bool = False) -> None:
    """Writes an artifact of all kinds of entries, its weights in small shards."""
    program = program_of(tensors)
    with ArtifactWriter(path, force=force) as writer:
        writer.add_bytes("generation_config.json", b'{"eos_token_id": 2}')
        writer.add_json("graphs/full.json", {"nodes": [1, 2.5, None]})
        writer.add_bytes("tokenizer/empty.txt", b"")
        writer.add_weights(program.weights, lambda spec: tensors[spec.name], shard_bytes)
        writer.finish(program)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert as_bytes(found[name]) == as_bytes(tensor), name


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def data_starts(path: Path) -> dict[str, int]:
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    return {n: o + 30 + sum(struct.unpack_from("<HH", data, o + 26)) for n, o in offsets.items()}


def forge(path: Path, infos: list[tuple[zipfile.ZipInfo, bytes]], align: bool = True) -> None:
    """Writes a ZIP of these entries, aligned but otherwise unchecked."""
    with path.open("wb") as file:
        _forge(file, infos, align)


def _forge(file: BinaryIO, infos: list[tuple[zipfile.ZipInfo, bytes]], align: bool) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for info, data in infos:
            padding = -(file.tell() + 34 + len(info.filename.encode())) % ALIGNMENT
            info.extra = (
                struct.pack("<HH", 0xD935, padding) + bytes(padding) if align else b"\0" * 5
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile warns of duplicate names
                archive.writestr(info, data)


def rezipped(entries: Mapping[str, bytes]) -> bytes:
    """A ZIP of these entries, as `forge` writes it."""
    out = BytesIO()
    _forge(out, [(zipfile.ZipInfo(name), data) for name, data in entries.items()], align=True)
    return out.getvalue()


def rebuild(
    path: Path,
    change: Callable[[dict[str, bytes]], Any] = lambda entries: None,
    *,
    manifest: Callable[[dict[str, Any]], Any] = lambda document: None,
    infos: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], Any] = lambda infos: None,
    align: bool = True,
) -> None:
    """Rewrites `path` after `change` to its entries, with hashes that fit; then `manifest` may
    spoil the manifest's document, and `infos` the list of ZIP entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(entries.pop(MANIFEST))
    change(entries)
    document["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in entries.items()
    }
    manifest(document)
    entries[MANIFEST] = json.dumps(document).encode()
    forged = [(zipfile.ZipInfo(name), data) for name, data in entries.items()]
    infos(forged)
    forge(path, forged, align)


def refused(path: Path, match: str, *, verify: bool = True) -> None:
    """Both the reason and a remedy are named, after the path."""
    with pytest.raises(ArtifactError, match=match) as caught:
        Artifact.open(path, verify=verify)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert re.search("again|update sirius-compile|give the path|check its permissions", message)
