"""The operators as the dispatcher calls them on CUDA: the kernels where they serve, else the
references. Importing this module imports no Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sirius_runtime.kernels.cuda.available import launchers

OPERATORS = {
    "attention": ("cached_attention", "block_attention"),
    "linear": ("linear", "linears", "sparse_linear"),
    "mlp": (
        *("dense_mlp", "dense_mlp_statistic", "dense_mlp_activity", "topk_mlp", "cats_mlp"),
        *("griffin_mlp", "griffin_cats_mlp"),
    ),
}
"""By module: of the same name in `sirius_runtime.ops` and here."""


def operators() -> list[Callable[..., Any]]:
    """Functions with the operators' names and arguments."""
    return [
        _operator(module, importlib.import_module(f"sirius_runtime.ops.{module}"), name)
        for module, names in OPERATORS.items()
        for name in names
    ]


def _operator(module: str, reference: ModuleType, name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        launching = launchers(module, args[0].device)
        done = None if launching is None else getattr(launching, name)(*args)
        return getattr(reference, name)(*args) if done is None else done

    call.__name__ = name
    return call
