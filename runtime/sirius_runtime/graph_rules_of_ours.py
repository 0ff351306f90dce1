"""The rules of the `sirius::` operators, whose kernels are told sizes and pointers: see
`graph_rules`, and `sirius_runtime.ops` for the shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sirius_runtime.graph_rules import Array, made, need
from sirius_runtime.graph_sizes import Size, at_least, symbol

ROWS_OR_ONE = symbol("R")
"""The first extent of an entry's tree mask: 1, or the rows of the batch."""


def _need_shape(name: str, array: Array | None, *shape: Size) -> None:
    need(array is None or array.shape == shape, f"{name} must be {list(shape)}, found {array}")


def _need_rank(name: str, array: Array, rank: int) -> None:
    need(len(array.shape) == rank, f"{name} must have {rank} dimensions, found {array}")


def _need_dtype(dtype: torch.dtype, **arrays: Array | None) -> None:
    for name, array in arrays.items():
        need(array is None or array.dtype is dtype, f"{name} must be of {dtype}, found {array}")


def _need_model(**arrays: Array | None) -> None:
    """All of one floating point dtype."""
    dtype = next(array.dtype for array in arrays.values() if array is not None)
    need(dtype.is_floating_point, f"floating point numbers are needed, found {dtype}")
    _need_dtype(dtype, **arrays)


def _need_some(**arrays: Array | None) -> None:
    """No dimension that may be 0: kernels divide by some of them."""
    for name, array in arrays.items():
        if array is not None:
            need(all(at_least(size, 1) for size in array.shape), f"{name} {array} may be empty")


def _need_layer(layer: Any, layers: Size) -> None:
    there = isinstance(layer, int) and isinstance(layers, int) and 0 <= layer < layers
    need(there, f"layer {layer} is not one of {layers}")


def _need_finite(**numbers: float | None) -> None:
    for name, value in numbers.items():
        need(value is None or math.isfinite(value), f"{name} must be finite, found {value}")


def _heads(q: Array, k: Array, v: Array) -> tuple[Size, ...]:
    """B, H, G, T, D, Dv."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        _need_rank(name, array, 4)
    _need_some(q=q, k=k, v=v)
    B, H, T, D = q.shape
    G, Dv = k.shape[1], v.shape[3]
    _need_shape("k", k, B, G, T, D)
    _need_shape("v", v, B, G, T, Dv)
    shares = isinstance(H, int) and isinstance(G, int) and H % G == 0
    need(shares, f"{H} heads do not share {G} of keys")
    need(isinstance(D, int) and isinstance(Dv, int), "a head's dimensions are unknown")
    return B, H, G, T, D, Dv


def _need_kind(
    H: Size, scale: float, window: Any, softcap: float | None, sinks: Array | None
) -> None:
    _need_finite(scale=scale, softcap=softcap)
    positive = window is None or (isinstance(window, int) and window >= 1)
    need(positive, f"a window must be >= 1, found {window}")
    need(softcap is None or softcap > 0, f"softcap must be > 0, found {softcap}")
    _need_shape("sinks", sinks, H)
    need(sinks is None or sinks.dtype.is_floating_point, f"sinks are numbers, found {sinks}")


def attention(
    q: Array,
    k: Array,
    v: Array,
    layer: Any,
    scale: float,
    window: Any,
    softcap: float | None,
    sinks: Array | None = None,
) -> Array:
    B, H, _, T, _, Dv = _heads(q, k, v)
    _need_model(q=q, k=k, v=v)
    _need_kind(H, scale, window, softcap, sinks)
    return made(q.dtype, (B, H, T, Dv))


def _need_caches(
    k_cache: Array, v_cache: Array, layer: Any, B: Size, G: Size, D: Size, Dv: Size
) -> Size:
    """The layers."""
    _need_rank("k_cache", k_cache, 5)
    _need_some(k_cache=k_cache)
    layers, slots = k_cache.shape[0], k_cache.shape[3]
    _need_shape("k_cache", k_cache, layers, B, G, slots, D)
    _need_shape("v_cache", v_cache, layers, B, G, slots, Dv)
    _need_layer(layer, layers)
    return layers


def _need_mask(tree_mask: Array, B: Size, T: Size) -> Size:
    """The block's slots."""
    _need_rank("tree_mask", tree_mask, 3)
    _need_some(tree_mask=tree_mask)
    rows, _, M = tree_mask.shape
    need(rows in (1, B, ROWS_OR_ONE), f"tree_mask must be of 1 or {B} rows, found {tree_mask}")
    _need_shape("tree_mask", tree_mask, rows, T, M)
    return M


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    positions: Array,
    slots: Array,
    length: Array,
    tree_mask: Array,
    layer: Any,
    scale: float,
    window: Any,
    softcap: float | None,
    sinks: Array | None = None,
) -> Array:
    B, H, G, T, D, Dv = _heads(q, k, v)
    _need_model(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    _need_caches(k_cache, v_cache, layer, B, G, D, Dv)
    _need_mask(tree_mask, B, T)
    _need_shape("positions", positions, B, T)
    _need_shape("slots", slots, B, T)
    _need_shape("length", length, B)
    integers = {"positions": positions, "slots": slots, "length": length, "tree_mask": tree_mask}
    _need_dtype(torch.int64, **integers)
    _need_kind(H, scale, window, softcap, sinks)
    return made(q.dtype, (B, H, T, Dv))


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    k_block: Array,
    v_block: Array,
    positions: Array,
    nodes: Array,
    length: Array,
    tree_mask: Array,
    layer: Any,
    scale: float,
    window: Any,
    softcap: float | None,
    sinks: Array | None = None,
) -> tuple[Array, Array, Array]:
    B, H, G, T, D, Dv = _heads(q, k, v)
    arrays = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    _need_model(**arrays, k_block=k_block, v_block=v_block)
    layers = _need_caches(k_cache, v_cache, layer, B, G, D, Dv)
    M = _need_mask(tree_mask, B, T)
    _need_shape("k_block", k_block, layers, B, G, M, D)
    _need_shape("v_block", v_block, layers, B, G, M, Dv)
    _need_shape("positions", positions, B, T)
    _need_shape("nodes", nodes, T)
    _need_shape("length", length, B)
    integers = {"positions": positions, "nodes": nodes, "length": length, "tree_mask": tree_mask}
    _need_dtype(torch.int64, **integers)
    _need_kind(H, scale, window, softcap, sinks)
    out = made(q.dtype, (B, H, T, Dv))
    return out, made(q.dtype, k_block.shape[1:]), made(q.dtype, v_block.shape[1:])


def _mlp(
    x: Array,
    gate: Array,
    up: Array | None,
    down: Array,
    gate_bias: Array | None,
    up_bias: Array | None,
    down_bias: Array | None,
    act: str,
    layer: Any,
    *,
    experts: bool = False,
) -> Size:
    """The neurons; of the weights [I, C], or [E, I, C] of `experts`."""
    weights = {"gate": gate, "up": up, "down": down}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    _need_model(x=x, **weights, **biases)
    _need_rank("gate", gate, 3 if experts else 2)
    _need_some(x=x, gate=gate)
    *E, I, C = gate.shape  # noqa: E741
    need(bool(x.shape) and x.shape[-1] == C, f"x {x} does not go through gate {gate}")
    for name, weight in weights.items():
        _need_shape(name, weight, *E, I, C)
    _need_shape("gate_bias", gate_bias, *E, I)
    _need_shape("up_bias", up_bias, *E, I)
    _need_shape("down_bias", down_bias, *E, C)
    need(up is not None or up_bias is None, "up_bias stands without up")
    need(isinstance(layer, int) and layer >= 0, f"there is no layer {layer}")
    return I


def _tokens(x: Array) -> tuple[Size, Size]:
    _need_rank("x", x, 3)
    return x.shape[0], x.shape[1]


def _counts(x: Array) -> Array:
    return made(torch.int64, (x.shape[0],))


def dense_mlp(x: Array, *mlp: Any) -> Array:
    _mlp(x, *mlp)
    return x


def dense_mlp_statistic(x: Array, *rest: Any) -> tuple[Array, Array]:
    *mlp, valid = rest
    I = _mlp(x, *mlp)  # noqa: E741
    B, T = _tokens(x)
    _need_shape("valid", valid, B, T)
    _need_dtype(torch.bool, valid=valid)
    return x, made(torch.float32, (B, I))


def dense_mlp_activity(x: Array, *mlp: Any) -> tuple[Array, Array]:
    I = _mlp(x, *mlp)  # noqa: E741
    return x, made(torch.float32, (*_tokens(x), I))


def topk_mlp(x: Array, *rest: Any) -> Array:
    *mlp, keep = rest
    _need_kept(keep, _mlp(x, *mlp))
    _tokens(x)
    return x


def _need_kept(keep: Any, units: Size) -> None:
    there = isinstance(keep, int) and isinstance(units, int) and 1 <= keep <= units
    need(there, f"{keep} of {units} can't be kept")


def cats_mlp(x: Array, *rest: Any) -> tuple[Array, Array]:
    *mlp, threshold = rest
    _mlp(x, *mlp)
    _tokens(x)
    _need_finite(threshold=threshold)
    return x, _counts(x)


def _need_neurons(neurons: Array, layer: Any, B: Size, I: Size) -> None:  # noqa: E741
    _need_rank("neurons", neurons, 3)
    layers, _, K = neurons.shape
    _need_shape("neurons", neurons, layers, B, K)
    _need_dtype(torch.int64, neurons=neurons)
    _need_layer(layer, layers)
    _need_kept(K, I)


def griffin_mlp(x: Array, *rest: Any) -> Array:
    *mlp, neurons = rest
    I = _mlp(x, *mlp)  # noqa: E741
    _need_neurons(neurons, mlp[-1], _tokens(x)[0], I)
    return x


def griffin_cats_mlp(x: Array, *rest: Any) -> tuple[Array, Array]:
    *mlp, neurons, threshold = rest
    I = _mlp(x, *mlp)  # noqa: E741
    _need_neurons(neurons, mlp[-1], _tokens(x)[0], I)
    _need_finite(threshold=threshold)
    return x, _counts(x)


def sparse_linear(
    x: Array, weight: Array, bias: Array | None, threshold: float
) -> tuple[Array, Array]:
    B, T = _tokens(x)
    _need_model(x=x, weight=weight, bias=bias)
    _need_rank("weight", weight, 2)
    _need_some(x=x, weight=weight)
    C, O = weight.shape  # noqa: E741
    need(x.shape[2] == C, f"x {x} does not go through weight {weight}")
    _need_shape("bias", bias, O)
    _need_finite(threshold=threshold)
    return made(x.dtype, (B, T, O)), _counts(x)


def _moe(x: Array, experts: Array, weights: Array, *mlp: Any) -> tuple[Size, Size]:
    """Experts of a token, and neurons of one."""
    _need_rank("x", x, 2)
    _need_rank("experts", experts, 2)
    N, k = x.shape[0], experts.shape[1]
    _need_shape("experts", experts, N, k)
    _need_shape("weights", weights, N, k)
    _need_dtype(torch.int64, experts=experts)
    need(weights.dtype.is_floating_point, f"weights are numbers, found {weights}")
    I = _mlp(x, *mlp, experts=True)  # noqa: E741
    _need_kept(k, mlp[0].shape[0])
    return k, I


def dense_moe(x: Array, *rest: Any) -> Array:
    _moe(x, *rest)
    return x


def topk_moe(x: Array, *rest: Any) -> Array:
    *moe, keep = rest
    k, I = _moe(x, *moe)  # noqa: E741
    known = isinstance(k, int) and isinstance(I, int)
    need(known and at_least(keep, 1), f"{keep} neurons can't be kept")
    _need_kept(keep, k * I)  # type: ignore[operator]
    return x


def experts_moe(x: Array, *rest: Any) -> Array:
    *moe, keep, _normalised = rest
    _need_kept(keep, _moe(x, *moe)[0])
    return x
