"""The folder of compiled code: what another user could have put there is never loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sirius_runtime import cache
from sirius_runtime.cache import is_own, private_folder
from sirius_runtime.kernels import build
from sirius_runtime.kernels.build import InstructionSet, library
from tests.support.kernels import require_compiler

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no modes")

HONEST = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
PLANTED = b"\x7fELF of somebody else"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is compiled in a moment, in place of the kernels."""
    require_compiler()
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "cpu.cpp").write_text(HONEST)
    monkeypatch.setattr(build, "_SOURCES", tmp_path / "sources")


def belongs_to_another(monkeypatch: pytest.MonkeyPatch, wanted: Path) -> None:
    """Pretends that `wanted` was made by another user."""

    def pretended(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def found(path: Any, *args: Any, **options: Any) -> os.stat_result:
            fields = list(call(path, *args, **options))
            if isinstance(path, str | Path) and Path(path) == wanted:
                fields[4] = os.getuid() + 1
            return os.stat_result(fields)

        return found

    for name in ("stat", "lstat"):
        monkeypatch.setattr(cache.os, name, pretended(getattr(os, name)))


def test_a_new_folder_is_the_user_s_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert made == tmp_path / "a" / "b" / "c"
    for place in (made, made.parent, made.parent.parent):
        assert place.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_the_user_s_own_is_used_as_it_is(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.chmod(0o755)  # others may read
    assert private_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o755
    assert capfd.readouterr().err == ""


def is_replaced(folder: Path, reason: str, said: str, *, deep: bool = False) -> None:
    private = private_folder(folder, deep=deep)
    assert private != folder
    assert private.stat().st_mode & 0o777 == 0o700
    assert private_folder(folder, deep=deep) == private, "one for the process"
    assert said.startswith(f"sirius: the cache folder {folder} is not safe")
    assert reason in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o722])
def test_a_folder_that_others_may_write_to_is_not_used(
    folder: Path, mode: int, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.chmod(mode)
    private_folder(folder)
    is_replaced(folder, "it may be written by other users", capfd.readouterr().err)


def test_a_folder_of_another_user_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    belongs_to_another(monkeypatch, folder)
    private_folder(folder)
    is_replaced(folder, "it belongs to another user", capfd.readouterr().err)


def test_a_folder_that_another_user_could_swap_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "open" / "cache"
    inner.mkdir(parents=True, mode=0o700)
    inner.parent.chmod(0o1777)
    assert private_folder(inner) == inner  # as of /tmp: none but its owner can rename it
    inner.parent.chmod(0o777)
    private_folder(inner)
    is_replaced(inner, f"write to the folder {inner.parent}", capfd.readouterr().err)
    inner.parent.chmod(0o700)
    belongs_to_another(monkeypatch, inner.parent)
    private_folder(inner)
    is_replaced(inner, f"the folder {inner.parent} above it", capfd.readouterr().err)


def test_what_lies_deep_in_a_folder_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = folder / "ab" / "code.so"
    code.parent.mkdir()
    code.write_bytes(PLANTED)
    code.chmod(0o666)
    assert private_folder(folder, deep=True) == folder  # 0700: nobody gets that far
    folder.chmod(0o755)
    private_folder(folder, deep=True)
    said = capfd.readouterr().err
    is_replaced(folder, f"{code} may be written by other users", said, deep=True)
    folder.chmod(0o700)
    belongs_to_another(monkeypatch, code)
    private_folder(folder, deep=True)
    said = capfd.readouterr().err
    is_replaced(folder, f"{code} belongs to another user", said, deep=True)


def test_files_that_others_could_have_written_are_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "code.so"
    assert not is_own(path)
    assert capfd.readouterr().err == ""  # nothing is there, nothing is said
    path.write_bytes(PLANTED)
    path.chmod(0o644)
    assert is_own(path)
    path.chmod(0o664)
    assert not is_own(path)
    assert f"{path} may be written by other users" in capfd.readouterr().err
    (folder / "link").symlink_to(path)
    assert not is_own(folder / "link")
    assert not is_own(folder)
    path.chmod(0o600)
    belongs_to_another(monkeypatch, path)
    assert not is_own(path)


@pytest.mark.usefixtures("sources")
def test_a_library_planted_in_an_open_folder_is_not_loaded(folder: Path) -> None:
    planted = library(InstructionSet.PORTABLE, folder)
    folder.chmod(0o777)
    planted.write_bytes(PLANTED)
    built = library(InstructionSet.PORTABLE, folder)
    assert built.parent != folder
    assert ctypes.CDLL(str(built)).answer() == 42
    assert planted.read_bytes() == PLANTED


@pytest.mark.usefixtures("sources")
def test_a_library_that_others_may_write_is_built_again(folder: Path) -> None:
    before = os.umask(0)
    try:
        path = library(InstructionSet.PORTABLE, folder)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    written = path.stat().st_mtime_ns
    assert library(InstructionSet.PORTABLE, folder) == path
    assert path.stat().st_mtime_ns != written
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_ends_with_its_process(folder: Path) -> None:
    folder.chmod(0o777)
    code = (
        "import sys; from pathlib import Path; from sirius_runtime.cache import private_folder; "
        "made = private_folder(Path(sys.argv[1])); (made / 'code').touch(); print(made)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()
