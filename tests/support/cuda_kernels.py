"""The CUDA kernels by the names of their operators. Importing it imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sirius_runtime.kernels.cuda import mlp as module
from sirius_runtime.operators import OPERATORS


class _Mlp:
    def __getattr__(self, operator: str) -> Callable[..., Any]:
        return OPERATORS[operator].kernel(module)


mlp = _Mlp()
