"""A file that changes while it is mapped is told of; one that was read into memory may change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import sirius_runtime
from sirius_runtime.artifact import Artifact
from sirius_runtime.errors import ArtifactError
from sirius_runtime.watched_file import WatchedFile
from tests.support.cli import Cli
from tests.support.models import TinyModels

PROMPT = [7, 8, 9]


@pytest.fixture(scope="module")
def saved(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return tiny("llama", "topk").compiled.save(folder / "model.sirius")


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path / "model.sirius"))


def test_a_file_is_watched_by_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with path.open("rb") as file:
        watched = WatchedFile(path, file.fileno())
    watched.check()
    (tmp_path / "other").write_bytes(b"another, longer")
    (tmp_path / "other").replace(path)  # the one that is open stays as it was
    watched.check()
    path.unlink()
    watched.check()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"short", "has 5 bytes now, and had 6 when it was opened"),
        (b"longer!", "has 7 bytes now, and had 6 when it was opened"),
        (b"after!", "was written to after it was opened"),
    ],
)
def test_what_is_written_into_it_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with path.open("rb") as file:
        watched = WatchedFile(path, file.fileno())
        status = os.fstat(file.fileno())
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # clocks tick in milliseconds
    with pytest.raises(ArtifactError) as refused:
        watched.check()
    assert f"{path}: the file {told}" in str(refused.value)
    assert "load it again" in str(refused.value)
    assert "copy=True (--copy)" in str(refused.value)


def test_descriptors_are_closed_with_their_model(artifact: Path) -> None:
    own = Path("/proc/self/fd")
    if not own.exists():
        pytest.skip("the system has no /proc")
    before = len(list(own.iterdir()))
    for _ in range(3):
        model = sirius_runtime.load(artifact, device="cpu")
    del model
    assert len(list(own.iterdir())) <= before + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_file_cut_short_is_an_error_and_not_the_end(artifact: Path) -> None:
    size = artifact.stat().st_size
    reading, writing = os.pipe()
    child = os.fork()  # which the system kills where it reads what is not there
    if child == 0:
        told = []
        try:
            mapped = sirius_runtime.load(artifact, device="cpu")
            copied = sirius_runtime.load(artifact, device="cpu", copy=True)
            expected = mapped.generate(PROMPT, max_new_tokens=5).tokens
            os.truncate(artifact, 100)
            try:
                mapped.generate(PROMPT, max_new_tokens=5)
            except ArtifactError as error:
                told.append(str(error))
            told.append(str(copied.generate(PROMPT, max_new_tokens=5).tokens == expected))
        finally:
            os.write(writing, "\n".join(told).encode())
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:  # noqa: PTH123  (a descriptor)
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    error, same = said.splitlines()
    assert f"{artifact}: the file has 100 bytes now, and had {size} when it was opened" in error
    assert same == "True"


def test_one_that_changes_while_it_generates_gives_no_text(artifact: Path) -> None:
    class Writer:
        """Stands for another program that writes into the file meanwhile."""

        def put(self, value: object) -> None:
            os.utime(artifact)

        def end(self) -> None: ...

    model = sirius_runtime.load(artifact, device="cpu")
    os.utime(artifact, ns=(1, 1))
    with pytest.raises(ArtifactError, match="was written to after it was opened"):
        model.generate(PROMPT, max_new_tokens=3)
    model = sirius_runtime.load(artifact, device="cpu")
    with pytest.raises(ArtifactError, match="was written to after it was opened"):
        model.generate(PROMPT, max_new_tokens=3, streamer=Writer())
    copied = sirius_runtime.load(artifact, device="cpu", copy=True)
    assert copied.generate(PROMPT, max_new_tokens=3, streamer=Writer()).stats.tokens == 3


def test_a_copy_is_checked_as_a_mapping_is(artifact: Path) -> None:
    with Artifact.open(artifact) as mapped, Artifact.open(artifact, copy=True) as copied:
        assert copied.file is None
        assert copied.manifest == mapped.manifest
        for name, weight in mapped.weights().items():
            assert copied.weights()[name].equal(weight)
        assert copied.read_bytes("manifest.json") == mapped.read_bytes("manifest.json")
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    for copy in (False, True):
        with pytest.raises(ArtifactError):
            Artifact.open(artifact, copy=copy)
    artifact.write_bytes(content[:1000])
    with pytest.raises(ArtifactError, match="truncated"):
        Artifact.open(artifact, copy=True)


def test_the_command_line_copies(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("run", artifact, "-p", "w7 w8", "--max-new-tokens", "4", "--device", "cpu")
    cli = Cli(capsys, monkeypatch)
    mapped, copied = cli.run(*command), cli.run(*command, "--copy")
    assert (mapped.code, copied.code) == (0, 0)
    assert copied.out == mapped.out
