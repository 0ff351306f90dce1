"""The artifact's writer, and what its reader gives back: round trips, layout, memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius_runtime import artifact_writer as writer_module
from sirius_runtime.artifact import MANIFEST, Artifact
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.artifact_zip import ALIGNMENT
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ArtifactError, ConfigError, SiriusError
from sirius_runtime.safetensors_file import STORED_TYPES
from sirius_runtime.spec import (
    WeightSpec,
)
from tests.support.artifacts import (
    SHARD,
    assert_same,
    data_starts,
    program_of,
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
        dtype = draw(st.sampled_from([dtype_of(stored.name) for stored in STORED_TYPES.values()]))
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
    for code, stored in STORED_TYPES.items():
        dtype = dtype_of(stored.name)
        assert dtype.itemsize == stored.itemsize
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
    assert len(temporaries(path)) == 1
    with ArtifactWriter(path, force=True):
        assert len(temporaries(path)) == 1, "its own; what was left over is removed"
    assert temporaries(path) == []


def temporaries(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{path.name}.*.tmp"))


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


def test_writes_end_where_large_pages_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At multiples of the chunk in the file, wherever an entry begins: by such, pages are kept."""
    ends: list[int] = []

    class Noting(io.FileIO):
        def write(self, data: Any) -> int:
            count = super().write(data)
            ends.append(self.tell())
            return count

    data = bytes(range(256)) * 100
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_CHUNK_BYTES", 4096)
        patch.setattr(Path, "open", lambda path, _: io.BufferedWriter(Noting(path, "x"), 16))
        with ArtifactWriter(tmp_path / "model.sirius") as writer:
            for name in ("first", "second"):
                writer.add_bytes(name, data)
            (temporary,) = tmp_path.iterdir()
            with io.FileIO(temporary) as written:
                assert written.read().count(data) == 2
    assert [end for end in ends if end % 4096 == 0] == list(range(4096, max(ends), 4096))
