"""Attention for few tokens. Each function returns None if its kernels do not take the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import TYPES, given, is_vector
from sirius_runtime.kernels.cuda.device import attention
from sirius_runtime.kernels.cuda.launch import launch
from sirius_runtime.ops.operands import Attention, Caches, Heads, Places, grouped


@grouped
def cached_attention(
    heads: Heads[Tensor], caches: Caches[Tensor], places: Places[Tensor], kind: Attention[Tensor]
) -> Tensor | None:
    """As the reference `sirius_runtime.ops.attention.cached_attention`. K/V for a slot out of range
    are not written; a query that sees no slot gives zeros.
    """
    if not _serves(heads, caches, places, kind):
        return None
    k, v = _rows(heads.k), _rows(heads.v)
    own = Caches(caches.k[kind.layer], caches.v[kind.layer])
    B, G, T, D = k.shape
    V, S = v.shape[3], own.k.shape[2]
    slots = places.slots.contiguous()
    launch(
        attention.store_kv,
        (T, G, B),
        k.device,
        (k, v, *own, slots, G, T, D, V, S, *k.stride()[:3], *v.stride()[:3]),
        tiles.Tile(0, 0, warps=1),
        BLOCK=tiles.power_of_two(max(D, V)),
    )
    return _run(heads.q, own, None, places, kind)


@grouped
def block_attention(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As the reference `sirius_runtime.ops.attention.block_attention`."""
    if not (
        _serves(heads, caches, places, kind)
        and block.k.dtype is block.v.dtype is heads.q.dtype
        and block.k.shape[3] == block.v.shape[3] == places.tree_mask.shape[2]
    ):
        return None
    new = Caches(
        block.k[kind.layer].index_copy(2, places.slots, heads.k).contiguous(),
        block.v[kind.layer].index_copy(2, places.slots, heads.v).contiguous(),
    )
    own = Caches(caches.k[kind.layer], caches.v[kind.layer])
    return _run(heads.q, own, new, places, kind), *new


def _serves(
    heads: Heads[Tensor], caches: Caches[Tensor], places: Places[Tensor], kind: Attention[Tensor]
) -> bool:
    """Whether the kernels take these arguments."""
    q, k, v = heads
    B, H, T, D = q.shape
    G, V = k.shape[1], v.shape[3]
    return (
        q.dtype in TYPES
        and 1 <= T <= tiles.MOST_QUERIES
        and 1 <= D <= tiles.MOST_HEAD
        and 1 <= V <= tiles.MOST_HEAD
        and B > 0
        and G > 0
        and H % G == 0
        and q.dtype is k.dtype is v.dtype is caches.k.dtype is caches.v.dtype
        and caches.k[:1].is_contiguous()  # each layer, as in a slice of a larger batch's rows
        and caches.v[:1].is_contiguous()
        and caches.k.shape[1:3] == caches.v.shape[1:3] == (B, G)
        and caches.k.shape[3] == caches.v.shape[3] > 0
        and all(tensor.dtype is torch.int64 for tensor in places)
        and places.tree_mask.shape[1] == T
        and all(tensor.device == q.device for tensor in (k, v, *caches, *places))
        and (kind.window is None or kind.window > 0)
        and kind.softcap != 0
        and is_vector(kind.sinks, q.dtype, q.device, H)
    )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor [B, ·, T, ·] with a contiguous last dimension; a transposed view is not copied."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _run(
    q: Tensor,
    caches: Caches[Tensor],
    block: Caches[Tensor] | None,
    places: Places[Tensor],
    kind: Attention[Tensor],
) -> Tensor:
    """Attention over a layer's caches and, if given, a separate block [B, G, M, ·]."""
    q = _rows(q)
    positions, _, length, tree_mask = (tensor.contiguous() for tensor in places)
    B, H, T, D = q.shape
    G, S, V = caches.k.shape[1], caches.k.shape[2], caches.v.shape[3]
    M, share = tree_mask.shape[2], H // G
    tile = tiles.attention(share * T, D, V, q.dtype)
    blocks = -(-share * T // tile.queries)
    parts = tiles.attention_parts(S, tile, B * G * blocks, q.device)
    totals = q.new_empty(B, H, T, parts, V, dtype=torch.float32)
    mosts, masses = q.new_empty(2, B, H, T, parts, dtype=torch.float32)
    launch(
        attention.attend,
        (parts, blocks, B * G),
        q.device,
        (
            *(q, *caches, *(caches if block is None else block)),
            *(positions, length, tree_mask, totals, mosts, masses),
            *(G, T, D, V, S, M, *q.stride()[:3], 0 if tree_mask.shape[0] == 1 else T * M),
            *(kind.scale, kind.softcap or 0.0, kind.window or 0, share, parts),
        ),
        tiles.Tile(0, 0, tile.warps, tile.stages),
        APART=block is not None,
        WINDOW=kind.window is not None,
        SOFTCAP=kind.softcap is not None,
        QUERIES=tile.queries,
        SLOTS=tile.slots,
        KEY=max(16, tiles.power_of_two(D)),
        VALUE=max(16, tiles.power_of_two(V)),
    )
    out = q.new_empty(B, H, T, V)
    launch(
        attention.merge,
        (T, H, B),
        q.device,
        (totals, mosts, masses, given(kind.sinks, q), out, H, T, V),
        tiles.Tile(0, 0),
        HAS_SINKS=kind.sinks is not None,
        PARTS=parts,
        VALUE=tiles.power_of_two(V),
    )
    return out
