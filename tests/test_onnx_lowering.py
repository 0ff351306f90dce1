"""Each translated operator computes what PyTorch computes; an unknown one is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from sirius_compile.onnx.aten import ATEN
from sirius_compile.onnx.lower import Lowering
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.ops.mlp import ACTIVATIONS
from sirius_runtime.spec import JSON, EntrySpec, SiteSpec, TensorSpec
from tests.support.artifacts import program_of
from tests.support.fast import slow_but
from tests.support.onnx_graphs import (
    agree,
    documented,
    floats,
    integers,
    lowered,
    over_weights,
    run,
    specs,
)
from tests.support.operators import CHAIN, LAYER, TREE, Block

aten, sirius = torch.ops.aten, torch.ops.sirius
higher_order = torch.ops.higher_order


X, Y, N, M = floats(3, 4, 5), floats(3, 4, 5, seed=1), integers(3, 4, 5), integers(3, 4, 5, seed=1)
FLAG = N > 0
ROWS = torch.tensor([2, 0, 2])
ELEMENTS = torch.tensor([[[0, 3, 1, 2, 0]], [[1, 1, 2, 0, 3]], [[3, 2, 1, 0, 0]]])

CASES: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "__and__.Tensor": (lambda a: (a > 0) & (a < 3), [N]),
    "__or__.Tensor": (lambda a: (a > 3) | (a < 0), [N]),
    "abs.default": (lambda a: a.abs(), [X]),
    "add.Tensor": (lambda a, n: (a + n, n + 1, n + 0.5, 1 + a, (a > 0) + n), [X, N]),
    "addmm.default": (lambda b, a, w: aten.addmm(b, a, w), [floats(5), floats(3, 4), floats(4, 5)]),
    "amax.default": (lambda n, x: (n.amax(1), x.amax([0, 2])), [N, X]),
    "any.default": (lambda n: (aten.any(n > 6), aten.any(n == 0)), [N]),
    "arange.default": (lambda x: (torch.arange(4), torch.arange(x.shape[1])), [X]),
    "arange.start_step": (
        lambda x: (
            torch.arange(1, 9, 2),
            torch.arange(0, 600, 3, dtype=torch.float32) + x.shape[0],
        ),
        [X],
    ),
    "argmax.default": (lambda x: (x.argmax(-1), x.argmax(1, keepdim=True)), [X]),
    "bitwise_not.default": (lambda n: ~(n > 0), [N]),
    "cat.default": (lambda a, b: (torch.cat([a, b], -1), torch.cat([a, b[:, :2]], 1)), [X, Y]),
    "chunk.default": (lambda x: aten.chunk(x, 2, -1), [floats(2, 6)]),
    "clamp.Tensor": (
        lambda x, y, n: (x.clamp(y), x.clamp(None, y), x.clamp(-y.abs(), y.abs()), x.clamp(n)),
        [X, Y, N],
    ),
    "clamp.default": (lambda x, n: (x.clamp(min=0.0), n.clamp(-2, 3), n.clamp(max=1)), [X, N]),
    "clone.default": (lambda x: x.clone() + 1, [X]),
    "concat.default": (lambda x, y: aten.concat.default([x, y], 1), [X, Y]),
    "contiguous.default": (lambda x: x.transpose(0, 1).contiguous() + 0.0, [X]),
    "cos.default": (lambda x: x.cos(), [X]),
    "cumsum.default": (
        lambda x, n: (x.double().cumsum(-1), n.cumsum(1), (n > 0).cumsum(-1)),
        [X, N],
    ),
    "div.Tensor": (lambda x, n: (x / 3.0, n / 4, x / (x * x + 1)), [X, N]),
    "einsum.default": (
        lambda a, b: torch.einsum("lbni,bn->lbi", a, b),
        [floats(2, 3, 4, 5), floats(3, 4)],
    ),
    "embedding.default": (lambda w, i: aten.embedding(w, i, 0), [floats(6, 3), ROWS]),
    "eq.Scalar": (lambda n: n == 2, [N]),
    "eq.Tensor": (lambda n, m, x: (n == m, x == n), [N, M, X]),
    "exp.default": (lambda x: x.exp(), [X]),
    "expand.default": (lambda x: x[:, :1].expand(-1, 6, -1) + 0.0, [X]),
    "eye.default": (lambda x: torch.eye(5, dtype=torch.int64) + x.shape[0], [X]),
    "flatten.using_ints": (lambda x: (x.flatten(1), x.flatten(), x.flatten(0, 1)), [X]),
    "floor_divide.default": (lambda n, x: (n // 3, n // -2, x // 0.5), [N, X]),
    "gather.default": (lambda x, i: (x.gather(1, i), x.gather(-1, i)), [X, ELEMENTS]),
    "ge.Scalar": (lambda n, x: (n >= 2, x >= 0), [N, X]),
    "ge.Tensor": (lambda n, m, x: (n >= m, x >= n), [N, M, X]),
    "gelu.default": (lambda x: (aten.gelu(x), aten.gelu(x, approximate="tanh")), [3 * X]),
    "gt.Scalar": (lambda n: n > 2, [N]),
    "gt.Tensor": (lambda n, m: n > m, [N, M]),
    "index.Tensor": (lambda x, r: (x[:, r], x[r], x[..., r]), [X, ROWS]),
    "index_copy.default": (
        lambda x, i, s: (x.index_copy(1, i, s), x.index_copy(1, i + 1, s)),
        [X, torch.tensor([2, 0]), floats(3, 2, 5, seed=2)],
    ),
    "index_select.default": (lambda x, r: x.index_select(1, r), [X, ROWS]),
    "layer_norm.default": (
        lambda x, w, b: (aten.layer_norm(x, [5], w, b, 1e-5), aten.layer_norm(x, [5])),
        [X, floats(5), floats(5, seed=1)],
    ),
    "le.Scalar": (lambda n: n <= 2, [N]),
    "le.Tensor": (lambda n, m: n <= m, [N, M]),
    "linear.default": (
        lambda x, w, b: (aten.linear(x, w), aten.linear(x, w, b), aten.linear(x, w[2:])),
        [X, floats(7, 5), floats(7)],
    ),
    "log.default": (lambda x: (x.abs() + 0.1).log(), [X]),
    "log_softmax.int": (lambda x: (x.log_softmax(-1), x.log_softmax(1)), [X]),
    "logical_and.default": (lambda n, x: torch.logical_and(n > 0, x > 0), [N, X]),
    "logical_not.default": (lambda n: (n > 0).logical_not(), [N]),
    "logsumexp.default": (lambda x: (x.logsumexp(-1), (1000 * x).logsumexp(-1)), [X]),
    "lt.Scalar": (lambda n: n < 2, [N]),
    "lt.Tensor": (lambda n, m: n < m, [N, M]),
    "masked_fill.Scalar": (
        lambda x, n: (x.masked_fill(n > 0, float("-inf")), n.masked_fill(n > 0, 9)),
        [X, N],
    ),
    "masked_fill.Tensor": (lambda x, f, v: aten.masked_fill(x, f, v), [X, FLAG, torch.tensor(2.0)]),
    "max.dim": (lambda x: (*x.max(-1), *x.max(1, keepdim=True)), [X]),
    "maximum.default": (lambda x, y, n: (x.maximum(y), n.maximum(n * 2)), [X, Y, N]),
    "mean.dim": (lambda x: (x.mean(-1, keepdim=True), x.mean([0, 1])), [X]),
    "minimum.default": (lambda x, y, n: (x.minimum(y), n.minimum(n * 2)), [X, Y, N]),
    "mul.Scalar": (lambda x: aten.mul.Scalar(x, 3), [X]),
    "mul.Tensor": (lambda x, n: (x * n, n * (n > 0), x * (n > 0), x * 3, n * 0.5), [X, N]),
    "ne.Scalar": (lambda n: n != 2, [N]),
    "ne.Tensor": (lambda n, m: n != m, [N, M]),
    "neg.default": (lambda x, n: (-x, -n), [X, N]),
    "new_empty.default": (lambda x: aten.slice_scatter(x.new_empty(3, 5), x[:, 0], 0, 0, 9), [X]),
    "new_zeros.default": (
        lambda x: (x.new_zeros(2, x.shape[1]), x.new_zeros(3, dtype=torch.bool)),
        [X],
    ),
    "ones_like.default": (
        lambda x: (torch.ones_like(x), torch.ones_like(x, dtype=torch.bool)),
        [X],
    ),
    "permute.default": (lambda x: x.permute(2, 0, 1) + 0.0, [X]),
    "pow.Scalar": (lambda x: aten.pow.Scalar(2.5, x), [X]),
    "pow.Tensor_Scalar": (lambda x: (x.pow(2), x.pow(3.0)), [X]),
    "reciprocal.default": (lambda x: (x * x + 0.1).reciprocal(), [X]),
    "relu.default": (lambda x: x.relu(), [X]),
    "repeat_interleave.self_int": (lambda x: aten.repeat_interleave.self_int(x, 3, 1), [X]),
    "reshape.default": (lambda x: x.reshape(x.shape[0], -1, 1), [X]),
    "rsqrt.default": (lambda x: (x * x + 0.1).rsqrt(), [X]),
    "scatter.src": (lambda x, i, s: x.scatter(1, i, s), [X, ELEMENTS, floats(3, 1, 5, seed=3)]),
    "scatter.value": (
        lambda x, i, n: (x.scatter(1, i, -1.5), n.scatter(1, i, 3)),
        [X, ELEMENTS, N],
    ),
    "scatter_add.default": (lambda x, i, s: x.scatter_add(1, i, s), [X, ELEMENTS, floats(3, 1, 5)]),
    "select.int": (lambda x: (x[:, 1], x[:, :, -1]), [X]),
    "sigmoid.default": (lambda x: x.sigmoid(), [X]),
    "silu.default": (lambda x: aten.silu(x), [X]),
    "sin.default": (lambda x: x.sin(), [X]),
    "slice.Tensor": (lambda x: (x[:, 1:], x[:, :-1], x[:, -1:], x[1:2, 0:3], x[:, 1::2]), [X]),
    "slice_scatter.default": (
        lambda x, y: (
            aten.slice_scatter(x, y[..., :2], 2, 0, 2),
            aten.slice_scatter(x, y[..., 1:], 2, 1, 2**63 - 1),
            aten.slice_scatter(x, y[:, 1:3], 1, -3, -1),
        ),
        [X, Y],
    ),
    "softmax.int": (lambda x: (x.softmax(-1), x.softmax(-1, dtype=torch.float64)), [X]),
    "sort.default": (lambda x: aten.sort.default(x, -1), [X]),
    "split.Tensor": (lambda x: aten.split.Tensor(x, 4, -1), [floats(2, 10)]),
    "split_with_sizes.default": (
        lambda x: aten.split_with_sizes(x, [4, 1, 5], -1),
        [floats(2, 10)],
    ),
    "sqrt.default": (lambda x: (x * x).sqrt(), [X]),
    "square.default": (lambda x: aten.square(x), [X]),
    "squeeze.default": (lambda x: x.squeeze() + 0.0, [floats(1, 3, 1)]),
    "squeeze.dim": (lambda x: aten.squeeze.dim(x[:, :1], 1), [X]),
    "stack.default": (lambda x, y: (torch.stack([x, y]), torch.stack([x, y], -1)), [X, Y]),
    "sub.Tensor": (lambda x, n: (x - n, n - 1, x - 0.5), [X, N]),
    "sum.dim_IntList": (
        lambda x, n: (x.sum(-1), n.sum([0, 2]), (n > 0).sum(1, keepdim=True)),
        [X, N],
    ),
    "sym_size.int": (lambda x: torch.arange(4) + x.shape[1] * 2, [X]),
    "t.default": (lambda x: aten.t(x) + 0.0, [floats(3, 4)]),
    "tanh.default": (lambda x: x.tanh(), [X]),
    "to.device": (lambda n: aten.to.device(n, torch.device("cpu"), torch.float32), [N]),
    "to.dtype": (lambda x, n: (x.double(), n.float(), (n > 0).to(torch.int64), x.bool()), [X, N]),
    "topk.default": (lambda x: x.topk(3, -1), [X]),
    "transpose.int": (lambda x: x.transpose(0, 2) + 0.0, [X]),
    "type_as.default": (lambda x, n: aten.type_as(n, x), [X, N]),
    "unsqueeze.default": (lambda x: (x[:, None], x.unsqueeze(-1)), [X]),
    "view.default": (lambda x: x.view(3, -1), [X]),
    "where.ScalarOther": (
        lambda x, n: (torch.where(n > 0, x, -1.0), torch.where(n > 0, n, 4)),
        [X, N],
    ),
    "where.ScalarSelf": (lambda x, n: aten.where.ScalarSelf(n > 0, 1.0, x), [X, N]),
    "where.self": (
        lambda x, y, n, m: (torch.where(n > 0, x, y), torch.where(n > 0, n > 3, m > 0)),
        [X, Y, N, M],
    ),
    "zeros.default": (lambda x: torch.zeros(2, x.shape[1], dtype=torch.int64), [X]),
    "zeros_like.default": (
        lambda x: (torch.zeros_like(x), torch.zeros_like(x, dtype=torch.int64)),
        [X],
    ),
}
UNTRACED = {
    "item.default": "reads a value; tested with the periods that have it",
    "sym_constrain_range.default": "computes nothing",
    "sort.stable": "sizes must be known; tested by `test_sorting`",
}


def test_every_operator_has_a_case() -> None:
    assert CASES.keys() | UNTRACED.keys() == ATEN.keys()


# The fast suite runs the next test, of graphs as the compiler makes them.
@pytest.mark.parametrize("name", slow_but(CASES, {"view.default"}))
def test_operators(name: str) -> None:
    function, inputs = CASES[name]
    agree(function, *inputs)


@pytest.mark.parametrize("name", CASES)
def test_operators_on_rows_known_when_it_runs(name: str) -> None:
    """Like the test above, with a symbolic number of rows."""
    function, inputs = CASES[name]
    if name == "view.default":
        pytest.skip("its sizes are its own")
    spec, document = documented(function, inputs)
    letters = tuple(
        TensorSpec(
            i.name, i.dtype, tuple("B" if e == 3 and a == 0 else e for a, e in enumerate(i.shape))
        )
        for i in spec.inputs
    )
    found = run(lowered(EntrySpec("test", letters, spec.outputs), document), inputs)
    wanted = function(*inputs)
    for w, f in zip(wanted if isinstance(wanted, tuple | list) else [wanted], found, strict=True):
        torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("descending", [False, True])
def test_sorting(descending: bool) -> None:
    """The sort is stable."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.sort(dim=-1, descending=descending, stable=True)

    agree(function, torch.tensor([[3.0, 1, 3, 2, 1], [0, 0, 5, 0, 5]]))


# sirius:: operators


@pytest.mark.parametrize(
    ("window", "softcap", "groups", "with_sinks"),
    slow_but(
        product((None, 3), (None, 0.7), (1, 2, 4), (False, True)),
        {(None, None, 1, False), (3, 0.7, 2, False)},
        {(3, None, 2, True), (None, 0.7, 4, True)},
    ),
)
def test_block_attention(
    window: int | None, softcap: float | None, groups: int, with_sinks: bool
) -> None:
    sinks = [floats(4, seed=8)] if with_sinks else []
    blocks = [
        Block(lengths, [TREE, [*CHAIN, 4, 5], TREE], groups=groups)
        for lengths in ([5, 1, 9], [12, 3, 3])
    ]
    for nodes in (range(7), [3, 4], [0]):
        one, other = (block.apart(nodes) for block in blocks)
        kind = one[11:13]  # the layer and the scale
        assert kind == other[11:13]

        def function(*given: Tensor, kind: Any = kind) -> tuple[Tensor, ...]:
            own = given[11] if with_sinks else None
            return sirius.block_attention(*given[:11], *kind, window, softcap, own)

        agree(function, *one[:11], *sinks, again=[*other[:11], *sinks])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 0, 9]])
def test_cached_attention_of_a_whole_block(window: int | None, lengths: list[int]) -> None:
    """Attention is the same; ONNX returns the K/V that PyTorch writes to the caches."""
    block = Block(lengths, [CHAIN])
    names = ("q", "k", "v", "k_cache", "v_cache", "positions", "slots", "length", "mask")
    inputs = [getattr(block, name).clone() for name in names]

    def function(*given: Tensor) -> Tensor:
        return sirius.cached_attention(*given, LAYER, 0.4, window, None)

    spec, document = documented(function, inputs)
    model = lowered(spec, document)
    found = dict(zip([o.name for o in model.graph.output], run(model, inputs), strict=True))
    wanted = function(*inputs)
    torch.testing.assert_close(found["y0"], wanted, atol=1e-5, rtol=1e-5)
    for row, length in enumerate(lengths):
        for name, cache in (("k_new", inputs[3]), ("v_new", inputs[4])):
            slots = slice(length, length + len(CHAIN))
            assert found[name][0, row].equal(cache[LAYER, row, :, slots])


ACTS, FORMS = tuple(ACTIVATIONS), ("gated", "biased", "plain")
NEURONS, C = 12, 5
GATE, UP, DOWN = floats(NEURONS, C), floats(NEURONS, C, seed=1), floats(NEURONS, C, seed=2)
BIASES = floats(NEURONS, seed=3), floats(NEURONS, seed=4), floats(C, seed=5)


OPERATORS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("dense_mlp", ()),
    ("dense_mlp_activity", ()),
    ("topk_mlp", (5,)),
    ("topk_mlp", (2,)),  # gathered
    ("cats_mlp", (0.3,)),
)
MLPS = [(*case, form, act) for case in OPERATORS for form in FORMS for act in ACTS]


@pytest.mark.parametrize(
    ("operator", "rest", "form", "act"),
    slow_but(MLPS, [m for m in MLPS if m[3] == "silu" or m[::2] == ("dense_mlp", "gated")]),
)
def test_mlps(operator: str, rest: tuple[Any, ...], form: str, act: str) -> None:
    biases = BIASES if form == "biased" else ()

    def function(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *b: Tensor) -> Any:
        up_ = None if form == "plain" else up
        return getattr(sirius, operator)(x, gate, up_, down, *(b or (None,) * 3), act, 0, *rest)

    agree(function, floats(3, 4, C, seed=9), GATE, UP, DOWN, *biases)


def test_the_statistic_of_a_prompt() -> None:
    valid = torch.tensor([[True, True, False, True], [True, False, False, False]])

    def function(x: Tensor, valid: Tensor, *weights: Tensor) -> Any:
        return sirius.dense_mlp_statistic(x, *weights, None, None, None, "silu", 0, valid)

    zero = floats(2, 4, C)
    zero[0, 1] = 0.0  # a token whose activations have no length
    agree(function, zero, valid, GATE, UP, DOWN)


@pytest.mark.parametrize("bias", [False, True])
def test_sparse_linear(bias: bool) -> None:
    def function(x: Tensor, weight: Tensor, b: Tensor) -> Any:
        return sirius.sparse_linear(x, weight, b if bias else None, 0.6)

    agree(function, floats(3, 4, C), floats(C, 7), floats(7))


@pytest.mark.parametrize(
    ("form", "threshold", "kept"),
    slow_but(
        product(("apart", "fused", "plain"), (-1.0, 0.2, 99.0), (0.1, 0.9)),
        {
            *product(("apart",), (-1.0, 0.2, 99.0), (0.1,)),
            *(("apart", 0.2, 0.9), ("fused", 0.2, 0.1), ("fused", 99.0, 0.9)),
            *(("plain", 0.2, 0.1), ("plain", -1.0, 0.9)),
        },
    ),
)
def test_cats_gathers_where_few_are_kept(form: str, threshold: float, kept: float) -> None:
    """For any expected share, and thresholds that keep all neurons, some or none."""
    stored = {"down": DOWN, "gate_bias": BIASES[0], "up_bias": BIASES[1], "down_bias": BIASES[2]}
    gate = {"fused": torch.cat([GATE, UP])}.get(form, GATE)
    stored |= {"gate": gate} | ({"up": UP} if form == "apart" else {})

    def function(x: Tensor, **w: Tensor) -> Any:
        ups = {"fused": w["gate"][NEURONS:], "apart": w.get("up"), "plain": None}
        own = w["gate"][:NEURONS], ups[form], w["down"]
        biases = w["gate_bias"], None if form == "plain" else w["up_bias"], w["down_bias"]
        return sirius.cats_mlp(x, *own, *biases, "silu", 0, threshold)

    x = floats(3, 2, C, seed=9)
    site = SiteSpec(0, "gate", NEURONS, kept * NEURONS, C, threshold, counted=True)
    model = over_weights(function, [x], stored, [site])
    for w, f in zip(function(x, **stored), run(model, [x]), strict=True):
        torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-4)
    assert (readers(model, "down") == {"Gather"}) == (kept < 0.2)


@pytest.mark.parametrize("kept", [0.1, 0.9])
@pytest.mark.parametrize("threshold", [-1.0, 0.6, 99.0])
@pytest.mark.parametrize("columns", [False, True])
def test_teal_gathers_where_few_are_kept(columns: bool, threshold: float, kept: float) -> None:
    """Channels are rows of the weight; a slice of its columns is not gathered."""
    stored = {"weight": floats(C, 7, seed=1)}

    def function(x: Tensor, weight: Tensor) -> Any:
        part = weight[:, :3] if columns else weight
        return sirius.sparse_linear(x, part, None, threshold)

    x = floats(3, 4, C)
    site = SiteSpec(0, "weight", C, kept * C, 7, threshold, counted=True)
    model = over_weights(function, [x], stored, [site])
    for w, f in zip(function(x, **stored), run(model, [x]), strict=True):
        torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-4)
    assert readers(model, "weight") == {"Gather" if kept < 0.2 and not columns else "MatMul"}


def readers(model: onnx.ModelProto, weight: str) -> set[str]:
    return {node.op_type for node in model.graph.node if weight in node.input}


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("form", ["gated", "biased", "plain"])
def test_griffin_reads_the_weights_that_select_kept(form: str, threshold: float | None) -> None:
    """Given the kept rows as inputs, the result equals that with all weights and `neurons`."""
    x, neurons = floats(2, 3, C, seed=9), torch.tensor([[[1, 4, 5, 11], [0, 2, 3, 7]]])
    up = None if form == "plain" else UP
    biases = BIASES if form == "biased" else (None, None, None)
    rest = () if threshold is None else (threshold,)
    operator = sirius.griffin_mlp if threshold is None else sirius.griffin_cats_mlp
    wanted = operator(x, GATE, up, DOWN, *biases, "silu", 0, neurons, *rest)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)

    weights = {
        "gate": GATE,
        "up": up,
        "down": DOWN,
        "gb": biases[0],
        "ub": biases[1],
        "db": biases[2],
    }
    stored = {name: w for name, w in weights.items() if w is not None}
    nodes: list[JSON] = [{"name": n, "op": "weight", "bound": n} for n in stored]
    nodes += [{"name": n, "op": "input", "bound": n} for n in ("x", "neurons")]
    names = ("x", "gate", "up", "down", "gb", "ub", "db", "neurons")
    node = {n: {"node": n} if n in stored or n in ("x", "neurons") else None for n in names}
    args = [node[n] for n in names[:7]] + ["silu", 0, node["neurons"], *rest]
    target = f"sirius.{'griffin_mlp' if threshold is None else 'griffin_cats_mlp'}.default"
    nodes.append({"name": "y", "op": "call", "target": target, "args": args})
    results: list[JSON] = [{"node": "y"}]
    if threshold is not None:
        for index in range(2):
            got = {"name": f"y{index}", "op": "call", "target": "python.getitem"}
            nodes.append(got | {"args": [{"node": "y"}, index]})
        results = [{"node": "y0"}, {"node": "y1"}]
    nodes.append({"name": "output", "op": "output", "args": results})

    inputs = (
        TensorSpec("x", "float32", ("B", "T", C)),
        TensorSpec("neurons", "int64", (1, "B", 4)),
    )
    entry = EntrySpec("test", inputs, specs("y", wanted))
    made = Lowering(program_of(stored), "float32").entry(entry, {"nodes": nodes})
    given = {"x": x.numpy()}
    for name, kept in made.kept.items():
        rows = stored[kept.weight.weight.name][neurons[0]]
        if kept.part.endswith("bias"):
            rows = rows[:, None]
        elif kept.part != "down":
            rows = rows.transpose(1, 2)
        given[name] = rows.contiguous().numpy()
    for tensor in made.model.graph.initializer:
        if tensor.name in stored:  # the weights whose rows are not chosen: down's bias
            tensor.CopyFrom(onnx.numpy_helper.from_array(stored[tensor.name].numpy(), tensor.name))
    session = onnxruntime.InferenceSession(
        made.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert {i.name for i in session.get_inputs()} == given.keys()  # neither neurons nor weights
    for found, expected in zip(session.run(None, given), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


# control flow


def test_loops_and_branches() -> None:
    def goes_on(level: Tensor, total: Tensor, step: Tensor) -> Tensor:
        return (level < 5) & (total.sum(-1) < 40.0)

    def body(level: Tensor, total: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        shared = step * 2.0  # the same in every iteration
        (grown,) = higher_order.cond(
            level == 2, lambda t, s: (t + s,), lambda t, s: (t - s * 0.5,), (total, shared)
        )
        return level + 1, grown

    def function(level: Tensor, total: Tensor, step: Tensor) -> Any:
        return higher_order.while_loop(goes_on, body, (level, total), (step,))

    for start in (0, 4, 5):
        agree(function, torch.tensor(start), floats(3), floats(3, seed=1))
    spec, document = documented(function, [torch.tensor(0), floats(3), floats(3, seed=1)])
    graph = lowered(spec, document).graph
    assert [n.op_type for n in graph.node if n.op_type in ("Mul", "Loop")] == ["Mul", "Loop"]


# weights


def test_a_fused_weight_is_read_where_it_lies() -> None:
    """Slices of a weight share one product, and no Transpose of a weight is added."""
    fused, square = floats(8, C), floats(C, C, seed=1)
    nodes: list[JSON] = [
        {"name": "fused", "op": "weight", "bound": "fused"},
        {"name": "square", "op": "weight", "bound": "square"},
        {"name": "x", "op": "input", "bound": "x"},
        call("top", "aten.slice.Tensor", "fused", 0, 0, 3),
        call("rest", "aten.slice.Tensor", "fused", 0, 3, 2**63 - 1),
        call("turned", "aten.t.default", "square"),
        call("y0", "aten.linear.default", "x", "top"),
        call("y1", "aten.linear.default", "x", "rest"),
        call("y2", "aten.linear.default", "x", "turned"),
        {"name": "out", "op": "output", "args": [{"node": f"y{i}"} for i in range(3)]},
    ]
    x = floats(2, 3, C)
    wanted = x @ fused[:3].T, x @ fused[3:].T, x @ square
    entry = EntrySpec("test", (TensorSpec("x", "float32", ("B", "T", C)),), specs("y", wanted))
    stored = {"fused": fused, "square": square}
    model = Lowering(program_of(stored), "float32").entry(entry, {"nodes": nodes}).model
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("Gemm") == 1
    assert kinds.count("MatMul") == 1
    assert "Transpose" not in kinds
    for tensor in model.graph.initializer:
        if tensor.name in stored:
            tensor.CopyFrom(onnx.numpy_helper.from_array(stored[tensor.name].numpy(), tensor.name))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for found, expected in zip(session.run(None, {"x": x.numpy()}), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


def call(name: str, target: str, *args: Any) -> JSON:
    """A call's record in a graph document; strings refer to nodes."""
    return {
        "name": name,
        "op": "call",
        "target": target,
        "args": [{"node": a} if isinstance(a, str) else a for a in args],
    }


# what is refused


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            call("y", "aten.fft_fft.default", "x"),
            "operator aten.fft_fft.default has no translation",
        ),
        (call("y", "sirius.routed_mlp.default", "x"), "operator sirius.routed_mlp has no transl"),
        (
            call("y", "sirius.sparse_linear.default", "x", "x", None, 0.5, "x"),
            r"sirius.sparse_linear is called with 5 arguments, .* takes 4; use --graphs torch",
        ),
        (
            call("y", "aten.argmax.default", "x", 0, False, 3),
            "translation of aten.argmax.default does not take these arguments",
        ),
        (call("y", "aten.index.Tensor", "x", [None]), "aten.index.Tensor can't be translated"),
        (call("y", "python.floordiv", "x", 2), "operator python.floordiv has no translation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_is_refused_by_name(record: JSON, message: str) -> None:
    nodes = [
        {"name": "x", "op": "input", "bound": "x"},
        record,
        {"name": "output", "op": "output", "args": [{"node": "y"}]},
    ]
    x = TensorSpec("x", "float32", (2, "B"))
    entry = EntrySpec("test", (x,), (TensorSpec("y", "float32", ("B",)),))
    with pytest.raises(UnsupportedModelError, match=message):
        Lowering(program_of({}), "float32").entry(entry, {"nodes": nodes})


def test_an_optional_argument_that_is_none_is_not_refused() -> None:
    block = Block([3], [CHAIN])
    given = [f"x{i}" for i in range(11)]
    arguments = block.apart(range(5))
    tensors, kind = arguments[:11], arguments[11:15]
    nodes: list[JSON] = [{"name": n, "op": "input", "bound": n} for n in given]
    nodes.append(call("y", "sirius.block_attention.default", *given, *kind, None, None))
    nodes.append(call("out", "python.getitem", "y", 0))
    nodes.append({"name": "output", "op": "output", "args": [{"node": "out"}]})
    wanted = sirius.block_attention(*tensors, *kind)[0]
    entry = EntrySpec("test", specs("x", tensors), specs("y", [wanted]))
    (found,) = run(lowered(entry, {"nodes": nodes}), tensors)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
