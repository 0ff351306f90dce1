"""How the CPU kernels are built, kept, found again, and done without."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sirius_runtime.errors import BackendError
from sirius_runtime.kernels import build, native
from sirius_runtime.kernels.build import InstructionSet, instruction_sets, library
from sirius_runtime.kernels.native import VARIABLE, KernelWarning, kernels, references, using
from tests.support.kernels import Fallback, forbid_references, require_compiler
from tests.support.operators import sirius

PORTABLE = InstructionSet.PORTABLE

SMALL = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
"""Compiled in a moment, in place of the kernels: how it is built is the same."""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require_compiler()
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "cpu.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "_SOURCES", folder)
    return folder


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not loaded kernels, and an empty cache folder."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "portable")
    return tmp_path


def product() -> torch.Tensor:
    """Of an operator that has a kernel: [[3.0]]."""
    return sirius.linear(torch.ones(1, 3), torch.ones(1, 3))


# building


@pytest.mark.usefixtures("sources")
def test_it_is_built_once_with_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "not yet there"
    path = library(PORTABLE, folder)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("sirius: compiling the CPU kernels (portable)")
    assert str(folder) in said.err
    written = path.stat().st_mtime_ns
    assert library(PORTABLE, folder) == path
    assert capfd.readouterr().err == ""
    assert path.stat().st_mtime_ns == written
    assert list(folder.iterdir()) == [path]
    assert ctypes.CDLL(str(path)).answer() == 42


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_built_again(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    path = library(PORTABLE, folder)
    sound = path.read_bytes()
    damaged = {
        "cut": sound[: len(sound) // 2],
        "changed": sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:],
        "emptied": b"",
    }
    path.write_bytes(damaged[damage])
    assert library(PORTABLE, folder) == path
    assert path.read_bytes() == sound


def test_processes_may_build_at_once(sources: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sirius_runtime.kernels import build; "
        "build._SOURCES = Path(sys.argv[1]); "
        "print(build.library(build.InstructionSet.PORTABLE, Path(sys.argv[2])))"
    )
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", script, str(sources), str(folder)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=300)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert [str(path) for path in folder.iterdir()] == list(paths)
    assert build._is_sound(next(folder.iterdir()))


def test_the_name_says_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build._fingerprint(isa, "g++ 12") for isa in InstructionSet}
    names.add(build._fingerprint(PORTABLE, "g++ 13"))
    for content in ("a", "b"):
        (tmp_path / "cpu.cpp").write_text(content)
        monkeypatch.setattr(build, "_SOURCES", tmp_path)
        names.add(build._fingerprint(PORTABLE, "g++ 12"))
    assert len(names) == len(InstructionSet) + 3


def test_the_portable_kernels_run_anywhere() -> None:
    assert instruction_sets()[-1] is PORTABLE


# compilers that are not there, or fail


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_is_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"no C\+\+ compiler .* install g\+\+"):
        library(PORTABLE, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="the compilers are shell scripts")
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = '[ "$1" = --version ] && echo 1 && exit 0; echo "x.h: error: no such luck" >&2; exit 1'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", fails))
    with pytest.raises(BackendError, match="no such luck"):
        library(PORTABLE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="the compilers are shell scripts")
def test_a_compiler_that_does_not_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "exit 3"))
    with pytest.raises(BackendError, match="does not run"):
        library(PORTABLE, tmp_path)


@pytest.mark.usefixtures("sources")
def test_a_folder_that_can_t_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="SIRIUS_CACHE"):
        library(PORTABLE, tmp_path / "file")


# loading


def test_one_warning_and_then_the_references(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(KernelWarning, match=r"no-such-compiler.*SIRIUS_KERNELS=0") as caught:
        assert product().tolist() == [[3.0]]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert product().tolist() == [[3.0]]
    assert kernels() is None


def test_a_file_that_is_no_library_is_a_warning_too(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unloaded / "text.so").write_text("no library")
    monkeypatch.setattr(native, "library", lambda isa, folder: folder / "text.so")
    with pytest.warns(KernelWarning, match="can't be loaded"):
        assert product().tolist() == [[3.0]]


def test_the_variable_chooses_the_instruction_set(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[InstructionSet] = []

    def refuse(isa: InstructionSet, folder: Path) -> Path:
        asked.append(isa)
        assert folder == unloaded
        raise BackendError("not built here")

    monkeypatch.setattr(native, "library", refuse)
    for wish in ("portable", ""):
        monkeypatch.setattr(native, "_loaded", {})
        monkeypatch.setenv(VARIABLE, wish)
        with pytest.warns(KernelWarning, match="not built here"):
            product()
    assert asked == [PORTABLE, instruction_sets()[0]]


def test_the_variable_keeps_the_references(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert product().tolist() == [[3.0]]
    assert list(unloaded.iterdir()) == []


def test_a_variable_that_means_nothing_is_said(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sse9")
    with pytest.warns(KernelWarning, match=r"SIRIUS_KERNELS must be 0 or one of .*got 'sse9'"):
        assert product().tolist() == [[3.0]]


def test_references_can_be_had_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler()
    forbid_references(monkeypatch)
    with using(PORTABLE):
        assert product().tolist() == [[3.0]]
        with references(), references(), pytest.raises(Fallback):
            product()
        assert product().tolist() == [[3.0]]
