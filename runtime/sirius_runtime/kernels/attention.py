"""Cached attention on the CPU: the kernel for few tokens, torch's attention for a prompt's."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import TYPES, address, check, is_vector
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import attention as reference

TOKENS = 64
"""Tokens of a row from which on the products of attention are left to torch."""


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    length: Tensor,
    tree_mask: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `reference.cached_attention`; IndexError for a slot that is not there."""
    kind = TYPES.get(q.dtype)
    B, H, T, D = q.shape
    G, V = k.shape[1], v.shape[3]
    where = positions, slots, length, tree_mask
    if not (
        kind is not None
        and 1 <= T <= TOKENS
        and B > 0
        and H % G == 0
        and q.dtype is k.dtype is v.dtype is k_cache.dtype is v_cache.dtype
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and k_cache.shape[1:3] == v_cache.shape[1:3] == (B, G)
        and all(tensor.dtype is torch.int64 for tensor in where)
        and tree_mask.shape[1] == T
        and (window is None or window > 0)
        and softcap != 0
        and is_vector(sinks, q.dtype, H)
        and (library := kernels()) is not None
    ):
        return reference.cached_attention(
            q, k, v, k_cache, v_cache, *where, layer, scale, window, softcap, sinks
        )
    S, M = k_cache.shape[3], tree_mask.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    positions, slots, length, tree_mask = (tensor.contiguous() for tensor in where)
    out = q.new_empty(B, H, T, V)
    status = library.sirius_attention(
        kind, B, H, G, T, D, V, S, M,
        q.data_ptr(), k.data_ptr(), v.data_ptr(),
        k_cache[layer].data_ptr(), v_cache[layer].data_ptr(),
        positions.data_ptr(), slots.data_ptr(), length.data_ptr(), tree_mask.data_ptr(),
        0 if tree_mask.shape[0] == 1 else T * M,
        window or 0,
        scale,
        softcap or 0.0,
        address(sinks),
        out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check(status, "cached_attention")
    return out
