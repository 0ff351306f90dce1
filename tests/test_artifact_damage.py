"""The artifact's reader against damaged and forged files: each fault has its own message."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sirius_runtime import artifact_zip as zip_module
from sirius_runtime.artifact import MANIFEST, Artifact
from sirius_runtime.errors import ArtifactError
from tests.support.artifacts import (
    SHARD,
    as_bytes,
    assert_same,
    data_starts,
    rebuild,
    refused,
    sample,
    write,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.sirius"
    write(path, sample())
    return path


def test_rebuild_alone_is_accepted(path: Path) -> None:
    rebuild(path)
    assert_same(Artifact.open(path).weights(), sample())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"GGUF and more", "not a ZIP"),
        (b"PK\x03\x04", "truncated"),
    ],
)
def test_not_a_zip(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "model.sirius"
    path.write_bytes(content)
    refused(path, match)


def test_not_a_file(tmp_path: Path) -> None:
    refused(tmp_path, "not a file")
    refused(tmp_path / "nothing", "no such file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read all")
def test_unreadable_file(path: Path) -> None:
    path.chmod(0)
    refused(path, "can't be read")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "truncated")


def test_zip_of_something_else(path: Path) -> None:
    rebuild(path, infos=lambda infos: infos.pop())
    refused(path, "no manifest.json")


def set_version(version: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document.clear()  # what else a newer manifest holds must not matter
        document["format_version"] = version

    return change


@pytest.mark.parametrize(
    ("version", "match"),
    [
        ([9, 3], r"version is 9\.3, this reader knows 1\.x and 3\.x; update sirius-compile"),
        ([2, 0], r"version is 2\.0.*; compile it again"),
        ([0, 9], r"version is 0\.9.*; compile it again"),
        ("1.0", "format_version"),
        ([1], "format_version"),
        ([1.0, 0], "format_version"),
        (None, "format_version"),
    ],
)
def test_versions(path: Path, version: Any, match: str) -> None:
    rebuild(path, manifest=set_version(version))
    refused(path, match)


def test_newer_minor_version_is_read(path: Path) -> None:
    rebuild(path, manifest=lambda m: m.update(format_version=[1, 99], news={"of": 1.99}))
    assert_same(Artifact.open(path).weights(), sample())


BAD_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "field missing": (lambda m: m["program"].pop("state"), r"program\.state is missing"),
    "wrong type": (lambda m: m["program"]["model"].update(vocab_size="many"), "vocab_size"),
    "huge number": (lambda m: m["program"]["sparsity"].update(keep=10**400), "malformed"),
    "file without record": (lambda m: m["files"].pop(SHARD), f"extra entry '{SHARD}'"),
    "record without file": (
        lambda m: m["files"].update(ghost={"size": 1, "sha256": ""}),
        "'ghost' of the manifest is missing",
    ),
    "other size": (lambda m: m["files"][SHARD].update(size=7), "size of entry .* not 7 bytes"),
    "other hash": (lambda m: m["files"][SHARD].update(sha256="00"), f"sha256 of '{SHARD}'"),
    "weight missing": (
        lambda m: m["program"]["weights"].pop(0),
        "'embed' of the shards is not in the manifest",
    ),
    "weight twice": (
        lambda m: m["program"]["weights"].append(m["program"]["weights"][0]),
        "'embed' is a duplicate",
    ),
    "weight unknown": (
        lambda m: m["program"]["weights"][0].update(name="other"),
        "'other' of the manifest is missing from the shards",
    ),
    "other dtype": (
        lambda m: m["program"]["weights"][0].update(dtype="int32"),
        r"'embed' is float32 \[8, 4\], the manifest says int32 \[8, 4\]",
    ),
    "other shape": (
        lambda m: m["program"]["weights"][0].update(shape=[4, 8]),
        r"'embed' is .* says float32 \[4, 8\]",
    ),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifest(path: Path, case: str) -> None:
    spoil, match = BAD_MANIFESTS[case]
    rebuild(path, manifest=spoil)
    refused(path, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "format_version"),
    ],
)
def test_manifest_that_is_no_object(path: Path, text: bytes, match: str) -> None:
    rebuild(path, infos=lambda infos: infos.append((infos.pop()[0], text)))
    refused(path, match)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("/etc/passwd", "absolute"),
        ("C:/windows", "drive letter"),
        ("c:relative", "drive letter"),
        ("a\\b", "backslash"),
        ("a/../b", r"'\.\.'"),
        ("..", r"'\.\.'"),
        ("a//b", "empty"),
        ("folder/", "empty"),
        ("./a", "empty or"),
        ("a\nb", "printed"),
    ],
)
def test_unsafe_names(path: Path, name: str, match: str) -> None:
    rebuild(path, lambda entries: entries.update({name: b""}))
    refused(path, match)


def test_name_with_nul(path: Path) -> None:
    rebuild(path, lambda entries: entries.update({"fileXabc": b""}))
    path.write_bytes(path.read_bytes().replace(b"fileXabc", b"file\0abc"))
    refused(path, "printed")


def test_duplicate_name(path: Path) -> None:
    rebuild(path, infos=lambda infos: infos.insert(0, (zipfile.ZipInfo(SHARD), b"other")))
    refused(path, f"'{SHARD}' is a duplicate")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("external_attr", (stat.S_IFLNK | 0o777) << 16, "symbolic link"),
        ("external_attr", (stat.S_IFIFO | 0o777) << 16, "regular file"),
        ("compress_type", zipfile.ZIP_DEFLATED, "compressed"),
    ],
)
def test_entries_of_other_kinds(path: Path, field: str, value: int, match: str) -> None:
    rebuild(path, infos=lambda infos: setattr(infos[0][0], field, value))
    refused(path, match)


def test_unaligned_entries(path: Path) -> None:
    rebuild(path, align=False)
    refused(path, "not aligned.*repacked")


def patch_directory(path: Path, name: str, offset: int, layout: str, value: int) -> None:
    """Overwrites a field of the ZIP directory's record of `name`."""
    data = bytearray(path.read_bytes())
    record = data.rindex(name.encode()) - 46
    assert data[record : record + 4] == b"PK\x01\x02"
    struct.pack_into(layout, data, record + offset, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "match"),
    [
        (8, "<H", 0x1, "encrypted"),
        (20, "<I", 3, "compressed"),
        (42, "<I", 2**31, "outside the file"),
        (42, "<I", 64, "local header"),
        (42, "<I", 0, "local header"),
    ],
)
def test_spoilt_directory(path: Path, offset: int, layout: str, value: int, match: str) -> None:
    patch_directory(path, SHARD, offset, layout, value)
    refused(path, match)


@pytest.mark.parametrize(("size", "match"), [(2**30, "end outside the file"), (900, "overlap")])
def test_data_range(path: Path, size: int, match: str) -> None:
    for offset in (20, 24):
        patch_directory(path, SHARD, offset, "<I", size)
    refused(path, match)


def test_two_records_of_one_place(path: Path) -> None:
    """Entries can't share their bytes: the local header has one name."""
    starts = data_starts(path)
    assert starts[SHARD] < starts["weights/001.safetensors"]
    with zipfile.ZipFile(path) as archive:
        target = archive.getinfo(SHARD).header_offset
    patch_directory(path, "weights/001.safetensors", 42, "<I", target)
    refused(path, "local header of entry 'weights/001.safetensors'")


def test_over_size_json(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild(path, lambda entries: entries.update({"graphs/full.json": b" " * 9000 + b"1"}))
    monkeypatch.setattr(zip_module, "MAX_JSON_BYTES", 9000)
    refused(path, r"graphs/full\.json' is too large")


def flip(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["graphs/full.json", "generation_config.json", SHARD])
def test_changed_byte(path: Path, name: str) -> None:
    flip(path, data_starts(path)[name] + 3)
    refused(path, f"sha256 of '{name}'")
    if name != SHARD:
        refused(path, f"sha256 of '{name}'", verify=False)


def test_changed_byte_of_the_manifest(path: Path) -> None:
    flip(path, data_starts(path)[MANIFEST] + 20)
    refused(path, r"checksum of manifest\.json")


def test_without_verify_weights_are_not_hashed(path: Path) -> None:
    end = data_starts(path)["weights/001.safetensors"]
    with zipfile.ZipFile(path) as archive:
        end += archive.getinfo("weights/001.safetensors").file_size
    flip(path, end - 1)
    refused(path, "sha256")
    weights = Artifact.open(path, verify=False).weights()
    assert sum(not torch.equal(weights[n], t) for n, t in sample().items()) == 1


def test_missing_entry_and_bad_json_are_named(path: Path) -> None:
    rebuild(path, lambda entries: entries.update({"graphs/full.json": b"{"}))
    artifact = Artifact.open(path)
    with pytest.raises(ArtifactError, match=r"model\.sirius: there is no entry 'graphs/x\.json'"):
        artifact.read_json("graphs/x.json")
    with pytest.raises(ArtifactError, match=r"graphs/full\.json is not JSON"):
        artifact.read_json("graphs/full.json")


# ---- reading: shards -----------------------------------------------------------------------------


def shard_of(fields: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_SHARDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "length is wrong"),
    "too short": (b"1234567", "length is wrong"),
    "length over the end": (shard_of({}, length=2**40), "length is wrong"),
    "length zero": (shard_of({}, length=0), "length is wrong"),
    "not JSON": (shard_of({"x": 1}, length=3), "not JSON"),
    "not an object": (shard_of([1]), "not an object"),
    "tensor not an object": (shard_of({"x": 1}), "malformed.*object"),
    "no dtype": (shard_of({"x": {"shape": [], "data_offsets": [0, 0]}}), "dtype is missing"),
    "no offsets": (shard_of({"x": {"dtype": "F32", "shape": []}}), "data_offsets is missing"),
    "one offset": (
        shard_of({"x": {"dtype": "F32", "shape": [], "data_offsets": [0]}}),
        "2 values are expected",
    ),
    "shape of strings": (shard_of({"x": tensor(0, 16, ["4"])}), "shape.*int is expected"),
    "unknown dtype": (shard_of({"x": tensor(0, 16, dtype="F31")}), "dtype 'F31'.*update"),
    "past the end": (shard_of({"x": tensor(64, 80)}), "outside its shard"),
    "before the start": (shard_of({"x": tensor(-16, 0)}), "outside its shard"),
    "backwards": (shard_of({"x": tensor(32, 16)}), "outside its shard"),
    "overlap": (shard_of({"x": tensor(0, 16), "y": tensor(12, 28)}), "'x' and 'y'.*overlap"),
    "too few bytes": (shard_of({"x": tensor(0, 12)}), "contradicts its 12 bytes"),
    "negative shape": (shard_of({"x": tensor(0, 16, [-2, -2])}), "contradicts"),
    "empty but vast": (shard_of({"x": tensor(0, 0, [0, 2**40, 2**40])}), "contradicts"),
    "unaligned": (shard_of({"x": tensor(2, 18)}), "not aligned to its elements"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shard(path: Path, case: str, verify: bool) -> None:
    shard, match = BAD_SHARDS[case]
    rebuild(path, lambda entries: entries.update({SHARD: shard}))
    refused(path, match, verify=verify)


def test_weight_in_two_shards(path: Path) -> None:
    rebuild(path, lambda entries: entries.update({"weights/9.safetensors": entries[SHARD]}))
    refused(path, "two shards")


# ---- fuzz ----------------------------------------------------------------------------------------


def contents(path: Path) -> tuple[Any, dict[str, bytes], dict[str, tuple[Any, ...]]]:
    with Artifact.open(path) as artifact:
        weights = {n: (t.dtype, t.shape, as_bytes(t)) for n, t in artifact.weights().items()}
        return (
            dataclasses.asdict(artifact.manifest),
            {name: artifact.read_bytes(name) for name in artifact.names()},
            weights,
        )


def pristine() -> tuple[bytes, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sirius"
        write(path, sample())
        return path.read_bytes(), contents(path)


PRISTINE, CONTENTS = pristine()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(offset=st.integers(0, len(PRISTINE) - 1), mask=st.integers(1, 255))
def test_one_flipped_byte_is_found_or_harmless(offset: int, mask: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sirius"
        path.write_bytes(PRISTINE)
        flip(path, offset, mask)
        try:
            found = contents(path)
        except ArtifactError:
            return
        assert found == CONTENTS


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_zip_directory_of_noise(noise: bytes) -> None:
    """Random bytes where the directory should be: an ArtifactError, whatever zipfile raises."""
    end = io.BytesIO()
    end.write(b"PK\x03\x04" + noise)
    end.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(noise), 4, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sirius"
        path.write_bytes(end.getvalue())
        with pytest.raises(ArtifactError):
            Artifact.open(path)
