"""Files that are written: whole or not at all, and in place of regular files alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks.parts import Part, run_all
from sirius_passes.manager import dump_graphs
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.backends.inductor_cache import check_name
from sirius_runtime.errors import ArtifactError, BackendError, ConfigError
from sirius_runtime.kernels import build
from sirius_runtime.new_file import NewFile, check_target, into_place, write_file
from tests.support.graphs import one_mlp, trace

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture
def taken(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A path whose name something other than a regular file has, of the kind asked for."""
    path = tmp_path / "taken"
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    opened = socket.socket(socket.AF_UNIX)
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            opened.bind(str(path))
        case "link":
            target.write_text("kept")
            path.symlink_to(target)
        case "dangling link":
            path.symlink_to(target)
        case "folder":
            path.mkdir()
    before = path.lstat()
    yield path
    opened.close()
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode), "as it was"
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    if request.param == "link":
        assert target.read_text() == "kept"


KINDS = {
    "pipe": "is a named pipe",
    "socket": "is a socket",
    "link": r"is a symbolic link \(to .*target\)",
    "dangling link": "is a symbolic link",
    "folder": "is a folder",
}


def renamed(path: Path) -> None:
    built = path.parent / "built"
    built.write_bytes(b"new")
    into_place(built, path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "write_file": lambda path: write_file(path, b"new"),
    "into_place": renamed,
    "artifact": lambda path: ArtifactWriter(path, force=True),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("taken", "match"), KINDS.items(), ids=KINDS, indirect=["taken"])
def test_only_regular_files_are_replaced(taken: Path, match: str, writer: str) -> None:
    with pytest.raises(ConfigError, match=rf"taken {match}.*; give (another|the) path"):
        WRITERS[writer](taken)


@pytest.mark.parametrize("taken", ["pipe", "link"], indirect=True)
def test_dumped_graphs_are_no_exception(taken: Path) -> None:
    program = trace(one_mlp)
    name = next(iter(program.graphs))
    folder = taken.parent / "graphs"
    folder.mkdir()
    taken.rename(folder / f"00_capture.{name}.txt")
    with pytest.raises(ConfigError, match="only regular files are replaced"):
        dump_graphs(program, folder, 0, "capture")
    (folder / f"00_capture.{name}.txt").rename(taken)


@pytest.mark.parametrize("taken", ["pipe", "link"], indirect=True)
def test_tables_of_benchmarks_are_no_exception(taken: Path) -> None:
    part = Part("part", "A part", "no_such_module", (), 60)
    taken.rename(taken.parent / "x-part.md")
    with pytest.raises(ConfigError, match="only regular files are replaced"):
        run_all([part], "cpu", taken.parent, "x", "commit")
    (taken.parent / "x-part.md").rename(taken)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_devices_are_refused(tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.sirius"
    path.write_bytes(b"stands for a device")
    fields = list(path.lstat())
    fields[0] = kind | 0o600
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result(fields))
    with pytest.raises(ConfigError, match="is a device, and only regular files are replaced"):
        ArtifactWriter(path, force=True)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nowhere/file", "the folder .*nowhere does not exist; create it first"),
        ("file/file", "the folder .*file is not a folder"),
        ("x" * 256, "can't be written .*name too long"),
        ("x\0y", "can't be written .*null"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=match):
        check_target(tmp_path / name)


@pytest.mark.parametrize("name", ["a", "é" * 127, "x" * 255])
def test_a_file_of_any_name_is_replaced_by_another(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (b"first", b"second"):
        write_file(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_readers_of_the_old_file_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_file(path, b"new, and longer")
        assert reader.read() == b"old"


def test_what_killed_processes_left_is_removed_and_others_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.sirius"
    (tmp_path / ".model.sirius.0123456789abcdef.tmp").write_bytes(b"left over")
    strangers = [tmp_path / ".model.sirius.tmp", tmp_path / ".model.sirius.backup.tmp"]
    for stranger in strangers:
        stranger.touch()
    with NewFile(path) as first, NewFile(path) as second:
        assert {*strangers, first.temporary, second.temporary} == set(tmp_path.iterdir())
    assert set(strangers) == set(tmp_path.iterdir())


def test_another_process_that_writes_keeps_its_file(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from sirius_runtime.new_file import NewFile\n"
        "with NewFile(pathlib.Path(sys.argv[1])) as new:\n"
        "    print('opened', flush=True)\n"
        "    sys.stdin.read()\n"
        "    new.file.write(b'its own')\n"
        "    new.finish()\n"
    )
    path = tmp_path / "file"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"opened\n"
        write_file(path, b"ours")
        process.communicate()
    assert process.returncode == 0
    assert path.read_bytes() == b"its own"


def test_a_folder_that_can_not_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: str) -> NoReturn:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ArtifactError, match=r"can't be written \(Read-only file system\)"):
        ArtifactWriter(tmp_path / "model.sirius")


@pytest.mark.parametrize("taken", ["pipe", "link"], indirect=True)
def test_kernels_are_no_exception(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_fingerprint", lambda *_: "x")
    isa = build.InstructionSet.PORTABLE
    path = taken.parent / f"kernels-{isa}-x.so"
    taken.rename(path)
    with pytest.raises(BackendError, match=r"can't be kept .*only regular files are replaced"):
        build.library(isa, taken.parent)
    path.rename(taken)


@pytest.mark.parametrize("name", ["a b", "it's", 'q"q', "a\\b"])
def test_folders_that_inductor_would_lose_are_named(tmp_path: Path, name: str) -> None:
    check_name(tmp_path, "SIRIUS_CACHE")
    with pytest.raises(BackendError, match=r"takes no folder with spaces.* SIRIUS_CACHE"):
        check_name(tmp_path / name, "SIRIUS_CACHE")
