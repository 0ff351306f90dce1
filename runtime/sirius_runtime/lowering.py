"""The `sirius::` operators in terms of PyTorch's own, for compilers that know no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sirius_runtime.ops import attention, linear, mlp, moe

_REFERENCES = (
    mlp.dense_mlp,
    mlp.dense_mlp_statistic,
    mlp.dense_mlp_activity,
    mlp.topk_mlp,
    mlp.cats_mlp,
    mlp.griffin_mlp,
    mlp.griffin_cats_mlp,
    linear.sparse_linear,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `ExportedProgram.run_decompositions`: PyTorch's, and the functional operators'.

    `sirius::cached_attention` writes in place and has none; lower the entry `period`, which holds
    `sirius::block_attention` instead.
    """
    sirius = torch.ops.sirius
    own: dict[Any, Callable[..., Any]] = {
        getattr(sirius, reference.__name__).default: reference for reference in _REFERENCES
    }
    own[sirius.block_attention.default] = attention.decomposed_block_attention
    own[sirius.dense_moe.default] = moe.decomposed_dense_moe
    own[sirius.topk_moe.default] = moe.decomposed_topk_moe
    own[sirius.experts_moe.default] = moe.decomposed_experts_moe
    return {**torch.export.default_decompositions(), **own}
