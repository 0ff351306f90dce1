"""Attention: the form without a cache that capture emits, and the cached tree attention.

A *block* is the run of tokens that follows the committed history of a row: a prompt chunk, a draft,
or a tree of drafts. The slot of its j-th token in the caches is `length + j`; its position (for
RoPE) is `length + depth(j)`. In a chain the two are equal, in a tree they are not. `tree_mask` says
which tokens of the block a query sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.graph_rules import Array, made, need
from sirius_runtime.graph_sizes import Size
from sirius_runtime.ops.operands import Attention, Caches, Heads, Places, grouped
from sirius_runtime.ops.rules import (
    ROWS_OR_ONE,
    need_dtype,
    need_finite,
    need_layer,
    need_model,
    need_rank,
    need_shape,
    need_some,
)


def _attend(heads: Heads[Tensor], visible: Tensor, kind: Attention[Tensor]) -> Tensor:
    """Softmax attention of q [B, H, T, D] over k, v [B, G, S, D] where `visible` [B | 1, 1, T, S]
    is true. The result is contiguous, as the operators' fakes tell compilers.
    """
    q, k, v = heads
    if kind.softcap is None and kind.sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=kind.scale, enable_gqa=q.shape[1] != k.shape[1]
        ).contiguous()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * kind.scale
    if kind.softcap is not None:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return _softmax(scores, kind.sinks).to(q.dtype) @ v


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores [B, H, T, S]. `sinks` [H] are one more score of each head; their share is
    dropped.
    """
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


@grouped
def attention(heads: Heads[Tensor], kind: Attention[Tensor]) -> Tensor:
    """Causal self-attention without a cache, which capture emits for each layer.

    q [B, H, T, D]; k [B, G, T, D]; v [B, G, T, Dv]; returns [B, H, T, Dv]. A query sees the
    `window` last positions up to its own (all if None); `softcap` bounds scores to ±softcap by
    tanh. `sinks` [H]: the score of an additional token without a value, which every query of the
    head sees. `layer`: the index of the layer, which passes use.
    """
    index = torch.arange(heads.q.shape[2], device=heads.q.device)
    distance_TT = index[:, None] - index[None, :]
    visible = distance_TT >= 0
    if kind.window is not None:
        visible = visible & (distance_TT < kind.window)
    return _attend(heads, visible[None, None], kind)


@grouped
def cached_attention(
    heads: Heads[Tensor], caches: Caches[Tensor], places: Places[Tensor], kind: Attention[Tensor]
) -> Tensor:
    """Writes k and v to their slots, then attends to the committed history, to the query's
    ancestors in the block, and to itself.

    q [B, H, T, D], k [B, G, T, D], v [B, G, T, Dv] of the call's T tokens; k_cache [layers, B, G,
    S, D] and v_cache [layers, B, G, S, Dv] are written at `layer` and `slots` [B, T]. `positions`
    [B, T]: the tokens' positions. `length` [B]: the committed tokens of each row; a slot below it
    holds the token of the same position. `tree_mask` [B | 1, T, M], int64: for block slot `length +
    j`, the depth of the query minus that of the slot's token; -1 where that token is neither the
    query nor its ancestor. (Windows need the depth; a flag would not do.) Slots from `length + M`
    on are never seen. Returns [B, H, T, Dv].
    """
    q, k, v = heads
    positions, slots, length, tree_mask = places
    B, _, T, _ = q.shape
    M = tree_mask.shape[-1]
    k_layer, v_layer = caches.k[kind.layer], caches.v[kind.layer]
    k_layer.scatter_(2, slots[:, None, :, None].expand(k.shape), k)
    v_layer.scatter_(2, slots[:, None, :, None].expand(v.shape), v)

    extent = k_layer.shape[2]
    if length.device.type == "cpu":  # on other devices, reading `length` would stall
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
    if kind.window is not None:
        visible = visible & (distance_BTE < kind.window)
    # A slot that no token sees may hold NaN, and zero times NaN is NaN.
    unseen = ~visible.any(1)[:, None, :, None]
    keys, values = (t[:, :, :extent].masked_fill(unseen, 0.0) for t in (k_layer, v_layer))
    return _attend(Heads(q, keys, values), visible[:, None], kind)


@grouped
def block_attention(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` without mutation: the block's K/V is kept apart from the caches.

    As `cached_attention`, but the caches are only read, in slots below `length`. k_block [layers,
    B, G, M, D] and v_block [layers, B, G, M, Dv] hold the block's K/V so far; the call's tokens are
    its `nodes` [T] in every row. Returns the output [B, H, T, Dv], and the layer's block with the
    call's K/V written to it: [B, G, M, D] and [B, G, M, Dv]. So a draft loop carries only the
    block, never a copy of the caches.
    """
    extent = caches.k.shape[3]
    if places.length.device.type == "cpu":  # as in `cached_attention`
        extent = min(extent, int(places.length.max()))
    return _block_attention(heads, caches, block, places, kind, extent)


@grouped
def decomposed_block_attention(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_attention` in PyTorch's operators, for lowering: all slots, without a host read."""
    return _block_attention(heads, caches, block, places, kind, caches.k.shape[3])


def _block_attention(
    heads: Heads[Tensor],
    caches: Caches[Tensor],
    block: Caches[Tensor],
    places: Places[Tensor],
    kind: Attention[Tensor],
    extent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads
    positions, nodes, length, tree_mask = places
    layer, scale, window, softcap, sinks = kind
    B, H, T, D = q.shape
    G = k.shape[1]
    k_new = block.k[layer].index_copy(2, nodes, k)
    v_new = block.v[layer].index_copy(2, nodes, v)
    slot_E = torch.arange(extent, device=q.device)
    distance_BTE = positions[:, :, None] - slot_E
    committed = slot_E < length[:, None, None]
    in_block = tree_mask.expand(B, T, tree_mask.shape[-1])
    visible = torch.cat([committed.expand(B, T, extent), in_block >= 0], -1)
    if window is not None:
        visible = visible & (torch.cat([distance_BTE, in_block], -1) < window)

    # The query heads that share a key/value head are rows of one product, so no key is copied.
    q_BGRD = q.reshape(B, G, H // G * T, D)
    scores = torch.cat(
        [
            q_BGRD @ caches.k[layer, :, :, :extent].transpose(-1, -2),
            q_BGRD @ k_new.transpose(-1, -2),
        ],
        -1,
    ).float()
    scores = scores.view(B, H, T, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(visible[:, None].logical_not(), torch.finfo(torch.float32).min)
    p = _softmax(scores, sinks).to(q.dtype).view(B, G, H // G * T, -1)
    out = p[..., :extent] @ caches.v[layer, :, :, :extent] + p[..., extent:] @ v_new
    return out.view(B, H, T, -1), k_new, v_new


def like_q(q: Tensor, _k: Tensor, v: Tensor, *_: object) -> Tensor:
    """The fake of attentions that return [B, H, T, Dv]."""
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def like_q_and_blocks(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fake of attentions that also return a layer's block."""
    q, k, v, _, _, k_block, v_block, *_rest = args
    return like_q(q, k, v), torch.empty_like(k_block[0]), torch.empty_like(v_block[0])


# What graphs of an artifact may pass


@grouped
def attention_rule(heads: Heads[Array], kind: Attention[Array]) -> Array:
    B, H, _, T, _, Dv = _sizes(heads)
    need_model(**heads._asdict())
    _need_kind(H, kind)
    return made(heads.q.dtype, (B, H, T, Dv))


@grouped
def cached_attention_rule(
    heads: Heads[Array], caches: Caches[Array], places: Places[Array], kind: Attention[Array]
) -> Array:
    B, H, G, T, D, Dv = _sizes(heads)
    need_model(**heads._asdict(), k_cache=caches.k, v_cache=caches.v)
    _need_caches(caches, kind, B, G, D, Dv)
    _need_mask(places.tree_mask, B, T)
    need_shape("positions", places.positions, B, T)
    need_shape("slots", places.slots, B, T)
    need_shape("length", places.length, B)
    need_dtype(torch.int64, **places._asdict())
    _need_kind(H, kind)
    return made(heads.q.dtype, (B, H, T, Dv))


@grouped
def block_attention_rule(
    heads: Heads[Array],
    caches: Caches[Array],
    block: Caches[Array],
    places: Places[Array],
    kind: Attention[Array],
) -> tuple[Array, Array, Array]:
    B, H, G, T, D, Dv = _sizes(heads)
    blocks = {"k_block": block.k, "v_block": block.v}
    need_model(**heads._asdict(), k_cache=caches.k, v_cache=caches.v, **blocks)
    layers = _need_caches(caches, kind, B, G, D, Dv)
    M = _need_mask(places.tree_mask, B, T)
    need_shape("k_block", block.k, layers, B, G, M, D)
    need_shape("v_block", block.v, layers, B, G, M, Dv)
    need_shape("positions", places.positions, B, T)
    need_shape("nodes", places.slots, T)
    need_shape("length", places.length, B)
    positions, nodes, length, tree_mask = places
    integers = {"positions": positions, "nodes": nodes, "length": length, "tree_mask": tree_mask}
    need_dtype(torch.int64, **integers)
    _need_kind(H, kind)
    q = heads.q.dtype
    return made(q, (B, H, T, Dv)), made(q, block.k.shape[1:]), made(q, block.v.shape[1:])


def _sizes(heads: Heads[Array]) -> tuple[Size, ...]:
    """B, H, G, T, D, Dv."""
    q, k, v = heads
    for name, array in heads._asdict().items():
        need_rank(name, array, 4)
    need_some(q=q, k=k, v=v)
    B, H, T, D = q.shape
    G, Dv = k.shape[1], v.shape[3]
    need_shape("k", k, B, G, T, D)
    need_shape("v", v, B, G, T, Dv)
    shares = isinstance(H, int) and isinstance(G, int) and H % G == 0
    need(shares, f"{H} query heads are not a multiple of {G} key/value heads")
    need(isinstance(D, int) and isinstance(Dv, int), "a head's dimensions are unknown")
    return B, H, G, T, D, Dv


def _need_kind(H: Size, kind: Attention[Array]) -> None:
    _, scale, window, softcap, sinks = kind
    need_finite(scale=scale, softcap=softcap)
    positive = window is None or (isinstance(window, int) and window >= 1)
    need(positive, f"a window must be >= 1, found {window}")
    need(softcap is None or softcap > 0, f"softcap must be > 0, found {softcap}")
    need_shape("sinks", sinks, H)
    need(
        sinks is None or sinks.dtype.is_floating_point,
        f"sinks must be floating point, found {sinks}",
    )


def _need_caches(
    caches: Caches[Array], kind: Attention[Array], B: Size, G: Size, D: Size, Dv: Size
) -> Size:
    """The number of layers; checks the caches' shapes."""
    need_rank("k_cache", caches.k, 5)
    need_some(k_cache=caches.k)
    layers, slots = caches.k.shape[0], caches.k.shape[3]
    need_shape("k_cache", caches.k, layers, B, G, slots, D)
    need_shape("v_cache", caches.v, layers, B, G, slots, Dv)
    need_layer(kind.layer, layers)
    return layers


def _need_mask(tree_mask: Array, B: Size, T: Size) -> Size:
    """The number of the block's slots, M; checks the mask's shape."""
    need_rank("tree_mask", tree_mask, 3)
    need_some(tree_mask=tree_mask)
    rows, _, M = tree_mask.shape
    need(rows in (1, B, ROWS_OR_ONE), f"tree_mask must be of 1 or {B} rows, found {tree_mask}")
    need_shape("tree_mask", tree_mask, rows, T, M)
    return M
