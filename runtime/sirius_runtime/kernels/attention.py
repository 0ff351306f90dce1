"""Cached attention on the CPU, by the kernel where it serves: of drafts, trees and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import TYPES, check, is_vector, of_ranks, vector
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import attention as reference

_ATTENTION = Struct("=52q")  # AttentionOperands of ``csrc/cpu.cpp``
_NO_BLOCK = (0,) * 10
_NAMES = "q k v k_cache v_cache positions length tree_mask"
_RANKS = (4, 4, 4, 5, 5, 2, 1, 3)


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
        "cached_attention", q, k, v, k_cache, v_cache, None, None, positions, slots, length,
        tree_mask, layer, scale, window, softcap, sinks, by_tokens=by_tokens,
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
        and _is_block(k_block, v_block, q)
    ):
        return reference.block_attention(
            q, k, v, k_cache, v_cache, k_block, v_block, positions, nodes, length, tree_mask,
            layer, scale, window, softcap, sinks,
        )  # fmt: skip
    k_new, v_new = k_block[layer].clone(), v_block[layer].clone()
    out = _run(
        "block_attention", q, k, v, k_cache, v_cache, k_new, v_new, positions, nodes, length,
        tree_mask, layer, scale, window, softcap, sinks,
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
        and _is_block(k_block, v_block, q)
    ):
        out, k_new, v_new = reference.block_attention(
            q, k, v, k_cache, v_cache, k_block, v_block, positions, nodes, length, tree_mask,
            layer, scale, window, softcap, sinks,
        )  # fmt: skip
        k_block[layer].copy_(k_new)
        v_block[layer].copy_(v_new)
        return out
    return _run(
        "block_attention", q, k, v, k_cache, v_cache, k_block[layer], v_block[layer], positions,
        nodes, length, tree_mask, layer, scale, window, softcap, sinks, by_tokens=True,
    )  # fmt: skip


def _is_block(k_block: Tensor, v_block: Tensor, q: Tensor) -> bool:
    """Whether these are a block's K/V for the kernel."""
    return (
        k_block.dtype is v_block.dtype is q.dtype
        and k_block.is_contiguous()
        and v_block.is_contiguous()
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
    """Whether the kernel takes arguments of these types, and is there."""
    positions, slots, length, mask = where
    return (
        q.dtype in TYPES
        and q.numel() > 0
        and q.dtype is k.dtype is v.dtype is k_cache.dtype is v_cache.dtype
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and positions.dtype is slots.dtype is length.dtype is mask.dtype is torch.int64
        and (window is None or window > 0)
        and softcap != 0
        and is_vector(sinks, q.dtype)
        and kernels() is not None
    )


def _run(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_block: Tensor | None,
    v_block: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    length: Tensor,
    tree_mask: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    by_tokens: bool = False,
) -> Tensor:
    """Attention over a layer of the caches and, where it stands apart, the block [B, G, M, ·].

    `slots`: where K and V are written to, [B, T] of the caches or [T] of the block. `by_tokens`:
    the result, [B, H, T, Dv] still, lies in memory as [B, T, H, Dv].
    """
    library = kernels()
    assert library is not None
    given = q, k, v, k_cache, v_cache, positions, length, tree_mask
    if (
        q.ndim, k.ndim, v.ndim, k_cache.ndim, v_cache.ndim, positions.ndim, length.ndim,
        tree_mask.ndim,
    ) != _RANKS:  # fmt: skip
        of_ranks(operator, _NAMES, given, _RANKS)
    q, k, v, positions, slots, length, tree_mask = (
        tensor.contiguous() for tensor in (q, k, v, positions, slots, length, tree_mask)
    )
    if k_block is None or v_block is None:
        of_ranks(operator, "slots", (slots,), (2,))
        block = _NO_BLOCK
    else:
        of_ranks(operator, "nodes k_block v_block", (slots, k_block, v_block), (1, 4, 4))
        block = (k_block.data_ptr(), *k_block.shape, v_block.data_ptr(), *v_block.shape)
        slots = slots[None]
    B, H, T, _ = q.shape
    V = v.shape[3]
    out = q.new_empty(B, T, H, V) if by_tokens else q.new_empty(B, H, T, V)
    operands = _ATTENTION.pack(
        q.data_ptr(), B, H, T, q.shape[3],
        k.data_ptr(), *k.shape,
        v.data_ptr(), *v.shape,
        k_cache.data_ptr(), *k_cache.shape,
        v_cache.data_ptr(), *v_cache.shape,
        *block,
        positions.data_ptr(), *positions.shape,
        slots.data_ptr(), *slots.shape,
        length.data_ptr(), *length.shape,
        tree_mask.data_ptr(), *tree_mask.shape,
        *vector(sinks),
        out.data_ptr(),
    )  # fmt: skip
    status = library.sirius_attention(
        TYPES[q.dtype],
        operands,
        layer,
        window or 0,
        scale,
        softcap or 0.0,
        by_tokens,
        torch.get_num_threads(),
    )
    check(library, status, operator)
    return out.transpose(1, 2) if by_tokens else out
