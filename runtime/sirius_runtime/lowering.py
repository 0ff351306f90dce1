"""Decompositions of the `sirius::` operators into PyTorch's, for compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sirius_runtime.operators import OPERATORS


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `ExportedProgram.run_decompositions`: PyTorch's default table, and the `sirius::`
    operators that do not write in place.

    `sirius::cached_attention` writes in place, so it has no decomposition. The entry `period` can
    be lowered: it uses `sirius::block_attention` instead.
    """
    own = {
        row.overload: row.decomposition or row.reference
        for row in OPERATORS.values()
        if not row.mutates
    }
    return {**torch.export.default_decompositions(), **own}
