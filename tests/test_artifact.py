"""The artifact: what is written is read back, other libraries agree, and nothing else passes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sirius_runtime import artifact_writer as writer_module
from sirius_runtime import artifact_zip as zip_module
from sirius_runtime.artifact import DTYPES, MANIFEST, Artifact
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.artifact_zip import ALIGNMENT
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.errors import ArtifactError, ConfigError, SiriusError
from sirius_runtime.spec import (
    DType,
    EntrySpec,
    Method,
    ModelSpec,
    PeriodSpec,
    ProgramSpec,
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
        sparsity=SparsitySpec(Method.CATS, 0.5, (8,), (4,), (0.25,), (12,), 0.75),
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.sirius"
    write(path, sample())
    return path


# ---- round trip ----------------------------------------------------------------------------------


def test_reads_what_was_written(path: Path) -> None:
    with Artifact.open(path) as artifact:
        assert artifact.program == program_of(sample())
        assert_same(artifact.weights(), sample())
        assert artifact.read_json("graphs/full.json") == {"nodes": [1, 2.5, None]}
        assert artifact.read_bytes("graphs/full.json") == b'{"nodes":[1,2.5,null]}'
        assert artifact.read_bytes("tokenizer/empty.txt") == b""
        assert artifact.names("weights/") == [SHARD, "weights/001.safetensors"]
        assert artifact.names("tokenizer/") == ["tokenizer/empty.txt"]
        assert set(artifact.names()) == {*artifact.manifest.files, MANIFEST}


def test_equal_contents_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "again.sirius", sample())
    assert (tmp_path / "again.sirius").read_bytes() == path.read_bytes()


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text("ab.é0_", min_size=1, max_size=6), unique=True, max_size=6))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = torch.Size(shape).numel()
        limit = 1 if dtype == torch.bool else 255
        values = draw(
            st.lists(
                st.integers(0, limit),
                min_size=count * dtype.itemsize,
                max_size=count * dtype.itemsize,
            )
        )
        tensors[name] = torch.tensor(values, dtype=torch.uint8).view(dtype).view(shape)
    return tensors


@settings(max_examples=80, deadline=None)
@given(tensors=tensor_dicts(), shard_bytes=st.integers(1, 200))
def test_round_trip_of_any_tensors(tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sirius"
        write(path, tensors, shard_bytes=shard_bytes)
        with Artifact.open(path) as artifact:
            assert_same(artifact.weights(), tensors)
            shards = [artifact.read_bytes(name) for name in artifact.names("weights/")]
    oracle: dict[str, torch.Tensor] = {}
    for shard in shards:
        oracle |= safetensors.torch.load(shard)
    assert_same({name: oracle[name] for name in tensors}, tensors)


def test_dtype_table_is_that_of_safetensors() -> None:
    for code, dtype in DTYPES.items():
        data = safetensors.torch.save({"x": torch.zeros(2, dtype=dtype)})
        assert f'"dtype":"{code}"'.encode() in data


def test_shards_of_the_safetensors_library_are_read(path: Path) -> None:
    """Another writer's layout of the same weights (its own order, 8-byte alignment) is fine too."""

    def change(entries: dict[str, bytes]) -> None:
        del entries["weights/001.safetensors"]
        entries[SHARD] = safetensors.torch.save(sample(), metadata={"made by": "safetensors"})

    rebuild(path, change)
    assert_same(Artifact.open(path).weights(), sample())


def test_non_contiguous_tensors_are_written_in_their_shape(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(12).view(3, 4).T, "y": torch.zeros(1).expand(5)}
    write(tmp_path / "model.sirius", tensors)
    assert_same(Artifact.open(tmp_path / "model.sirius").weights(), tensors)


def test_program_without_weights(tmp_path: Path) -> None:
    write(tmp_path / "model.sirius", {})
    assert Artifact.open(tmp_path / "model.sirius").weights() == {}


# ---- layout --------------------------------------------------------------------------------------


def data_starts(path: Path) -> dict[str, int]:
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    return {n: o + 30 + sum(struct.unpack_from("<HH", data, o + 26)) for n, o in offsets.items()}


def test_layout_is_an_aligned_plain_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[-1] == MANIFEST
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        payload = sum(info.file_size for info in archive.infolist())
        entries = len(archive.infolist())
    assert all(start % ALIGNMENT == 0 for start in data_starts(path).values())
    assert path.stat().st_size - payload < 300 * entries


def test_manifest_records_every_other_file(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        files = json.loads(archive.read(MANIFEST))["files"]
        expected = {
            name: {
                "size": len(archive.read(name)),
                "sha256": hashlib.sha256(archive.read(name)).hexdigest(),
            }
            for name in archive.namelist()
            if name != MANIFEST
        }
    assert files == expected


def test_large_weights_are_aligned_in_spite_of_small_neighbours(tmp_path: Path) -> None:
    tensors = {
        "flag": torch.ones(3, dtype=torch.bool),
        "a": torch.randn(32),
        "odd": torch.ones(5, dtype=torch.float64),
        "b": torch.randn(16, 4),
    }
    write(tmp_path / "model.sirius", tensors, shard_bytes=2**20)
    artifact = Artifact.open(tmp_path / "model.sirius")
    weights = artifact.weights()
    assert artifact.names("weights/") == [SHARD]
    assert weights["a"].data_ptr() % ALIGNMENT == weights["b"].data_ptr() % ALIGNMENT == 0
    assert weights["odd"].data_ptr() % 8 == 0


def test_zip64_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers of entries over 4 GiB, forced on small ones."""
    monkeypatch.setattr(writer_module, "_ZIP64_BYTES", 0)
    path = tmp_path / "model.sirius"
    write(path, sample())
    assert_same(Artifact.open(path).weights(), sample())
    assert all(start % ALIGNMENT == 0 for start in data_starts(path).values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.slow
def test_entry_and_offsets_over_4_gib(tmp_path: Path) -> None:
    tensors = {"large": torch.zeros(2**32 + 64, dtype=torch.uint8), "small": torch.arange(3)}
    tensors["large"][-1] = 7
    path = tmp_path / "model.sirius"
    write(path, tensors)
    weights = Artifact.open(path).weights()
    assert weights["large"][-1] == 7
    assert weights["small"].tolist() == [0, 1, 2]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


# ---- memory --------------------------------------------------------------------------------------


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def get(spec: WeightSpec) -> torch.Tensor:
        assert all(ref() is None for ref in alive)
        tensor = torch.zeros(spec.shape)
        alive.append(weakref.ref(tensor))
        return tensor

    program = program_of({name: torch.zeros(4, 4) for name in "abcd"})
    with ArtifactWriter(tmp_path / "model.sirius") as writer:
        writer.add_weights(program.weights, get, shard_bytes=128)
        writer.finish(program)
    assert len(alive) == 4


def mapping_of(pointer: int) -> dict[str, str]:
    """The fields of /proc/self/smaps of the mapping that holds `pointer`, its file as ``path``."""
    fields: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s*(.*)", line):
            if fields:
                return fields
            if int(head[1], 16) <= pointer < int(head[2], 16):
                fields["path"] = head[3]
        elif fields:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    return fields


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "model.sirius"
    write(path, {"a": torch.ones(2**16), "b": torch.ones(2**16)}, shard_bytes=2**20)
    first, second = Artifact.open(path).weights(), Artifact.open(path).weights()
    start = data_starts(path)[SHARD]
    header = 8 + int.from_bytes(path.read_bytes()[start : start + 8], "little")
    assert first["b"].data_ptr() - first["a"].data_ptr() == 2**18
    for weights in (first, second):
        assert weights["a"].sum() == 2**16  # every page is in memory now
        mapping = mapping_of(weights["a"].data_ptr())
        assert mapping["path"] == str(path)
        assert mapping["Private_Dirty"] == mapping["Anonymous"] == "0 kB"
    assert first["a"].data_ptr() % 4096 == (start + header) % 4096


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model.sirius"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(2**40)  # sparse: takes no room
        file.write(b"PK\x05\x06" + bytes(18))
    refused(path, "no manifest.json")


def test_tensors_outlive_the_artifact_and_writes_stay_private(path: Path) -> None:
    before = path.read_bytes()
    with Artifact.open(path) as artifact:
        weights = artifact.weights()
    assert_same(weights, sample())
    weights["embed"].zero_()
    assert path.read_bytes() == before
    assert_same(Artifact.open(path).weights(), sample())


def test_closed_artifact_says_so(path: Path) -> None:
    artifact = Artifact.open(path)
    artifact.close()
    with pytest.raises(SiriusError, match="closed"):
        artifact.weights()


# ---- writing: all or nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inside_entry", [False, True])
def test_failure_keeps_the_old_file(
    path: Path, error: type[BaseException], inside_entry: bool
) -> None:
    before = path.read_bytes()

    def fail(spec: WeightSpec) -> torch.Tensor:
        raise error

    def interrupted() -> None:
        with ArtifactWriter(path, force=True) as writer:
            writer.add_bytes("notes.txt", b"x" * 100_000)
            assert len(list(path.parent.glob(".model.sirius.*.tmp"))) == 1
            if inside_entry:
                writer.add_weights(program_of(sample()).weights, fail)
            raise error

    with pytest.raises(error):
        interrupted()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_block_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "model.sirius") as writer:
        writer.add_bytes("a.txt", b"a")
    assert list(tmp_path.iterdir()) == []


def test_existing_path_needs_force(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.sirius exists.*--force"):
        ArtifactWriter(path)
    write(path, {"x": torch.ones(2)}, force=True)
    assert_same(Artifact.open(path).weights(), {"x": torch.ones(2)})


def test_bad_destinations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder .*nowhere does not exist"):
        ArtifactWriter(tmp_path / "nowhere" / "model.sirius")
    with pytest.raises(ConfigError, match="is a folder"):
        ArtifactWriter(tmp_path, force=True)


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"can't be written \(No space left.*free some space"):
        write(tmp_path / "model.sirius", sample())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process_leaves_the_old_artifact(path: Path) -> None:
    before = path.read_bytes()
    script = (
        "import sys, time\n"
        "from sirius_runtime.artifact_writer import ArtifactWriter\n"
        "with ArtifactWriter(sys.argv[1], force=True) as writer:\n"
        "    writer.add_bytes('a.txt', bytes(100_000))\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert path.read_bytes() == before
    assert_same(Artifact.open(path).weights(), sample())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (torch.ones(2, 3, dtype=torch.float16), r"'x' is float16 \[2, 3\].*says float32 \[2, 3\]"),
        (torch.ones(3, 2), r"'x' is float32 \[3, 2\]"),
    ],
)
def test_tensor_must_be_that_of_the_spec(tmp_path: Path, given: torch.Tensor, match: str) -> None:
    program = program_of({"x": torch.ones(2, 3)})
    with (
        pytest.raises(SiriusError, match=match),
        ArtifactWriter(tmp_path / "model.sirius") as writer,
    ):
        writer.add_weights(program.weights, lambda spec: given)


def both(*acts: Callable[[ArtifactWriter], None]) -> Callable[[ArtifactWriter], None]:
    def act(writer: ArtifactWriter) -> None:
        for each in acts:
            each(writer)

    return act


MISUSES: dict[str, tuple[Callable[[ArtifactWriter], None], str]] = {
    "entry twice": (
        both(lambda w: w.add_bytes("a", b""), lambda w: w.add_bytes("a", b"")),
        "twice",
    ),
    "bad name": (lambda w: w.add_bytes("../a", b""), r"'\.\.'"),
    "not JSON": (lambda w: w.add_json("a.json", {"x": {1, 2}}), "JSON"),
    "NaN": (lambda w: w.add_json("a.json", float("nan")), "JSON"),
    "foreign weights": (lambda w: w.finish(program_of(sample())), "weights"),
    "manifest by hand": (
        both(lambda w: w.add_bytes(MANIFEST, b"{}"), lambda w: w.finish(program_of({}))),
        "twice",
    ),
    "weight twice": (
        lambda w: w.add_weights([WeightSpec("x", "bool", ())] * 2, lambda s: torch.tensor(True)),
        "twice",
    ),
    "unknown dtype": (
        lambda w: w.add_weights([WeightSpec("x", "int3", ())], lambda s: torch.tensor(True)),
        "int3",
    ),
    "after finish": (
        both(lambda w: w.finish(program_of({})), lambda w: w.add_bytes("a", b"")),
        "block",
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_of_the_writer(tmp_path: Path, case: str) -> None:
    act, match = MISUSES[case]
    with (
        pytest.raises(SiriusError, match=match) as caught,
        ArtifactWriter(tmp_path / "model.sirius") as writer,
    ):
        act(writer)
    assert caught.value.exit_code == 70


def test_json_over_the_limit_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_JSON_BYTES", 10)
    with (
        pytest.raises(SiriusError, match=r"a\.json has 11 bytes"),
        ArtifactWriter(tmp_path / "model.sirius") as writer,
    ):
        writer.add_json("a.json", "x" * 9)


# ---- reading: what is refused --------------------------------------------------------------------


def forge(path: Path, infos: list[tuple[zipfile.ZipInfo, bytes]], align: bool = True) -> None:
    """Writes a ZIP of these entries, aligned but otherwise unchecked."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for info, data in infos:
            padding = -(file.tell() + 34 + len(info.filename)) % ALIGNMENT
            info.extra = (
                struct.pack("<HH", 0xD935, padding) + bytes(padding) if align else b"\0" * 5
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile warns of duplicate names
                archive.writestr(info, data)


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
        ([2, 3], r"version is 2\.3, this reader knows 1\.x; update sirius-compile"),
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
