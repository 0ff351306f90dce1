"""Attention of few tokens. Each function returns None where its kernels do not serve."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import TYPES, given, is_vector
from sirius_runtime.kernels.cuda.device import attention
from sirius_runtime.kernels.cuda.launch import launch


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
) -> Tensor | None:
    """As the reference `sirius_runtime.ops.attention.cached_attention`. A slot that is not there
    is left out; a query that sees nothing gives zeros.
    """
    where = positions, slots, length, tree_mask
    if not _serves(q, k, v, k_cache, v_cache, where, window, softcap, sinks):
        return None
    k, v = _rows(k), _rows(v)
    keys, values = k_cache[layer], v_cache[layer]
    B, G, T, D = k.shape
    V, S = v.shape[3], keys.shape[2]
    launch(
        attention.store_kv,
        (T, G, B),
        q.device,
        (k, v, keys, values, slots.contiguous(), G, T, D, V, S, *k.stride()[:3], *v.stride()[:3]),
        tiles.Tile(0, 0, warps=1),
        BLOCK=tiles.power_of_two(max(D, V)),
    )
    return _run(
        q, keys, values, None, None, positions, length, tree_mask, scale, window, softcap, sinks
    )


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
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As the reference `sirius_runtime.ops.attention.block_attention`."""
    where = positions, length, tree_mask
    if not (
        _serves(q, k, v, k_cache, v_cache, where, window, softcap, sinks)
        and k_block.dtype is v_block.dtype is q.dtype
        and k_block.shape[3] == v_block.shape[3] == tree_mask.shape[2]
    ):
        return None
    k_new = k_block[layer].index_copy(2, nodes, k).contiguous()
    v_new = v_block[layer].index_copy(2, nodes, v).contiguous()
    out = _run(
        q, k_cache[layer], v_cache[layer], k_new, v_new, positions, length, tree_mask,
        scale, window, softcap, sinks,
    )  # fmt: skip
    return out, k_new, v_new


def _serves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    where: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> bool:
    """Whether the kernels take these arguments. `where`: the mask last."""
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
        and q.dtype is k.dtype is v.dtype is k_cache.dtype is v_cache.dtype
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and k_cache.shape[1:3] == v_cache.shape[1:3] == (B, G)
        and k_cache.shape[3] == v_cache.shape[3] > 0
        and all(tensor.dtype is torch.int64 for tensor in where)
        and where[-1].shape[1] == T
        and all(tensor.device == q.device for tensor in (k, v, k_cache, v_cache, *where))
        and (window is None or window > 0)
        and softcap != 0
        and is_vector(sinks, q.dtype, q.device, H)
    )


def _rows(tensor: Tensor) -> Tensor:
    """[B, ·, T, ·] whose last dimension is contiguous: a transposed view need not be copied."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _run(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_keys: Tensor | None,
    block_values: Tensor | None,
    positions: Tensor,
    length: Tensor,
    tree_mask: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over a layer's caches and, where it stands apart, the block [B, G, M, ·]."""
    q = _rows(q)
    positions, length, tree_mask = (t.contiguous() for t in (positions, length, tree_mask))
    B, H, T, D = q.shape
    G, S, V = keys.shape[1], keys.shape[2], values.shape[3]
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
            *(q, keys, values, given(block_keys, keys), given(block_values, values)),
            *(positions, length, tree_mask, totals, mosts, masses),
            *(G, T, D, V, S, M, *q.stride()[:3], 0 if tree_mask.shape[0] == 1 else T * M),
            *(scale, softcap or 0.0, window or 0, share, parts),
        ),
        tiles.Tile(0, 0, tile.warps, tile.stages),
        APART=block_keys is not None,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
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
        (totals, mosts, masses, given(sinks, q), out, H, T, V),
        tiles.Tile(0, 0),
        HAS_SINKS=sinks is not None,
        PARTS=parts,
        VALUE=tiles.power_of_two(V),
    )
    return out
