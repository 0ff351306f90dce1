"""MLPs and linears in standard operators.

`griffin` reads only the kept neurons: their weights are inputs of the graph, gathered once a prompt
by the graph `select`. `topk`, `cats` and `teal` gather each token's rows if few are kept.
Otherwise, and with nested weights, they compute all neurons and mask, as the references do.
Gathering reads and writes the rows that the product then reads again, so at a kept share of 0.5 it
costs more than the full product (measured by `benchmarks/onnx_formulations.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sirius_compile.onnx import emit as e
from sirius_compile.onnx import nested
from sirius_compile.onnx.nested import Nested
from sirius_compile.onnx.scope import Extent, Kept, Scope, Value, View
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.ops.operands import Mlp, grouped
from sirius_runtime.spec import SiteSpec

NEURONS_GATHERED_BELOW = 0.2
"""The kept share up to which `topk` and `cats` gather. In the benchmark, one token's MLP takes 0.6
to 0.7 of the dense MLP's time at a share of 0.1, the same time at 0.3, and more at 0.5."""
CHANNELS_GATHERED_BELOW = 0.3
"""The same for `teal`, whose MLP takes 0.8 of the time at a share of 0.3."""


def kept_share(sites: Sequence[SiteSpec], weight: str) -> float:
    """The share of a weight's neurons or channels that calibration expects a step to keep; 1 if
    several sites, with different thresholds, read the weight."""
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


@grouped
def dense_mlp(s: Scope, x: Value, mlp: Mlp[Value]) -> Value:
    z = _times_up(s, _gate(s, x, mlp), x, mlp)
    return _down(s, z, mlp)


@grouped
def dense_mlp_statistic(s: Scope, x: Value, mlp: Mlp[Value], valid: Value) -> tuple[Value, Value]:
    z = _times_up(s, _gate(s, x, mlp), x, mlp)
    counted = e.elementwise(s, "Mul", _unit_square(s, z), e.unsqueeze(s, valid, 2))
    return _down(s, z, mlp), e.reduced(s, "ReduceSum", counted, [1], False)


@grouped
def dense_mlp_activity(s: Scope, x: Value, mlp: Mlp[Value]) -> tuple[Value, Value]:
    z = _times_up(s, _gate(s, x, mlp), x, mlp)
    return _down(s, z, mlp), _unit_square(s, z)


@grouped
def topk_mlp(s: Scope, x: Value, mlp: Mlp[Value], keep: int) -> Value:
    g = _gate(s, x, mlp)
    score = e.reduced(s, "ReduceSum", s.op("Abs", g, shape=g.shape), [1], True)
    _, index = topk(s, score, keep)
    neurons = score.shape[-1] if isinstance(score.shape[-1], int) else 0
    if keep <= NEURONS_GATHERED_BELOW * neurons and isinstance(mlp.down, Value):
        z = _times_rows(s, e.take(s, g, _for_each_token(s, index, g), -1), x, mlp, index)
        y = e.matmul(s, z, _rows_of(s, mlp.down, index))
        return _plus(s, y, mlp.down_bias)
    none = e.filled(s, e.shape_of(s, score), 0.0, g.dtype)
    ones = e.filled(s, e.shape_of(s, index), 1.0, g.dtype)
    kept = s.op("ScatterElements", none, index, ones, shape=score.shape, axis=2)
    z = _times_up(s, e.elementwise(s, "Mul", g, kept), x, mlp)
    return _down(s, z, mlp)


def _for_each_token(s: Scope, index: Value, g: Value) -> Value:
    """A row's neurons [B, 1, K], repeated for each of its tokens: [B, T, K]."""
    return e.expand(s, index, [-1, e.size(s, g, 1), -1])


def _is_rows(weight: Value) -> bool:
    """Whether a weight consists of whole, consecutive rows of a stored weight."""
    view = weight.view
    return view is not None and view.axis == 0 and view.step == 1 and not view.transposed


def _rows_of(s: Scope, weight: Value, index: Value) -> Value:
    """A weight's rows for the neurons `index`: [B, K, C] if each row has its own neurons [B, 1, K],
    or [U, C] if all rows share the neurons [U].
    """
    index = index if index.rank == 1 else e.squeeze(s, index, 1)
    if _is_rows(weight):
        assert weight.view is not None
        start = weight.view.start
        index = e.elementwise(s, "Add", index, start) if start else index
        return e.gather(s, weight.view.weight, index, 0)
    return e.gather(s, weight, index, 0)


def _times_rows(s: Scope, g: Value, x: Value, mlp: Mlp[Value], index: Value) -> Value:
    """`_times_up` for the kept neurons only."""
    if mlp.up is None:
        return g
    rows = _rows_of(s, mlp.up, index)
    y = _by_rows(s, x, rows) if index.rank == 1 else e.matmul(s, x, e.swap(s, rows, 1, 2))
    if mlp.up_bias is not None:
        y = e.elementwise(s, "Add", y, e.gather(s, mlp.up_bias, index, 0))
    return e.elementwise(s, "Mul", g, y)


def _by_rows(s: Scope, x: Value, rows: Value) -> Value:
    """x [B, T, C] times rows [U, C] transposed: [B, T, U]."""
    B, T, width = e.size(s, x, 0), e.size(s, x, 1), x.shape[2]
    assert isinstance(width, int)
    flat = e.reshape(s, x, [-1, width])
    y = s.op("Gemm", flat, rows, shape=(flat.shape[0], rows.shape[0]), transB=1)
    return e.reshape(s, y, [B, T, -1])


@grouped
def cats_mlp(s: Scope, x: Value, mlp: Mlp[Value], threshold: float) -> tuple[Value, Value]:
    g = _gate(s, x, mlp)
    kept = _above(s, g, threshold)
    z = e.elementwise(s, "Mul", g, kept)
    if _gathers(s, mlp.gate, NEURONS_GATHERED_BELOW):
        index = _used(s, kept)
        z = _times_rows(s, e.gather(s, z, index, -1), x, mlp, index)
        y = e.matmul(s, z, _rows_of(s, mlp.down, index))
        return _plus(s, y, mlp.down_bias), _count(s, kept)
    return _down(s, _times_up(s, z, x, mlp), mlp), _count(s, kept)


@grouped
def griffin_mlp(s: Scope, x: Value, mlp: Mlp[Value], _neurons: Value) -> Value:
    return _of_kept(s, x, mlp, None)[0]


@grouped
def griffin_cats_mlp(
    s: Scope, x: Value, mlp: Mlp[Value], _neurons: Value, threshold: float
) -> tuple[Value, Value | None]:
    return _of_kept(s, x, mlp, threshold)


def _of_kept(
    s: Scope, x: Value, mlp: Mlp[Value], threshold: float | None
) -> tuple[Value, Value | None]:
    """The MLP with the prompt's neurons only: y [B, T, C], and the count above `threshold` if there
    is one.
    """
    parts = {
        name: _input(s, Kept(f"{name}_kept.{mlp.layer}", name, mlp.layer, _stored_rows(weight)))
        for name, weight in zip(Mlp._fields[:5], mlp[:5], strict=True)
        if isinstance(weight, Value)
    }

    def product(part: str) -> Value:
        return _plus(s, e.matmul(s, x, parts[part]), parts.get(f"{part}_bias"))

    z, count = activation(s, product("gate"), mlp.act), None
    if threshold is not None:
        above = _above(s, z, threshold)
        z, count = e.elementwise(s, "Mul", z, above), _count(s, above)
    if "up" in parts:
        z = e.elementwise(s, "Mul", z, product("up"))
    return _plus(s, e.matmul(s, z, parts["down"]), mlp.down_bias), count


def _stored_rows(weight: Value) -> View:
    """The consecutive rows of a stored weight that `weight` is. Raises NotImplementedError if it is
    something else.
    """
    if weight.view is None or not _is_rows(weight):
        raise NotImplementedError(
            f"it reads {weight.name}, whose neurons are not rows of a stored weight"
        )
    return weight.view


def _input(s: Scope, kept: Kept) -> Value:
    s.root.kept[kept.name] = kept
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
    weight: Value | Nested,
    bias: Value | None,
    threshold: float,
) -> tuple[Value, Value]:
    size = s.op("Abs", e.cast(s, x, "float32"), shape=x.shape)
    score = e.reduced(s, "ReduceMean", size, [1], True)
    kept = e.elementwise(s, "Greater", score, threshold, result="bool")
    x = e.elementwise(s, "Mul", x, kept)
    if isinstance(weight, Nested):
        return nested.product(s, x, weight, bias), _count(s, kept)
    if _is_rows(weight) and _gathers(s, weight, CHANNELS_GATHERED_BELOW):
        index = _used(s, kept)
        y = e.matmul(s, e.gather(s, x, index, -1), _rows_of(s, weight, index))
    else:
        y = e.flat_matmul(s, x, weight)
    return _plus(s, y, bias), _count(s, kept)


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


def _gate(s: Scope, x: Value, mlp: Mlp[Value]) -> Value:
    return activation(s, _linear(s, x, mlp.gate, mlp.gate_bias), mlp.act)


def _times_up(s: Scope, g: Value, x: Value, mlp: Mlp[Value]) -> Value:
    if mlp.up is None:
        return g
    return e.elementwise(s, "Mul", g, _linear(s, x, mlp.up, mlp.up_bias))


def _linear(s: Scope, x: Value, weight: Value | Nested, bias: Value | None) -> Value:
    if isinstance(weight, Nested):
        return nested.product(s, x, weight, bias)
    return e.linear(s, x, weight, bias)


def _down(s: Scope, z: Value, mlp: Mlp[Value]) -> Value:
    if isinstance(mlp.down, Nested):
        return nested.product(s, z, mlp.down, mlp.down_bias)
    return _plus(s, e.flat_matmul(s, z, mlp.down), mlp.down_bias)


def _plus(s: Scope, y: Value, bias: Value | None) -> Value:
    return y if bias is None else e.elementwise(s, "Add", y, bias)


def _gathers(s: Scope, weight: Value, below: float) -> bool:
    """Whether a threshold keeps so few of a weight's rows that they are gathered."""
    view = None if isinstance(weight, Nested) else weight.view
    return view is not None and kept_share(s.root.sites, view.weight.name) <= below


def _above(s: Scope, g: Value, threshold: float) -> Value:
    """Whether the mean |g| of a row's tokens is above `threshold`: bool [B, 1, I]."""
    score = e.reduced(s, "ReduceMean", s.op("Abs", g, shape=g.shape), [1], True)
    return e.elementwise(s, "Greater", score, threshold, result="bool")


def _used(s: Scope, kept: Value) -> Value:
    """The indices [U] of the units that some row keeps, from `kept` [B, 1, I]. Unit 0 is always
    included (and masked if not kept), because not every runtime multiplies empty matrices.
    """
    some = e.reduced(s, "ReduceMax", e.cast(s, kept, "int32"), [0, 1], False)
    some = e.concat(s, [s.constant([1], "int32"), e.cut(s, some, 0, 1, e.MAX)], 0)
    found = s.op("NonZero", some, shape=(1, None), dtype="int64")
    return e.squeeze(s, found, 0)


def _count(s: Scope, kept: Value) -> Value:
    return e.reduced(s, "ReduceSum", e.cast(s, kept, "int64"), [1, 2], False)


def _unit_square(s: Scope, z: Value) -> Value:
    """(z / ‖z‖₂)², float32; the norm is at least 1e-12, as in `F.normalize`."""
    z = e.cast(s, z, "float32")
    norm = e.reduced(s, "ReduceL2", z, [-1], True)
    norm = e.elementwise(s, "Max", norm, 1e-12)
    unit = e.elementwise(s, "Div", z, norm)
    return e.elementwise(s, "Mul", unit, unit)
