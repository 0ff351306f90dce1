"""Mixtures of experts in standard operators.

Pairs of a token and one of its experts are sorted by expert and split, so that each expert's
product has the rows routed to it. In a step of one token, most experts get no rows, and a product
of no rows reads no weight. Gathering the weights would copy them, so each expert's matrix is its
own initializer, at its offset in the tensor of all experts.

Shape letters are those of `sirius_runtime.ops.moe`, and `P` = N · k pairs, in the order of experts.
"""

from __future__ import annotations

from collections.abc import Callable

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.mlp import activation, topk
from sirius_compile.onnx.nested import Nested, expert_product
from sirius_compile.onnx.scope import Scope, Value
from sirius_runtime.ops.moe import CLAMPED_SWIGLU
from sirius_runtime.ops.operands import Mlp, grouped

_LIMIT = 7.0  # of clamped_swiglu, in gate and up

Choice = Callable[["Routes", Value], Value]
"""Sets the skipped neurons of act(gate x) [P, I] to zero."""


@grouped
def dense_moe(s: Scope, x: Value, experts: Value, weights: Value, mlp: Mlp[Value]) -> Value:
    """`sirius::dense_moe`."""
    routes = Routes(s, experts, weights, mlp.gate)
    return _moe(routes, x, mlp)


@grouped
def topk_moe(
    s: Scope, x: Value, experts: Value, weights: Value, mlp: Mlp[Value], keep: int
) -> Value:
    """`sirius::topk_moe`: computes all neurons of a token's experts, and masks those not kept."""

    def largest(routes: Routes, g: Value) -> Value:
        s, neurons = routes.s, g.shape[1]
        assert isinstance(neurons, int)
        size = e.elementwise(s, "Mul", s.op("Abs", g, shape=g.shape), routes.weights_P1)
        score = e.reshape(s, routes.by_token(size), [-1, routes.k * neurons])
        _, index = topk(s, score, keep)
        none = e.filled(s, e.shape_of(s, score), 0.0, g.dtype)
        ones = e.filled(s, e.shape_of(s, index), 1.0, g.dtype)
        kept = s.op("ScatterElements", none, index, ones, shape=score.shape, axis=1)
        kept = routes.by_expert(e.reshape(s, kept, [-1, neurons]))
        return e.elementwise(s, "Mul", g, kept)

    routes = Routes(s, experts, weights, mlp.gate)
    return _moe(routes, x, mlp, largest)


@grouped
def experts_moe(
    s: Scope,
    x: Value,
    experts: Value,
    weights: Value,
    mlp: Mlp[Value],
    keep: int,
    normalised: bool,
) -> Value:
    """`sirius::experts_moe`: the weights of skipped experts are not read."""
    kept, index = topk(s, weights, keep)
    if normalised:
        whole, part = (e.reduced(s, "ReduceSum", w, [-1], True) for w in (weights, kept))
        kept = e.elementwise(s, "Mul", kept, e.elementwise(s, "Div", whole, part))
    routes = Routes(s, e.take(s, experts, index, -1), kept, mlp.gate)
    return _moe(routes, x, mlp)


class Routes:
    """The (token, expert) pairs [P], sorted by expert."""

    def __init__(self, s: Scope, experts: Value, weights: Value, gate: Value) -> None:
        """experts, weights [N, k]; `gate` [E, I, C] gives the number of experts."""
        count = gate.experts if isinstance(gate, Nested) else gate.shape[0]
        k = experts.shape[1]
        assert isinstance(count, int)
        assert isinstance(k, int)
        self.s, self.k, self.count = s, k, count
        flat = e.reshape(s, experts, [-1])
        pairs = e.size(s, flat, 0)
        self._experts, self._order = _ascending(s, flat)
        places = e.arange(s, pairs)
        self._back = s.op("ScatterElements", places, self._order, places, shape=flat.shape, axis=0)
        self._token = e.elementwise(s, "Div", self._order, k)
        hit = e.elementwise(s, "Equal", e.unsqueeze(s, flat, 1), e.arange(s, count), result="bool")
        self._rows = e.reduced(s, "ReduceSum", e.cast(s, hit, "int64"), [0], False)
        self.weights_P1 = e.unsqueeze(s, self.by_expert(e.reshape(s, weights, [-1])), 1)

    def rows(self, x: Value) -> Value:
        """Each pair's row of x [N, C]: [P, C]."""
        return e.gather(self.s, x, self._token, 0)

    def by_expert(self, value: Value) -> Value:
        """Sorts pairs [P, …] from token order to expert order."""
        return e.gather(self.s, value, self._order, 0)

    def by_token(self, value: Value) -> Value:
        """Sorts pairs [P, …] from expert order to token order."""
        return e.gather(self.s, value, self._back, 0)

    def linear(self, x: Value, weight: Value, bias: Value | None) -> Value:
        """Each pair's x [P, C] through its expert's weight [E, O, C] and bias [E, O]: [P, O].

        Parts of a fused weight share one product.
        """
        s = self.s

        def product(part: Value, matrix: Value) -> Value:
            return s.op("Gemm", part, matrix, shape=(None, matrix.shape[0]), transB=1)

        if isinstance(weight, Nested):
            y = self._nested(x, weight)
        else:
            y = _part_of(s, self._products(x, _whole(weight), product), weight)
        if bias is None:
            return y
        biases = e.gather(s, _whole(bias), self._experts, 0)
        return e.elementwise(s, "Add", y, _part_of(s, biases, bias))

    def down(self, z: Value, weight: Value, bias: Value | None) -> Value:
        """Each pair's z [P, I] through its expert's weight [E, I, C] and bias [E, C]: [P, C]."""
        s = self.s
        if isinstance(weight, Nested):
            y = self._nested(z, weight)
            return y if bias is None else self._plus_bias(y, bias)
        whole = _whole(weight)
        if whole.name != weight.name:
            raise NotImplementedError(f"{weight.name} is only a part of a stored tensor")
        y = self._products(z, whole, lambda part, matrix: e.matmul(s, part, matrix))
        return y if bias is None else self._plus_bias(y, bias)

    def _plus_bias(self, y: Value, bias: Value) -> Value:
        """Adds to each pair its expert's row of the bias [E, C]."""
        return e.elementwise(self.s, "Add", y, e.gather(self.s, bias, self._experts, 0))

    def _nested(self, x: Value, weight: Nested) -> Value:
        """Each pair's x [P, C] through its expert's nested matrix: [P, O]."""
        s = self.s
        parts = self._parts(e.cast(s, x, "float32"))
        products = [expert_product(s, part, weight, i) for i, part in enumerate(parts)]
        y = e.cast(s, e.concat(s, products, 0), x.dtype)
        return e.cut(s, y, -1, weight.start, weight.end, weight.step)

    def _parts(self, x: Value) -> tuple[Value, ...]:
        """The rows [P, …] of each expert."""
        outputs = [(x.dtype, (None, x.shape[1]))] * self.count
        return self.s.ops("Split", x, self._rows, outputs=outputs, axis=0)

    def _products(self, x: Value, weight: Value, product: Callable[[Value, Value], Value]) -> Value:
        s, parts = self.s, self._parts(x)
        matrices = [s.root.expert(weight, index) for index in range(self.count)]
        return e.concat(s, [product(p, m) for p, m in zip(parts, matrices, strict=True)], 0)


def _moe(routes: Routes, x: Value, mlp: Mlp[Value], choice: Choice = lambda routes, g: g) -> Value:
    s, x_PC = routes.s, routes.rows(x)
    g = routes.linear(x_PC, mlp.gate, mlp.gate_bias)
    z = choice(routes, _activation(s, g, mlp.act))
    if mlp.up is not None:
        u = routes.linear(x_PC, mlp.up, mlp.up_bias)
        z = e.elementwise(s, "Mul", z, _bounded(s, u, mlp.act))
    y = routes.down(e.cast(s, z, x.dtype), mlp.down, mlp.down_bias)
    weighted = routes.by_token(e.elementwise(s, "Mul", y, routes.weights_P1))
    width = y.shape[1]
    assert isinstance(width, int)
    y_NkC = e.reshape(s, weighted, [-1, routes.k, width])
    return e.cast(s, e.reduced(s, "ReduceSum", y_NkC, [1], False), x.dtype)


def _activation(s: Scope, g: Value, act: str) -> Value:
    if act != CLAMPED_SWIGLU:
        return activation(s, g, act)
    return activation(s, e.elementwise(s, "Min", g, _LIMIT), "quick_gelu")


def _bounded(s: Scope, u: Value, act: str) -> Value:
    if act != CLAMPED_SWIGLU:
        return u
    bounded = e.elementwise(s, "Max", e.elementwise(s, "Min", u, _LIMIT), -_LIMIT)
    return e.elementwise(s, "Add", bounded, 1.0)


def _ascending(s: Scope, x: Value) -> tuple[Value, Value]:
    """x [P] in ascending order, and the index that each element had."""
    count = e.sizes(s, [e.size(s, x, 0)])
    outputs = [(x.dtype, x.shape), ("int64", x.shape)]
    values, index = s.ops("TopK", x, count, outputs=outputs, axis=0, largest=0, sorted=1)
    return values, index


def _whole(part: Value) -> Value:
    """The stored tensor that `part` is, or is a slice of along the second dimension.

    Raises NotImplementedError if `part` is something else.
    """
    view = part.view
    if view is None or view.transposed or (view.axis == 0 and view.weight.name != part.name):
        raise NotImplementedError(f"{part.name} does not consist of stored rows of each expert")
    return view.weight


def _part_of(s: Scope, y: Value, weight: Value) -> Value:
    """The part of y [P, O], computed with a whole stored tensor, that belongs to `weight`."""
    view = weight.view
    assert view is not None
    return y if view.axis == 0 else e.cut(s, y, -1, view.start, view.end, view.step)
