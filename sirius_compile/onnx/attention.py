"""Cached tree attention in standard operators.

The products with the committed cache and with the block are separate, under one softmax.
Concatenating the two would copy the cache for every layer of every step. Values that depend only on
the committed cache (its slots in use, its transposed keys) are the same for all steps of a period,
so they are computed before the Loop.

Shape letters are those of `sirius_runtime.ops.attention`, and `E`: the cache slots in use.
"""

from __future__ import annotations

import numpy as np

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.scope import Scope, Value
from sirius_runtime.ops.operands import Attention, Caches, Heads, Places, grouped

_MIN = float(np.finfo(np.float32).min)


@grouped
def cached_attention(
    s: Scope,
    heads: Heads[Value],
    caches: Caches[Value],
    places: Places[Value],
    kind: Attention[Value],
) -> Value:
    """`sirius::cached_attention` for calls whose tokens are the whole block: M = T.

    Writes nothing: the call's k and v are outputs of the graph, which the caller writes to the
    slots after `length`. Only `period` drafts a tree level by level, with `block_attention`.
    """
    for block, value in zip(s.root.new_kv, heads[1:], strict=True):
        block.append(value)
    committed = _Committed.of(s, *caches, places.length, kind.layer)
    return _attend(s, heads, committed, places, kind)


@grouped
def block_attention(
    s: Scope,
    heads: Heads[Value],
    caches: Caches[Value],
    block: Caches[Value],
    places: Places[Value],
    kind: Attention[Value],
) -> tuple[Value, Value, Value]:
    """`sirius::block_attention`."""
    index = s.constant(kind.layer, "int64")
    k_new, v_new = (
        index_copy(s, e.gather(s, stored, index, 0), 2, places.slots, new)
        for stored, new in zip(block, heads[1:], strict=True)
    )
    committed = _Committed.of(s, *caches, places.length, kind.layer)
    out = _attend(s, Heads(heads.q, k_new, v_new), committed, places, kind)
    return out, k_new, v_new


class _Committed:
    """A layer's committed history: keys [B, G, D, E] and values [B, G, E, Dv]."""

    def __init__(self, keys: Value, values: Value, extent: Value) -> None:
        self.keys, self.values, self.extent = keys, values, extent

    @classmethod
    def of(cls, s: Scope, k_cache: Value, v_cache: Value, length: Value, layer: int) -> _Committed:
        longest = e.reduced(s, "ReduceMax", length, [0], False)
        # At least one slot, because not every runtime multiplies empty matrices.
        extent = s.op("Max", longest, s.constant(1, "int64"), shape=())
        keys, values = (_slots(s, cache, layer, extent) for cache in (k_cache, v_cache))
        return cls(e.swap(s, keys, -1, -2), values, extent)


def _slots(s: Scope, cache: Value, layer: int, extent: Value) -> Value:
    """A copy of the first `extent` slots of a layer, [B, G, E, D]."""
    starts, axes = s.constant([layer, 0], "int64"), s.constant([0, 3], "int64")
    ends = e.sizes(s, [layer + 1, extent])
    _, B, G, _, D = cache.shape
    cut = s.op("Slice", cache, starts, ends, axes, shape=(1, B, G, None, D))
    return e.squeeze(s, cut, 0)


def _attend(
    s: Scope,
    heads: Heads[Value],
    committed: _Committed,
    places: Places[Value],
    kind: Attention[Value],
) -> Value:
    """Attention of q [B, H, T, D] to the committed history and to the block's k, v [B, G, M, D].

    `kind.sinks` [H]: each head's score for an extra key whose value is zero.
    """
    q, k, v = heads
    _, scale, window, softcap, sinks = kind
    H, G, D = q.shape[1], k.shape[1], q.shape[3]
    B, T = e.size(s, q, 0), e.size(s, q, 2)
    assert isinstance(H, int)
    assert isinstance(G, int)
    assert isinstance(D, int)
    q = e.elementwise(s, "Mul", q, float(scale))
    # Heads that share a key/value head are rows of one product, so no key is copied.
    q = e.reshape(s, q, [B, G, -1, D])
    block = e.matmul(s, q, e.swap(s, k, -1, -2))
    scores = e.concat(s, [e.matmul(s, q, committed.keys), block], -1)
    scores = e.reshape(s, e.cast(s, scores, "float32"), [B, H, T, -1])
    if softcap is not None:
        scores = s.op("Tanh", e.elementwise(s, "Div", scores, softcap), shape=scores.shape)
        scores = e.elementwise(s, "Mul", scores, softcap)
    hidden = _hidden(s, committed.extent, places, window)
    scores = e.elementwise(s, "Add", scores, e.unsqueeze(s, hidden, 1))
    if sinks is not None:
        column = e.unsqueeze(s, e.cast(s, sinks, "float32"), 0, 2, 3)
        scores = e.concat(s, [scores, e.expand(s, column, [B, H, T, 1])], -1)
    p = s.op("Softmax", scores, shape=scores.shape, axis=-1)
    if sinks is not None:
        p = e.cut(s, p, -1, 0, -1)
    p = e.reshape(s, e.cast(s, p, v.dtype), [B, G, -1, e.size(s, p, 3)])
    out = e.elementwise(
        s,
        "Add",
        e.matmul(s, e.cut(s, p, -1, 0, committed.extent), committed.values),
        e.matmul(s, e.cut(s, p, -1, committed.extent, e.MAX), v),
    )
    Dv = v.shape[3]
    assert isinstance(Dv, int)
    return e.reshape(s, out, [B, H, T, Dv])


def _hidden(s: Scope, extent: Value, places: Places[Value], window: int | None) -> Value:
    """The attention mask to add to the scores, [B, T, E + M]: 0 or float32's lowest value."""
    positions, _, length, tree_mask = places
    slot_E = e.arange(s, extent)
    committed = e.elementwise(s, "Less", slot_E, e.unsqueeze(s, length, 1, 2), result="bool")
    seen = e.elementwise(s, "GreaterOrEqual", tree_mask, 0, result="bool")
    if window is not None:
        distance = e.elementwise(s, "Sub", e.unsqueeze(s, positions, 2), slot_E)
        near = e.elementwise(s, "Less", distance, window, result="bool")
        committed = e.elementwise(s, "And", committed, near)
        inside = e.elementwise(s, "Less", tree_mask, window, result="bool")
        seen = e.elementwise(s, "And", seen, inside)
    B, T = e.size(s, positions, 0), e.size(s, positions, 1)
    both = [
        e.expand(s, e.where(s, visible, 0.0, _MIN), [B, T, -1]) for visible in (committed, seen)
    ]
    return e.concat(s, both, -1)


def index_copy(s: Scope, x: Value, dim: int, index: Value, source: Value) -> Value:
    """`x` with its slices at the indices `index` [n] of a dimension replaced by those of `source`.

    Concatenates both and gathers, which copies whole slices. ScatterElements would need an index
    for every element.
    """
    extent, count = e.size(s, x, dim), e.size(s, source, dim)
    kept = e.elementwise(s, "Add", e.arange(s, extent), e.scalar(s, count, "int64"))
    chosen = s.op("ScatterElements", kept, index, e.arange(s, count), shape=kept.shape, axis=0)
    joined = e.concat(s, [e.cast(s, source, x.dtype), x], dim)
    axis = e.axis_of(x, dim)
    return s.op("Gather", joined, chosen, shape=x.shape, axis=axis)
