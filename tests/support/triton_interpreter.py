"""Runs the CUDA kernels in Triton's interpreter, on the CPU, whatever the process has imported.

``TRITON_INTERPRET=1`` counts most when Triton is imported, and other tests' imports bring it in;
set for all tests it would reach their compilers too. So the functions that Triton would compile are
replaced by their interpreted forms, and put back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from sirius_runtime.kernels.cuda import tiles


def require_triton() -> ModuleType:
    """Triton; skips the test, and says why, where there is none."""
    return pytest.importorskip("triton", reason="Triton can't be imported")


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it, kernels run in the interpreter."""
    language = require_triton().language
    importlib.import_module("triton.experimental.gluon.language")  # else it would be interpreted
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from sirius_runtime.kernels.cuda.device import (
        arithmetic,
        attention,
        channels,
        nested,
        products,
        selection,
        sums,
    )

    modules = (
        language,
        language.standard,
        arithmetic,
        attention,
        channels,
        nested,
        products,
        selection,
        sums,
    )
    functions = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    # The interpreter patches the language at each call of a function, which takes longer than the
    # function, and does not always take it back. Once for all is enough.
    scopes = [interpreter._patch_lang(f) for f in (language.standard.sum.fn, products.linears.fn)]
    for scope in scopes:
        # Triton 3.6 makes loop bounds of arrays of one element, which NumPy 2.4 refuses.
        scope.set_attr(language.tensor, "__index__", lambda self: self.handle.data.item())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module, name, value in functions:
            patch.setattr(module, name, _interpreted(value.fn))
        patch.setattr(arithmetic, "INTERPRETED", language.constexpr(True))
        patch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
        try:
            yield
        finally:
            for scope in reversed(scopes):
                scope.restore()


@functools.cache
def _interpreted(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that tensors of tests are several of them, and sums are in several parts."""

    def products(*_: object) -> tiles.Tile:
        return tiles.Tile(16, 16)

    def sums(tokens: int, C: int, dtype: torch.dtype) -> tiles.Tile:
        return tiles.Tile(4 if tokens == 1 else 16, 32)

    def attention(queries: int, D: int, V: int, dtype: torch.dtype) -> tiles.AttentionTile:
        return tiles.AttentionTile(16, 16, 4, 1)

    monkeypatch.setattr(tiles, "products", products)
    monkeypatch.setattr(tiles, "sums", sums)
    monkeypatch.setattr(tiles, "channels", sums)
    monkeypatch.setattr(tiles, "attention", attention)
    monkeypatch.setattr(tiles, "linear_splits", lambda *_: 2)
    monkeypatch.setattr(tiles, "splits", lambda *_: 3)
    monkeypatch.setattr(tiles, "channel_share", lambda *_: 16)
    monkeypatch.setattr(tiles, "SELECTED", 64)
    monkeypatch.setattr(tiles, "PARTS", 2)
    monkeypatch.setattr(tiles, "FEATURES", 32)
