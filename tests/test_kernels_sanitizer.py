"""The CPU kernels under AddressSanitizer, in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sirius_runtime.kernels.build import InstructionSet, compiler
from tests.support.kernels import require

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="it is preloaded as on Linux"),
]

ROOT = Path(__file__).parents[1]
CASES = (
    "test_kernels.py",
    "test_kernels_attention.py",
    "test_kernels_shapes.py",
    "test_nested_kernels.py",
)
CHILDREN = "not forked"  # a child of the child would build the kernels anew

BUILD = """
import tests.support.sanitized
from sirius_runtime.cache import cache_folder
from sirius_runtime.kernels.build import instruction_sets, library
for isa in instruction_sets():
    library(isa, cache_folder())
"""

TOO_SHORT = """
import sys, torch
import tests.support.sanitized
import sirius_runtime.operators
from sirius_runtime.kernels import linear
from sirius_runtime.kernels.native import kernels
x, w, y = torch.ones(40), torch.ones(8, 64), torch.empty(8)
operands = linear._LINEARS[1].pack(*linear.matrix(w), 0, 0, y.data_ptr())
status = kernels().sirius_linears(0, x.data_ptr(), 1, int(sys.argv[1]), operands, 1, 1)
print("returned", status)
"""
"""A call that says how many numbers x has, of 40."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    require(InstructionSet.PORTABLE)
    found = compiler()[0]
    libraries = [
        subprocess.run([found, f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library.strip()).is_absolute() for library in libraries):
        pytest.skip(f"{found} has no AddressSanitizer to preload")
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "passes", "runtime")),
        "SIRIUS_CACHE": str(tmp_path_factory.mktemp("sanitized")),
    }
    built = run(own, "-c", BUILD)  # by a compiler that itself runs without
    assert built.returncode == 0, built.stdout
    return {
        **own,
        "LD_PRELOAD": " ".join(library.strip() for library in libraries),
        # Fresh memory is full of NaN, so that what is read before it is written is seen in results.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    }


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
    )


def test_a_buffer_that_is_too_short_is_seen(environment: dict[str, str]) -> None:
    """Else the next test would prove nothing."""
    ended = run(environment, "-c", TOO_SHORT, "64")
    assert ended.returncode != 0
    assert "heap-buffer-overflow" in ended.stdout
    assert "sirius_linears" in ended.stdout
    assert "returned" not in ended.stdout


def test_nothing_is_read_or_written_out_of_bounds(environment: dict[str, str]) -> None:
    tests = [f"tests/{name}" for name in CASES]
    options = ["-q", "-x", "-p", "tests.support.sanitized", "-p", "no:xdist", "-k", CHILDREN]
    ended = run(environment, "-m", "pytest", *options, *tests)
    assert ended.returncode == 0, ended.stdout[-8000:]
