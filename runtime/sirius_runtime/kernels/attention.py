"""Cached attention on the CPU, by the kernel where it serves: of drafts, trees and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import TYPES, address, check, is_vector
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import attention as reference


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
    return _cached(
        q, k, v, k_cache, v_cache, positions, slots, length, tree_mask, layer, scale, window,
        softcap, sinks,
    )  # fmt: skip


def cached_attention_by_tokens(*args: Any) -> Tensor:
    """As `cached_attention`, for graphs that go on with a token's heads side by side: they lie so
    in memory, and need not be copied.
    """
    return _cached(*args, by_tokens=True)


def _cached(
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
    *,
    by_tokens: bool = False,
) -> Tensor:
    where = positions, slots, length, tree_mask
    if not _serves(q, k, v, k_cache, v_cache, where, window, softcap, sinks):
        return reference.cached_attention(
            q, k, v, k_cache, v_cache, positions, slots, length, tree_mask, layer, scale, window,
            softcap, sinks,
        )  # fmt: skip
    return _run(
        "cached_attention", q, k, v, k_cache[layer], v_cache[layer], None, None, positions, slots,
        length, tree_mask, scale, window, softcap, sinks, by_tokens=by_tokens,
    )  # fmt: skip


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_block: Tensor,
    v_block: Tensor,
    positions: Tensor,
    nodes: Tensor,
    length: Tensor,
    tree_mask: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.block_attention`."""
    where = positions, nodes, length, tree_mask
    if not (
        _serves(q, k, v, k_cache, v_cache, where, window, softcap, sinks)
        and _is_block(k_block, v_block, k, v, tree_mask)
    ):
        return reference.block_attention(
            q, k, v, k_cache, v_cache, k_block, v_block, positions, nodes, length, tree_mask,
            layer, scale, window, softcap, sinks,
        )  # fmt: skip
    k_new, v_new = k_block[layer].clone(), v_block[layer].clone()
    out = _run(
        "block_attention", q, k, v, k_cache[layer], v_cache[layer], k_new, v_new, positions, nodes,
        length, tree_mask, scale, window, softcap, sinks,
    )  # fmt: skip
    return out, k_new, v_new


def block_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_block: Tensor,
    v_block: Tensor,
    positions: Tensor,
    nodes: Tensor,
    length: Tensor,
    tree_mask: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `block_attention`, but the call's K/V are written into k_block and v_block themselves, and
    the result lies as that of `cached_attention_by_tokens`.
    """
    where = positions, nodes, length, tree_mask
    if not (
        _serves(q, k, v, k_cache, v_cache, where, window, softcap, sinks)
        and _is_block(k_block, v_block, k, v, tree_mask)
    ):
        out, k_new, v_new = reference.block_attention(
            q, k, v, k_cache, v_cache, k_block, v_block, positions, nodes, length, tree_mask,
            layer, scale, window, softcap, sinks,
        )  # fmt: skip
        k_block[layer].copy_(k_new)
        v_block[layer].copy_(v_new)
        return out
    return _run(
        "block_attention", q, k, v, k_cache[layer], v_cache[layer], k_block[layer], v_block[layer],
        positions, nodes, length, tree_mask, scale, window, softcap, sinks, by_tokens=True,
    )  # fmt: skip


def _is_block(k_block: Tensor, v_block: Tensor, k: Tensor, v: Tensor, tree_mask: Tensor) -> bool:
    """Whether these are a block's K/V for the kernel."""
    return (
        k_block.dtype is v_block.dtype is k.dtype
        and k_block.is_contiguous()
        and v_block.is_contiguous()
        and k_block.shape[1:4] == v_block.shape[1:4] == (*k.shape[:2], tree_mask.shape[2])
    )


def _serves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    where: Sequence[Tensor],
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> bool:
    """Whether the kernel takes these arguments, and is there. `where`: the mask last."""
    B, H, T, _ = q.shape
    G = k.shape[1]
    return (
        q.dtype in TYPES
        and T > 0
        and B > 0
        and H % G == 0
        and q.dtype is k.dtype is v.dtype is k_cache.dtype is v_cache.dtype
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and k_cache.shape[1:3] == v_cache.shape[1:3] == (B, G)
        and all(tensor.dtype is torch.int64 for tensor in where)
        and where[-1].shape[1] == T
        and (window is None or window > 0)
        and softcap != 0
        and is_vector(sinks, q.dtype, H)
        and kernels() is not None
    )


def _run(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    block_keys: Tensor | None,
    block_values: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    length: Tensor,
    tree_mask: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    by_tokens: bool = False,
) -> Tensor:
    """Attention over a layer's caches and, where it stands apart, the block [B, G, M, ·].

    `slots`: where K and V are written to, [B, T] of the caches or [T] of the block. `by_tokens`:
    the result, [B, H, T, Dv] still, lies in memory as [B, T, H, Dv].
    """
    library = kernels()
    assert library is not None
    B, H, T, D = q.shape
    G, V = k.shape[1], v.shape[3]
    S, M = keys.shape[2], tree_mask.shape[2]
    q, k, v, positions, slots, length, tree_mask = (
        tensor.contiguous() for tensor in (q, k, v, positions, slots, length, tree_mask)
    )
    out = q.new_empty(B, T, H, V) if by_tokens else q.new_empty(B, H, T, V)
    status = library.sirius_attention(
        TYPES[q.dtype], B, H, G, T, D, V, S, M,
        q.data_ptr(), k.data_ptr(), v.data_ptr(),
        keys.data_ptr(), values.data_ptr(), address(block_keys), address(block_values),
        positions.data_ptr(), slots.data_ptr(), length.data_ptr(), tree_mask.data_ptr(),
        0 if tree_mask.shape[0] == 1 else T * M,
        window or 0,
        scale,
        softcap or 0.0,
        address(sinks),
        out.data_ptr(),
        by_tokens,
        torch.get_num_threads(),
    )  # fmt: skip
    check(status, operator)
    return out.transpose(1, 2) if by_tokens else out
