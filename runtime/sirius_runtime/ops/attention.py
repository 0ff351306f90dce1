"""Attention: the cacheless form that capture emits, and the cached tree attention that runs.

A *block* is the run of tokens that follows the committed history of a row: a prompt chunk, a draft,
or a tree of drafts. Its j-th token lives in cache slot `length + j` (slot), at position `length +
depth(j)` (position); in a chain the two agree, in a tree they do not. `tree_mask` says who in the
block sees whom.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.ops.registry import define


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention of q [B, H, T, D] over k, v [B, G, S, D] where `visible` [B | 1, 1, T,
    S]. Contiguous, as the operators' fakes promise to compilers.
    """
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).contiguous()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return _softmax(scores, sinks).to(q.dtype) @ v


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Shares of scores [B, H, T, S]; a head's sink takes part and its share is dropped."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _output_like(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal self-attention without a cache: what capture emits, one a layer.

    q [B, H, T, D]; k [B, G, T, D]; v [B, G, T, Dv]; returns [B, H, T, Dv]. A query sees the
    `window` last positions up to its own (all of them where None); `softcap` bounds scores to
    ±softcap by tanh. `sinks` [H] are scores of a token without a value, which every query of the
    head sees. `layer` is the index of the layer, kept for the passes.
    """
    index = torch.arange(q.shape[2], device=q.device)
    distance_TT = index[:, None] - index[None, :]
    visible = distance_TT >= 0
    if window is not None:
        visible = visible & (distance_TT < window)
    return _attend(q, k, v, visible[None, None], scale, softcap, sinks)


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
    """Writes k, v to their slots, then attends to the committed history and to the block's
    ancestors.

    q [B, H, T, D], k [B, G, T, D], v [B, G, T, Dv] of the call's T tokens; k_cache [layers, B, G,
    S, D] and v_cache [layers, B, G, S, Dv] are written at `layer` and `slots` [B, T]. `positions`
    [B, T] are the tokens' positions, `length` [B] the committed tokens of each row: slots below it
    hold the token of the same position. `tree_mask` [B | 1, T, M], int: for block slot `length +
    j`, the depth of the query minus that of the slot's token, or -1 where it is not the query or
    its ancestor (a depth, not a flag, so that windows hold inside a block). Slots from `length + M`
    on are never seen. Returns [B, H, T, Dv].
    """
    B, _, T, _ = q.shape
    M = tree_mask.shape[-1]
    k_layer, v_layer = k_cache[layer], v_cache[layer]
    k_layer.scatter_(2, slots[:, None, :, None].expand(k.shape), k)
    v_layer.scatter_(2, slots[:, None, :, None].expand(v.shape), v)

    extent = k_layer.shape[2]
    if length.device.type == "cpu":  # free there; elsewhere a read would stall the device
        extent = min(extent, int(length.max()) + M)
    slot_E = torch.arange(extent, device=q.device)
    block_BE = slot_E - length[:, None]
    in_block = tree_mask.expand(B, T, M).gather(
        2, block_BE.clamp(0, M - 1)[:, None, :].expand(B, T, extent)
    )
    in_block = in_block.masked_fill((block_BE >= M)[:, None, :], -1)
    committed = positions[:, :, None] - slot_E
    distance_BTE = torch.where((block_BE < 0)[:, None, :], committed, in_block)
    visible = distance_BTE >= 0
    if window is not None:
        visible = visible & (distance_BTE < window)
    return _attend(
        q, k_layer[:, :, :extent], v_layer[:, :, :extent], visible[:, None], scale, softcap, sinks
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` without a mutation: the block's K/V stands apart from the caches.

    As `cached_attention`, but the caches are read only, below `length`; k_block [layers, B, G, M,
    D] and v_block [layers, B, G, M, Dv] hold the block's K/V so far, and the call's tokens are its
    `nodes` [T] in every row. Returns the output [B, H, T, Dv], and the layer's block with the
    call's K/V in place: [B, G, M, D] and [B, G, M, Dv]. A loop that drafts carries the block alone,
    never a copy of the caches.
    """
    extent = k_cache.shape[3]
    if length.device.type == "cpu":  # as above
        extent = min(extent, int(length.max()))
    return _block_attention(
        q, k, v, k_cache, v_cache, k_block, v_block, positions, nodes, length, tree_mask,
        layer, scale, window, softcap, sinks, extent=extent,
    )  # fmt: skip


def decomposed_block_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_attention` in PyTorch's operators alone, for lowering: all slots, no host read."""
    return _block_attention(q, k, v, k_cache, *rest, extent=k_cache.shape[3])


def _block_attention(
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
    *,
    extent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    G = k.shape[1]
    k_new = k_block[layer].index_copy(2, nodes, k)
    v_new = v_block[layer].index_copy(2, nodes, v)
    slot_E = torch.arange(extent, device=q.device)
    distance_BTE = positions[:, :, None] - slot_E
    committed = slot_E < length[:, None, None]
    in_block = tree_mask.expand(B, T, tree_mask.shape[-1])
    visible = torch.cat([committed.expand(B, T, extent), in_block >= 0], -1)
    if window is not None:
        visible = visible & (torch.cat([distance_BTE, in_block], -1) < window)

    # The heads that share a key/value head are rows of one product: no key is copied.
    q_BGRD = q.reshape(B, G, H // G * T, D)
    scores = torch.cat(
        [
            q_BGRD @ k_cache[layer, :, :, :extent].transpose(-1, -2),
            q_BGRD @ k_new.transpose(-1, -2),
        ],
        -1,
    ).float()
    scores = scores.view(B, H, T, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(visible[:, None].logical_not(), torch.finfo(torch.float32).min)
    p = _softmax(scores, sinks).to(q.dtype).view(B, G, H // G * T, -1)
    out = p[..., :extent] @ v_cache[layer, :, :, :extent] + p[..., extent:] @ v_new
    return out.view(B, H, T, -1), k_new, v_new


def _fake_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kc: Tensor,
    vc: Tensor,
    k_block: Tensor,
    v_block: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return _output_like(q, v), torch.empty_like(k_block[0]), torch.empty_like(v_block[0])


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return _output_like(q, v)


_KIND = "int layer, float scale, int? window, float? softcap, Tensor? sinks=None"
define(f"attention(Tensor q, Tensor k, Tensor v, {_KIND}) -> Tensor", attention, _fake_attention)
define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    f"Tensor positions, Tensor slots, Tensor length, Tensor tree_mask, {_KIND}) -> Tensor",
    cached_attention,
    _fake_attention,
)
define(
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, "
    "Tensor k_block, Tensor v_block, Tensor positions, Tensor nodes, Tensor length, "
    f"Tensor tree_mask, {_KIND}) -> (Tensor, Tensor, Tensor)",
    block_attention,
    _fake_block_attention,
)
