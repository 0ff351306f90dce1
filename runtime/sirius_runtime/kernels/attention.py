"""Cached attention on the CPU for drafts, trees and prompts: by the kernel, else the reference."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import TYPES, check, is_vector, of_ranks, vector
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import attention as reference
from sirius_runtime.ops.operands import Attention, Caches, Heads, Places, grouped

_ATTENTION = Struct("=52q")  # AttentionOperands of ``csrc/cpu.cpp``
_NO_BLOCK = (0,) * 10
_NAMES = "q k v k_cache v_cache positions length tree_mask"
_RANKS = (4, 4, 4, 5, 5, 2, 1, 3)


@grouped
def cached_attention(
    heads: Heads[Tensor], caches: Caches[Tensor], places: Places[Tensor], kind: Attention[Tensor]
) -> Tensor:
    """As `reference.cached_attention`. Raises IndexError for a slot out of range."""
    return _cached(heads, caches, places, kind, by_tokens=False)


@grouped
def cached_attention_by_tokens(
    heads: Heads[Tensor], caches: Caches[Tensor], places: Places[Tensor], kind: Attention[Tensor]
) -> Tensor:
    """As `cached_attention`, but the result lies in memory as [B, T, H, Dv], so that a graph that
    joins a token's heads next need not copy it.
    """
    return _cached(heads, caches, places, kind, by_tokens=True)


def _cached(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
    *,
    by_tokens: bool,
) -> Tensor:
    if not _serves(heads, caches, places, kind):
        return reference.cached_attention(*heads, *caches, *places, *kind)
    return _run("cached_attention", heads, caches, None, places, kind, by_tokens=by_tokens)


@grouped
def block_attention(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.block_attention`."""
    if not (_serves(heads, caches, places, kind) and _is_block(block, heads)):
        return reference.block_attention(*heads, *caches, *block, *places, *kind)
    new = Caches(block.k[kind.layer].clone(), block.v[kind.layer].clone())
    return _run("block_attention", heads, caches, new, places, kind), *new


@grouped
def block_attention_(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
) -> Tensor:
    """As `block_attention`, but the call's K/V are written into the block itself. The result lies
    in memory as in `cached_attention_by_tokens`.
    """
    layer_block = Caches(block.k[kind.layer], block.v[kind.layer])
    if not (_serves(heads, caches, places, kind) and _is_block(block, heads)):
        out, *new = reference.block_attention(*heads, *caches, *block, *places, *kind)
        for stored, value in zip(layer_block, new, strict=True):
            stored.copy_(value)
        return out
    return _run("block_attention", heads, caches, layer_block, places, kind, by_tokens=True)


def _is_block(block: Caches[Tensor], heads: Heads[Tensor]) -> bool:
    """Whether the kernel takes the block: contiguous, of the queries' type."""
    return (
        block.k.dtype is block.v.dtype is heads.q.dtype
        and block.k.is_contiguous()
        and block.v.is_contiguous()
    )


def _layers_whole(caches: Caches[Tensor]) -> bool:
    """Whether each layer of the caches is contiguous, as in a slice of a larger batch's rows."""
    return caches.k[:1].is_contiguous() and caches.v[:1].is_contiguous()


def _serves(
    heads: Heads[Tensor], caches: Caches[Tensor], places: Places[Tensor], kind: Attention[Tensor]
) -> bool:
    """Whether the kernel is available and takes arguments of these types and layouts."""
    dtype = heads.q.dtype
    positions, slots, length, mask = places
    return (
        dtype in TYPES
        and heads.q.numel() > 0
        and dtype is heads.k.dtype is heads.v.dtype is caches.k.dtype is caches.v.dtype
        and _layers_whole(caches)
        and positions.dtype is slots.dtype is length.dtype is mask.dtype is torch.int64
        and (kind.window is None or kind.window > 0)
        and kind.softcap != 0
        and is_vector(kind.sinks, dtype)
        and kernels() is not None
    )


def _run(
    operator: str,
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor] | None,
    places: Places[Tensor],
    kind: Attention[Tensor],
    *,
    by_tokens: bool = False,
) -> Tensor:
    """Attention over one layer of the caches and, if given, a separate block [B, G, M, ·].

    K and V are written to the slots [B, T] of the caches or to the nodes [T] of the block.
    by_tokens: the result [B, H, T, Dv] lies in memory as [B, T, H, Dv].
    """
    library = kernels()
    assert library is not None
    positions, slots, length, tree_mask = places
    given = *heads, *caches, positions, length, tree_mask
    if tuple(tensor.ndim for tensor in given) != _RANKS:
        of_ranks(operator, _NAMES, given, _RANKS)
    q, k, v = (tensor.contiguous() for tensor in heads)
    positions, slots, length, tree_mask = (tensor.contiguous() for tensor in places)
    if block is None:
        of_ranks(operator, "slots", (slots,), (2,))
        block_operands = _NO_BLOCK
    else:
        of_ranks(operator, "nodes k_block v_block", (slots, *block), (1, 4, 4))
        block_operands = (block.k.data_ptr(), *block.k.shape, block.v.data_ptr(), *block.v.shape)
        slots = slots[None]
    k_cache, v_cache = caches
    layer = kind.layer
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):  # only each layer is
        k_cache, v_cache = (cache[layer : layer + 1] for cache in caches)
        layer = 0
    B, H, T, _ = q.shape
    V = v.shape[3]
    out = q.new_empty(B, T, H, V) if by_tokens else q.new_empty(B, H, T, V)
    operands = _ATTENTION.pack(
        q.data_ptr(), B, H, T, q.shape[3],
        k.data_ptr(), *k.shape,
        v.data_ptr(), *v.shape,
        k_cache.data_ptr(), *k_cache.shape,
        v_cache.data_ptr(), *v_cache.shape,
        *block_operands,
        positions.data_ptr(), *positions.shape,
        slots.data_ptr(), *slots.shape,
        length.data_ptr(), *length.shape,
        tree_mask.data_ptr(), *tree_mask.shape,
        *vector(kind.sinks),
        out.data_ptr(),
    )  # fmt: skip
    status = library.sirius_attention(
        TYPES[q.dtype],
        operands,
        layer,
        kind.window or 0,
        kind.scale,
        kind.softcap or 0.0,
        by_tokens,
        torch.get_num_threads(),
    )
    check(library, status, operator)
    return out.transpose(1, 2) if by_tokens else out
