"""The CPU kernels' shared library: compiled from ``csrc`` once, kept in the user's cache folder.

The library has a C interface and does not use torch, so that it compiles in seconds and works with
every version of torch. The file's name contains a hash of everything that the library depends on.
Its last bytes are a hash of the rest, so that a damaged file is detected and built again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from enum import StrEnum
from pathlib import Path

from sirius_runtime.cache import CACHE_VARIABLE, is_own, private_folder
from sirius_runtime.errors import BackendError, ConfigError
from sirius_runtime.new_file import check_target, into_place

_SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w", "-DNDEBUG"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    # Otherwise libraries for two instruction sets, loaded together, would share static variables.
    "-fvisibility=hidden",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_SECONDS = 300  # time limit: compiling takes about five seconds, and a compiler may hang


class InstructionSet(StrEnum):
    """The instruction set that the library is compiled for, the best first."""

    AVX512_BF16 = "avx512_bf16"
    AVX512_VNNI = "avx512_vnni"
    AVX512 = "avx512"
    AVX2 = "avx2"
    PORTABLE = "portable"


_TARGETS = {
    InstructionSet.AVX512_BF16: (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    InstructionSet.AVX512_VNNI: (*_AVX512, "-mavx512vnni"),
    InstructionSet.AVX512: _AVX512,
    InstructionSet.AVX2: _AVX2,
    InstructionSet.PORTABLE: (),
}
_AVX512_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_NEEDED = {  # flags of /proc/cpuinfo
    # CPUs with avx512_bf16 have avx512_vnni too, but not the other way round.
    InstructionSet.AVX512_BF16: {*_AVX512_FLAGS, "avx512_bf16", "avx512_vnni"},
    InstructionSet.AVX512_VNNI: {*_AVX512_FLAGS, "avx512_vnni"},
    InstructionSet.AVX512: _AVX512_FLAGS,
    InstructionSet.AVX2: {"avx2", "fma", "f16c"},
    InstructionSet.PORTABLE: set(),
}


def instruction_sets() -> list[InstructionSet]:
    """The instruction sets that this machine's CPU can run, the best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: the compiler's own default for the machine
        lines = []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return [isa for isa, needed in _NEEDED.items() if needed <= flags]


def library(isa: InstructionSet, folder: Path) -> Path:
    """The library for `isa` in `folder`, built there if needed. If other users could have written
    to `folder`, a private folder is used instead.

    A build is reported on stderr. Raises BackendError if it fails.
    """
    found, version = compiler()
    try:
        folder = private_folder(folder)
    except OSError as error:
        raise _not_kept(folder, error) from error
    path = folder / f"kernels-{isa}-{_fingerprint(isa, version)}.so"
    if not (is_own(path) and _is_sound(path)):
        _build(found, isa, path)
    return path


def compiler() -> tuple[str, str]:
    """The compiler's path, and the output of its `--version`."""
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else _COMPILERS
    found = next((p for c in candidates if (p := shutil.which(c)) is not None), None)
    if found is None:
        raise BackendError(
            f"no C++ compiler was found (looked for {', '.join(candidates)}); install g++ or "
            "clang++, or set the environment variable CXX to one"
        )
    try:
        said = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendError(f"the C++ compiler {found} does not run ({error})") from error
    return found, said


def _fingerprint(isa: InstructionSet, version: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(f"{source.name}\0".encode() + source.read_bytes() + b"\0")
    words = (*_FLAGS, *_TARGETS[isa], platform.system(), platform.machine(), version)
    digest.update("\0".join(words).encode())
    return digest.hexdigest()[:24]


def _is_sound(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return len(content) > size and hashlib.sha256(content[:-size]).digest() == content[-size:]


def _build(cxx: str, isa: InstructionSet, path: Path) -> None:
    """Compiles to a temporary name and renames, so that processes may build at the same time."""
    print(  # noqa: T201  (it takes seconds)
        f"sirius: compiling the CPU kernels ({isa}) with {cxx}; once, kept in {path.parent}",
        file=sys.stderr,
    )
    command = [cxx, *_FLAGS, *_TARGETS[isa], str(_SOURCES / "cpu.cpp"), "-o"]
    try:
        check_target(path)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            done = subprocess.run(
                [*command, str(built)], capture_output=True, text=True, timeout=_SECONDS
            )
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), "")
                raise BackendError(
                    f"{cxx} can't compile the CPU kernels ({reason or done.stderr:.300}); "
                    "set the environment variable CXX to another compiler"
                )
            content = built.read_bytes()
            built.write_bytes(content + hashlib.sha256(content).digest())
            built.chmod(0o700)  # overrides the umask: a file that others may write is never loaded
            into_place(built, path)
    except subprocess.SubprocessError as error:
        raise BackendError(f"{cxx} can't compile the CPU kernels ({error})") from error
    except (OSError, ConfigError) as error:
        raise _not_kept(path.parent, error) from error


def _not_kept(folder: Path, error: OSError | ConfigError) -> BackendError:
    return BackendError(
        f"the CPU kernels can't be kept in {folder} ({error}); set the environment variable "
        f"{CACHE_VARIABLE} to another folder"
    )
