"""The CUDA kernels compile to machine code, of GPUs that need not be here, and fit these."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from tests.support.triton_interpreter import require_triton

require_triton()
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from sirius_runtime.kernels.cuda import tiles  # noqa: E402  (they import Triton)
from tests.support.triton_compiling import (  # noqa: E402
    LLAMA_8B,
    ODD,
    ONES,
    Sizes,
    all_launches,
    compile_launch,
    nested_calls,
    recorded,
    resources,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = {
    *("linears", "neurons", "live_neurons", "weighted_rows", "add_up", "kept_channels"),
    *("kth_largest", "select", "store_kv", "attend", "merge"),
}
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may take (CUDA C++ Programming Guide, table of compute
capabilities)."""
SPILLED = 32
"""Bytes of a thread that may be: a few values that stand outside the loop, as ptxas chooses to for
one more program on an SM. A tile that doesn't fit spills hundreds."""


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H100's number of SMs, so that tiles are as they are there; and an empty cache."""
    monkeypatch.setattr(tiles, "processors", lambda _: 132)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
def test_each_kernel_compiles() -> None:
    """For one token and for several; the slow test has the rest."""
    launches = {
        (name, launch.values.get("TOKENS"), launch.values.get("COUNT")): launch
        for tokens in (1, 8)
        for launch in all_launches(LLAMA_8B, torch.bfloat16, 1, tokens)
        for name in (launch.kernel.__name__,)
    }
    assert {name for name, _, _ in launches} == KERNELS
    for (name, tokens, _), launch in launches.items():
        ptx = compile_launch(launch, 90).asm["ptx"]
        if tokens is not None:  # it streams weights: 16 bytes a thread at once
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", ptx), name
        if name == "attend" or (tokens or 1) > 1:
            assert "mma.sync" in ptx or "wgmma" in ptx, f"{name} leaves the tensor cores idle"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 16), (3, 1), (2, 5)])
def test_every_form_compiles_and_fits(
    dtype: torch.dtype, capability: int, rows: int, tokens: int
) -> None:
    for launch in all_launches(LLAMA_8B, dtype, rows, tokens):
        found = resources(compile_launch(launch, capability), capability)
        assert found.spilled <= SPILLED, launch.key()
        assert found.shared <= SHARED[capability], launch.key()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [ONES, ODD], ids=["ones", "odd"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, 5)])
def test_every_size_compiles(dtype: torch.dtype, sizes: Sizes, rows: int, tokens: int) -> None:
    for launch in all_launches(sizes, dtype, rows, tokens):
        assert "cubin" in compile_launch(launch, 90).asm, launch.key()


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("tokens", [1, 16])
def test_nested_weights_compile_and_fit(tokens: int, capability: int) -> None:
    calls = nested_calls(LLAMA_8B, torch.bfloat16, 1, tokens)
    launches = {launch.key(): launch for call in calls for launch in recorded(call)}
    assert {launch.kernel.__name__ for launch in launches.values()} == {
        *("by_outputs", "by_inputs", "add_up")
    }
    for launch in launches.values():
        found = resources(compile_launch(launch, capability), capability)
        assert found.spilled <= SPILLED, (launch.key(), found)
        assert found.shared <= SHARED[capability], launch.key()
