"""MLPs and linears in standard operators.

Of `griffin` only the kept neurons are read: their weights are inputs of the graph, gathered once a
prompt by the graph `select`. `topk`, `cats` and `teal` gather each token's rows where few are kept:
gathering reads and writes what the product then reads again, so at a kept share of a half it costs
more than multiplying them all (`benchmarks/onnx_formulations.py` shows by how much). Where more are
kept they compute all and mask, as the references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.scope import Extent, Scope, Value, View
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import SiteSpec

NEURONS_GATHERED_BELOW = 0.2
"""The kept share up to which `topk` and `cats` gather. By the benchmark one token's MLP then takes
0.6 to 0.7 of the time of all neurons at a share of 0.1, as much at 0.3, and more at 0.5."""
CHANNELS_GATHERED_BELOW = 0.3
"""That of `teal`, whose MLP takes 0.8 of the time at a share of 0.3."""


@dataclass(frozen=True)
class Kept:
    """A weight of which a prompt keeps some neurons, and the graph's input that has them.

    `weight`: the rows of a weight that are the neurons', [I, C], or a bias [I]; the input is
    [B, C, K] of `gate` and `up`, so that its product reads it in order, [B, K, C] of `down`, and
    [B, 1, K] of a bias.
    """

    name: str
    part: str
    layer: int
    weight: View


def kept_share(sites: Sequence[SiteSpec], weight: str) -> float:
    """The share that calibration expects a step to keep of a weight's neurons or channels; 1 where
    several sites read it, each by a threshold of its own."""
    shares = [s.kept / s.units for s in sites if s.weight == weight and s.threshold is not None]
    return shares[0] if len(shares) == 1 else 1.0


def activation(s: Scope, x: Value, act: str) -> Value:
    match act:
        case "silu":
            return e.elementwise(s, "Mul", x, s.op("Sigmoid", x, shape=x.shape))
        case "gelu":
            scaled = e.elementwise(s, "Mul", x, math.sqrt(0.5))
            bell = e.elementwise(s, "Add", s.op("Erf", scaled, shape=x.shape), 1.0)
            return e.elementwise(s, "Mul", e.elementwise(s, "Mul", x, 0.5), bell)
        case "gelu_tanh":
            cube = e.elementwise(s, "Mul", e.elementwise(s, "Mul", x, x), x)
            inner = e.elementwise(s, "Add", x, e.elementwise(s, "Mul", cube, 0.044715))
            inner = e.elementwise(s, "Mul", inner, math.sqrt(2.0 / math.pi))
            bell = e.elementwise(s, "Add", s.op("Tanh", inner, shape=x.shape), 1.0)
            return e.elementwise(s, "Mul", e.elementwise(s, "Mul", x, 0.5), bell)
        case "quick_gelu":
            scaled = e.elementwise(s, "Mul", x, 1.702)
            return e.elementwise(s, "Mul", x, s.op("Sigmoid", scaled, shape=x.shape))
        case "relu":
            return s.op("Relu", x, shape=x.shape)
        case "relu2":
            positive = s.op("Relu", x, shape=x.shape)
            return e.elementwise(s, "Mul", positive, positive)
    raise UnsupportedModelError(
        f"onnx: activation {act!r} has no translation to ONNX; use --graphs torch for this model"
    )


def dense_mlp(
    s: Scope,
    x: Value,
    gate: Value,
    up: Value | None,
    down: Value,
    gate_bias: Value | None,
    up_bias: Value | None,
    down_bias: Value | None,
    act: str,
    layer: int,
) -> Value:
    z = _times_up(s, _gate(s, x, gate, gate_bias, act), x, up, up_bias)
    return _down(s, z, down, down_bias)


def dense_mlp_statistic(
    s: Scope,
    x: Value,
    gate: Value,
    up: Value | None,
    down: Value,
    gate_bias: Value | None,
    up_bias: Value | None,
    down_bias: Value | None,
    act: str,
    layer: int,
    valid: Value,
) -> tuple[Value, Value]:
    z = _times_up(s, _gate(s, x, gate, gate_bias, act), x, up, up_bias)
    counted = e.elementwise(s, "Mul", _unit_square(s, z), e.unsqueeze(s, valid, 2))
    return _down(s, z, down, down_bias), e.reduced(s, "ReduceSum", counted, [1], False)


def dense_mlp_activity(
    s: Scope,
    x: Value,
    gate: Value,
    up: Value | None,
    down: Value,
    gate_bias: Value | None,
    up_bias: Value | None,
    down_bias: Value | None,
    act: str,
    layer: int,
) -> tuple[Value, Value]:
    z = _times_up(s, _gate(s, x, gate, gate_bias, act), x, up, up_bias)
    return _down(s, z, down, down_bias), _unit_square(s, z)


def topk_mlp(
    s: Scope,
    x: Value,
    gate: Value,
    up: Value | None,
    down: Value,
    gate_bias: Value | None,
    up_bias: Value | None,
    down_bias: Value | None,
    act: str,
    layer: int,
    keep: int,
) -> Value:
    g = _gate(s, x, gate, gate_bias, act)
    score = e.reduced(s, "ReduceSum", s.op("Abs", g, shape=g.shape), [1], True)
    _, index = topk(s, score, keep)
    if keep <= NEURONS_GATHERED_BELOW * (
        score.shape[-1] if isinstance(score.shape[-1], int) else 0
    ):
        z = _times_rows(s, e.take(s, g, _for_each_token(s, index, g), -1), x, up, up_bias, index)
        y = e.matmul(s, z, _rows_of(s, down, index))
        return y if down_bias is None else e.elementwise(s, "Add", y, down_bias)
    none = e.filled(s, e.shape_of(s, score), 0.0, g.dtype)
    ones = e.filled(s, e.shape_of(s, index), 1.0, g.dtype)
    kept = s.op("ScatterElements", none, index, ones, shape=score.shape, axis=2)
    z = _times_up(s, e.elementwise(s, "Mul", g, kept), x, up, up_bias)
    return _down(s, z, down, down_bias)


def _for_each_token(s: Scope, index: Value, g: Value) -> Value:
    """A row's neurons [B, 1, K] for each of its tokens [B, T, K]."""
    return e.expand(s, index, [-1, e.size(s, g, 1), -1])


def _is_rows(weight: Value) -> bool:
    """Whether a weight is whole rows of a stored one, one after the other."""
    view = weight.view
    return view is not None and view.axis == 0 and view.step == 1 and not view.transposed


def _rows_of(s: Scope, weight: Value, index: Value) -> Value:
    """The rows [B, K, C] of a weight that each row's neurons [B, 1, K] are, or [U, C] of the
    neurons [U] of all rows.
    """
    index = index if index.rank == 1 else e.squeeze(s, index, 1)
    if _is_rows(weight):
        assert weight.view is not None
        start = weight.view.start
        index = e.elementwise(s, "Add", index, start) if start else index
        return e.gather(s, weight.view.weight, index, 0)
    return e.gather(s, weight, index, 0)


def _times_rows(
    s: Scope, g: Value, x: Value, up: Value | None, bias: Value | None, index: Value
) -> Value:
    """`_times_up`, of the kept neurons alone."""
    if up is None:
        return g
    rows = _rows_of(s, up, index)
    y = _by_rows(s, x, rows) if index.rank == 1 else e.matmul(s, x, e.swap(s, rows, 1, 2))
    if bias is not None:
        y = e.elementwise(s, "Add", y, e.gather(s, bias, index, 0))
    return e.elementwise(s, "Mul", g, y)


def _by_rows(s: Scope, x: Value, rows: Value) -> Value:
    """x [B, T, C] by rows [U, C]: [B, T, U]."""
    B, T, width = e.size(s, x, 0), e.size(s, x, 1), x.shape[2]
    assert isinstance(width, int)
    flat = e.reshape(s, x, [-1, width])
    y = s.op("Gemm", flat, rows, shape=(flat.shape[0], rows.shape[0]), transB=1)
    return e.reshape(s, y, [B, T, -1])


def cats_mlp(
    s: Scope,
    x: Value,
    gate: Value,
    up: Value | None,
    down: Value,
    gate_bias: Value | None,
    up_bias: Value | None,
    down_bias: Value | None,
    act: str,
    layer: int,
    threshold: float,
    *,
    gathers: bool = False,
) -> tuple[Value, Value]:
    g = _gate(s, x, gate, gate_bias, act)
    kept = _above(s, g, threshold)
    z = e.elementwise(s, "Mul", g, kept)
    if gathers:
        index = _used(s, kept)
        z = _times_rows(s, e.gather(s, z, index, -1), x, up, up_bias, index)
        y = e.matmul(s, z, _rows_of(s, down, index))
        return (y if down_bias is None else e.elementwise(s, "Add", y, down_bias)), _count(s, kept)
    return _down(s, _times_up(s, z, x, up, up_bias), down, down_bias), _count(s, kept)


def griffin_mlp(
    s: Scope,
    kept: Sequence[Kept],
    x: Value,
    down_bias: Value | None,
    act: str,
    threshold: float | None,
) -> tuple[Value, Value | None]:
    """Over the kept neurons alone: y [B, T, C], and with a `threshold` how many are above it."""
    parts = {k.part: _input(s, k) for k in kept}

    def product(part: str) -> Value:
        y = e.matmul(s, x, parts[part])
        bias = parts.get(f"{part}_bias")
        return y if bias is None else e.elementwise(s, "Add", y, bias)

    z, count = activation(s, product("gate"), act), None
    if threshold is not None:
        above = _above(s, z, threshold)
        z, count = e.elementwise(s, "Mul", z, above), _count(s, above)
    if "up" in parts:
        z = e.elementwise(s, "Mul", z, product("up"))
    y = e.matmul(s, z, parts["down"])
    return (y if down_bias is None else e.elementwise(s, "Add", y, down_bias)), count


def _input(s: Scope, kept: Kept) -> Value:
    whole = kept.weight.weight
    extent = whole.shape[-1]
    shape: list[Extent] = {
        "down": ["B", "kept", extent],
        "gate": ["B", extent, "kept"],
        "up": ["B", extent, "kept"],
    }.get(kept.part, ["B", 1, "kept"])
    return s.root.input(kept.name, whole.dtype, shape)


def sparse_linear(
    s: Scope,
    x: Value,
    weight: Value,
    bias: Value | None,
    threshold: float,
    *,
    gathers: bool = False,
) -> tuple[Value, Value]:
    size = s.op("Abs", e.cast(s, x, "float32"), shape=x.shape)
    score = e.reduced(s, "ReduceMean", size, [1], True)
    kept = e.elementwise(s, "Greater", score, threshold, result="bool")
    x = e.elementwise(s, "Mul", x, kept)
    if gathers and _is_rows(weight):
        index = _used(s, kept)
        y = e.matmul(s, e.gather(s, x, index, -1), _rows_of(s, weight, index))
    else:
        y = e.flat_matmul(s, x, weight)
    y = y if bias is None else e.elementwise(s, "Add", y, bias)
    return y, _count(s, kept)


def topk(s: Scope, x: Value, count: int, *, largest: bool = True) -> tuple[Value, Value]:
    """The `count` largest of the last dimension, in order, and their indices."""
    shape = (*x.shape[:-1], count)
    values, index = s.ops(
        "TopK",
        x,
        s.constant([count], "int64"),
        outputs=[(x.dtype, shape), ("int64", shape)],
        axis=-1,
        largest=int(largest),
        sorted=1,
    )
    return values, index


def _gate(s: Scope, x: Value, gate: Value, bias: Value | None, act: str) -> Value:
    return activation(s, e.linear(s, x, gate, bias), act)


def _times_up(s: Scope, g: Value, x: Value, up: Value | None, bias: Value | None) -> Value:
    return g if up is None else e.elementwise(s, "Mul", g, e.linear(s, x, up, bias))


def _down(s: Scope, z: Value, down: Value, bias: Value | None) -> Value:
    y = e.flat_matmul(s, z, down)
    return y if bias is None else e.elementwise(s, "Add", y, bias)


def _above(s: Scope, g: Value, threshold: float) -> Value:
    """Where [B, 1, I] a row's mean |g| is above `threshold`."""
    score = e.reduced(s, "ReduceMean", s.op("Abs", g, shape=g.shape), [1], True)
    return e.elementwise(s, "Greater", score, threshold, result="bool")


def _used(s: Scope, kept: Value) -> Value:
    """The indices [U] of what some row keeps [B, 1, I], and of the first, which counts for nothing
    where it is masked: not every runtime multiplies by nothing.
    """
    some = e.reduced(s, "ReduceMax", e.cast(s, kept, "int32"), [0, 1], False)
    some = e.concat(s, [s.constant([1], "int32"), e.cut(s, some, 0, 1, e.MAX)], 0)
    found = s.op("NonZero", some, shape=(1, None), dtype="int64")
    return e.squeeze(s, found, 0)


def _count(s: Scope, kept: Value) -> Value:
    return e.reduced(s, "ReduceSum", e.cast(s, kept, "int64"), [1, 2], False)


def _unit_square(s: Scope, z: Value) -> Value:
    """(z / ‖z‖₂)², float32; a norm below 1e-12 counts as that, as in `F.normalize`."""
    z = e.cast(s, z, "float32")
    norm = e.reduced(s, "ReduceL2", z, [-1], True)
    norm = e.elementwise(s, "Max", norm, 1e-12)
    unit = e.elementwise(s, "Div", z, norm)
    return e.elementwise(s, "Mul", unit, unit)
