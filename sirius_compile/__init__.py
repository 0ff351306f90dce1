"""The Sirius compiler: from a dense decoder to one artifact with paired sparse and full paths.

from sirius_compile import CompileConfig, compile_model
compiled = compile_model("tally-3m", CompileConfig(sparsity="griffin"))
compiled.save("tally.sirius")
model = compiled.to_runtime()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sirius_compile.compile import compile_model
    from sirius_compile.config import CompileConfig
    from sirius_compile.product import Compiled

_HOMES = {"CompileConfig": "config", "Compiled": "product", "compile_model": "compile"}

__all__ = ["CompileConfig", "Compiled", "compile_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
