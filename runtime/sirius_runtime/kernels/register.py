"""Puts the CPU and CUDA kernels behind the operators, where the operators are registered."""

from __future__ import annotations

from sirius_runtime.kernels import attention, linear, mlp, moe
from sirius_runtime.kernels.cuda.operators import operators
from sirius_runtime.ops.registry import define_cpu, define_cuda

KERNELS = (
    attention.cached_attention,
    attention.block_attention,
    linear.linear,
    linear.linears,
    linear.sparse_linear,
    mlp.dense_mlp,
    mlp.dense_mlp_statistic,
    mlp.dense_mlp_activity,
    mlp.topk_mlp,
    mlp.cats_mlp,
    mlp.griffin_mlp,
    mlp.griffin_cats_mlp,
    moe.dense_moe,
    moe.topk_moe,
    moe.experts_moe,
)
"""What runs on the CPU for the operators of these names."""


def register() -> None:
    """Called once, by `sirius_runtime.operators`, when the operators are defined."""
    for kernel in KERNELS:
        define_cpu(kernel)
    for operator in operators():
        define_cuda(operator)
