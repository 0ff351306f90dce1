"""Runs the CUDA kernels in Triton's interpreter, on the CPU, whatever the process has imported.

``TRITON_INTERPRET=1`` counts most when Triton is imported, and other tests' imports bring it in; set
for all tests it would reach their compilers too. So the functions that Triton would compile are
replaced by their interpreted forms, for the length of a test.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import torch

from sirius_runtime.kernels.cuda import tiles


def require_triton() -> ModuleType:
    """Triton; skips the test, and says why, where there is none."""
    return pytest.importorskip("triton", reason="Triton can't be imported")


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, kernels run in the interpreter."""
    triton = require_triton()
    import triton.experimental.gluon.language  # the interpreter would import it, interpreted
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from sirius_runtime.kernels.cuda import device
    from sirius_runtime.kernels.cuda.device import (
        arithmetic,
        attention,
        channels,
        products,
        selection,
        sums,
    )

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ours = [device, arithmetic, attention, channels, products, selection, sums]
    for module in (triton.language, triton.language.standard, *ours):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, _interpreted(value.fn))
    monkeypatch.setattr(arithmetic, "INTERPRETED", triton.language.constexpr(True))

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        """Triton 3.6 makes loop bounds of arrays of one element, which NumPy 2.4 refuses."""
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@functools.cache
def _interpreted(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that tensors of tests are several of them, and sums are in several parts."""

    def products(tokens: int, *_: object) -> tiles.Tile:
        return tiles.Tile(2 if tokens == 1 else 16, 16)

    def sums(tokens: int, C: int, dtype: torch.dtype) -> tiles.Tile:
        return tiles.Tile(4 if tokens == 1 else 16, 32)

    def attention(queries: int, D: int, V: int, dtype: torch.dtype) -> tiles.AttentionTile:
        return tiles.AttentionTile(16, 16, 4, 1)

    monkeypatch.setattr(tiles, "products", products)
    monkeypatch.setattr(tiles, "sums", sums)
    monkeypatch.setattr(tiles, "attention", attention)
    monkeypatch.setattr(tiles, "linear_splits", lambda steps, *_: min(steps, 2))
    monkeypatch.setattr(tiles, "splits", lambda *_: 3)
    monkeypatch.setattr(tiles, "channel_share", lambda *_: 16)
    monkeypatch.setattr(tiles, "SELECTED", 64)
    monkeypatch.setattr(tiles, "ADDED", 2)
