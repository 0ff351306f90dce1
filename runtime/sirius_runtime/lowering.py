"""The `sirius::` operators in terms of PyTorch's own, for compilers that know no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sirius_runtime.operators import OPERATORS


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `ExportedProgram.run_decompositions`: PyTorch's, and the functional operators'.

    `sirius::cached_attention` writes in place and has none; lower the entry `period`, which holds
    `sirius::block_attention` instead.
    """
    own = {
        row.overload: row.decomposition or row.reference
        for row in OPERATORS.values()
        if not row.mutates
    }
    return {**torch.export.default_decompositions(), **own}
