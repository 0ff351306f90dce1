"""MLPs and linears in standard operators.

Of `griffin` only the kept neurons are read: their weights are inputs of the graph, gathered once a
prompt by the graph `select`. `topk` gathers each token's rows where few are kept: gathering reads
and writes what the product then reads again, so at a kept share of a half it costs more than
multiplying them all (`benchmarks/onnx_speed.py` shows by how much). `cats` and `teal` keep as many
as a threshold lets, which is another shape each time: they compute all and mask, as the references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.scope import Extent, Scope, Value, View
from sirius_runtime.errors import UnsupportedModelError

GATHERED_BELOW = 0.2
"""The kept share up to which `topk` gathers. By the benchmark's `formulations` one token's MLP then
takes 0.7 of the time of all neurons at a share of 0.1, about as much at 0.3, and more at 0.5."""


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
        f"onnx: activation {act!r} has no translation to ONNX; use --backend torch for this model"
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
    if keep <= GATHERED_BELOW * (score.shape[-1] if isinstance(score.shape[-1], int) else 0):
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


def _rows_of(s: Scope, weight: Value, index: Value) -> Value:
    """The rows [B, K, C] of a weight that a row's neurons [B, 1, K] are."""
    index, view = e.squeeze(s, index, 1), weight.view
    if view is not None and view.axis == 0 and view.step == 1 and not view.transposed:
        return e.gather(s, view.weight, e.elementwise(s, "Add", index, view.start), 0)
    return e.gather(s, weight, index, 0)


def _times_rows(
    s: Scope, g: Value, x: Value, up: Value | None, bias: Value | None, index: Value
) -> Value:
    """`_times_up`, of the kept neurons alone."""
    if up is None:
        return g
    y = e.matmul(s, x, e.swap(s, _rows_of(s, up, index), 1, 2))
    if bias is not None:
        y = e.elementwise(s, "Add", y, e.gather(s, bias, index, 0))
    return e.elementwise(s, "Mul", g, y)


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
) -> tuple[Value, Value]:
    g, count = _above(s, _gate(s, x, gate, gate_bias, act), threshold)
    z = _times_up(s, g, x, up, up_bias)
    return _down(s, z, down, down_bias), count


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
        z, count = _above(s, z, threshold)
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
    s: Scope, x: Value, weight: Value, bias: Value | None, norm: Value | None, threshold: float
) -> tuple[Value, Value]:
    size = s.op("Abs", e.cast(s, x, "float32"), shape=x.shape)
    score = e.reduced(s, "ReduceMean", size, [1], True)
    if norm is not None:
        score = e.elementwise(s, "Mul", score, norm)
    kept = e.elementwise(s, "Greater", score, threshold, result="bool")
    y = e.flat_matmul(s, e.elementwise(s, "Mul", x, kept), weight)
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


def _above(s: Scope, g: Value, threshold: float) -> tuple[Value, Value]:
    """`g` [B, T, I] where a row's mean |g| is above `threshold`, else 0; and how many that are."""
    score = e.reduced(s, "ReduceMean", s.op("Abs", g, shape=g.shape), [1], True)
    kept = e.elementwise(s, "Greater", score, threshold, result="bool")
    return e.elementwise(s, "Mul", g, kept), _count(s, kept)


def _count(s: Scope, kept: Value) -> Value:
    return e.reduced(s, "ReduceSum", e.cast(s, kept, "int64"), [1, 2], False)


def _unit_square(s: Scope, z: Value) -> Value:
    """(z / ‖z‖₂)², float32; a norm below 1e-12 counts as that, as in `F.normalize`."""
    z = e.cast(s, z, "float32")
    norm = e.reduced(s, "ReduceL2", z, [-1], True)
    norm = e.elementwise(s, "Max", norm, 1e-12)
    unit = e.elementwise(s, "Div", z, norm)
    return e.elementwise(s, "Mul", unit, unit)
