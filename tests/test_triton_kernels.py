"""The CUDA kernels of linears and MLPs, in Triton's interpreter: against loops and references."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.kernels.native import references
from sirius_runtime.ops.mlp import ACTIVATIONS
from tests.support import naive
from tests.support.fast import gate_but, slow_but
from tests.support.operators import randn, sirius
from tests.support.triton_interpreter import interpreting, require_triton, small_tiles

require_triton()

from sirius_runtime.kernels.cuda import linear, tiles  # noqa: E402  (these import Triton)
from tests.support.cuda_kernels import mlp  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
B, T, C, I, O = 2, 3, 37, 70, 71  # no multiple of a tile  # noqa: E741


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def near(actual: Any, expected: Any) -> None:
    """Equal, or near where the values are not integers; tuples element by element."""
    if isinstance(expected, tuple | list):
        for one, other in zip(actual, expected, strict=True):
            near(one, other)
        return
    assert actual is not None, "the kernel did not serve"
    tolerance = 0 if expected.dtype is torch.int64 else TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def mlp_args(
    act: str = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = B,
    tokens: int = T,
    bias: bool = False,
    up: bool = True,
) -> list[Any]:
    """x, the weights, the biases, the activation and the layer."""
    x = randn(rows, tokens, C, seed=0, dtype=dtype)
    weights = [(randn(I, C, seed=i) / C**0.5).to(dtype) for i in (1, 2, 3)]
    biases = [randn(n, seed=3 + i, dtype=dtype) if bias else None for i, n in enumerate((I, I, C))]
    if not up:
        weights[1] = biases[1] = None  # type: ignore[call-overload]
    return [x, *weights, *biases, act, 1]


def some_neurons(keep: int, rows: int = B) -> Tensor:
    """Neurons of two layers, in no order."""
    return randn(2, rows, I, seed=9).argsort(-1)[..., :keep]


VALID = torch.tensor([[True, False, True], [True, True, False]])
CASES: list[tuple[str, tuple[Any, ...]]] = [
    ("dense_mlp", ()),
    ("dense_mlp_activity", ()),
    ("dense_mlp_statistic", (VALID,)),
    ("topk_mlp", (1,)),
    ("topk_mlp", (33,)),
    ("cats_mlp", (0.3,)),
    ("cats_mlp", (100.0,)),
    ("griffin_mlp", (some_neurons(33),)),
    ("griffin_mlp", (some_neurons(1),)),
    ("griffin_cats_mlp", (some_neurons(33), 0.3)),
    ("griffin_cats_mlp", (some_neurons(33), 100.0)),
]


# against loops


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("dtype", "tokens", "bias", "by_inputs"),
    slow_but(
        product(DTYPES, (1, 5), (False, True), (False, True)),
        {
            *product(DTYPES[:1], (1, 5), (True,), (False, True)),
            *((torch.bfloat16, 1, False, True), (torch.bfloat16, 5, True, False)),
            *((torch.float16, 1, True, False), (torch.float16, 5, False, True)),
        },
    ),
)
def test_linear(dtype: torch.dtype, tokens: int, bias: bool, by_inputs: bool) -> None:
    x, weight = randn(tokens, C, seed=0, dtype=dtype), randn(O, C, seed=1, dtype=dtype)
    offset = randn(O, seed=2, dtype=dtype) if bias else None
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    if by_inputs:
        weight = weight.t().contiguous().t()
    near(linear.linear(x, weight, offset), expected.to(dtype))


@pytest.mark.usefixtures("small")
# The parts' sums are added up with what lies between them, whatever that is.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    ("dtype", "tokens", "splits"),
    slow_but(
        product(DTYPES, (1, 3, 16), (1, 3)),
        {(torch.float32, 1, 3)},
        {(torch.float32, 16, 3), (torch.bfloat16, 1, 1), (torch.float16, 3, 3)},
    ),
)
def test_linears(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, splits: int
) -> None:
    """Of sizes that are less than a block of rows, more, and just two; with and without biases."""
    monkeypatch.setattr(tiles, "linear_splits", lambda *_: splits)
    x = randn(1, tokens, C, seed=0, dtype=dtype)
    sizes = (O, 7, 32, 1)
    weights = [randn(n, C, seed=n, dtype=dtype) for n in sizes]
    weights[1] = torch.cat([weights[1], weights[1]], 1)[:, C:]  # rows that lie further apart
    biases = [None if n == 7 else randn(n, seed=n + 1, dtype=dtype) for n in sizes]
    expected = tuple(
        (x.double() @ weight.double().t() + (0 if bias is None else bias.double())).to(dtype)
        for weight, bias in zip(weights, biases, strict=True)
    )
    for count in (2, 3, 4):
        near(linear.linears(x, weights[:count], biases[:count]), expected[:count])
    found = linear.linears(x, weights[:3], [None] * 3)
    assert found is not None
    for y, weight in zip(found, weights, strict=False):
        alone = linear.linear(x, weight)
        assert alone is not None
        assert torch.equal(y, alone)
        assert y.is_contiguous()
        assert y.data_ptr() % 16 == 0  # as compiled code expects it


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("act", gate_but(ACTIVATIONS, {"silu", "gelu_tanh"}))
def test_activations(act: str) -> None:
    args = mlp_args(act, bias=True)
    near(mlp.dense_mlp(*args), naive.dense_mlp(*args))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("case", "tokens", "bias"),
    slow_but(
        ((case, *form) for case in range(len(CASES)) for form in ((1, True), (3, False))),
        [
            (i, *((1, True), (3, False))[i % 2])
            for i, (name, _) in enumerate(CASES)
            if name != CASES[i - 1][0]
        ],
    ),
    ids=str,
)
def test_mlps_in_float32(case: int, tokens: int, bias: bool) -> None:
    name, extra = CASES[case]
    if name == "dense_mlp_statistic":
        extra = (VALID[:, :tokens],)
    args = [*mlp_args(bias=bias, tokens=tokens), *extra]
    near(getattr(mlp, name)(*args), getattr(naive, name)(*args))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("tokens", "threshold"),
    gate_but(product((1, 3), (-1.0, 0.7, 100.0)), {(1, -1.0), (3, 0.7), (1, 100.0)}),
)
def test_sparse_linear(tokens: int, threshold: float) -> None:
    x, weight, bias = randn(B, tokens, C, seed=0), randn(C, O, seed=1), randn(O, seed=2)
    args = [x, weight, bias, threshold]
    near(linear.sparse_linear(*args), naive.sparse_linear(*args))


# against the references


ROUNDED = {
    name: (place, torch.bfloat16)
    for place, (name, _) in enumerate(CASES)
    if name != CASES[place - 1][0] and name in ("dense_mlp", "topk_mlp", "cats_mlp", "griffin_mlp")
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("case", "dtype"),
    slow_but(
        product(range(len(CASES)), (torch.bfloat16, torch.float16)),
        [ROUNDED["topk_mlp"]],
        ROUNDED.values(),
    ),
    ids=lambda value: f"{CASES[value][0]}-{value}" if isinstance(value, int) else str(value),
)
def test_mlps_in_types_that_round(case: int, dtype: torch.dtype) -> None:
    """Products of quarters are exact, so that sums, and with them the choices, are the same."""
    name, extra = CASES[case]
    args = [*mlp_args(dtype=dtype, up=dtype is torch.bfloat16), *extra]
    args[0] = (args[0] * 4).round() / 4
    args[1] = (args[1] * 16).round() / 16
    if name == "topk_mlp":  # no two scores are equal, and the border falls between two
        args[0], args[1] = distinct(dtype)
    with references():
        expected = getattr(sirius, name)(*args)
    near(getattr(mlp, name)(*args), expected)


def distinct(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and gate whose products are a shuffle of 1 … 70, exact in every type."""
    x, gate = torch.zeros(B, T, C, dtype=dtype), torch.zeros(I, C, dtype=dtype)
    x[:, 0, 0] = 1
    gate[:, 0] = randn(I, seed=5).argsort() + 1
    return x, gate


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", gate_but(DTYPES, {torch.bfloat16}), ids=str)
def test_sparse_linear_in_every_type(dtype: torch.dtype) -> None:
    x = (randn(B, T, C, seed=0) * 4).round() / 4
    args = [x.to(dtype), randn(C, O, seed=1, dtype=dtype), None, 0.7]
    with references():
        expected = sirius.sparse_linear(*args)
    near(linear.sparse_linear(*args), expected)


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    slow_but(product(DTYPES, (1, 16)), {(torch.bfloat16, 1)}, {(torch.float32, 16)}),
)
def test_the_tiles_that_run(dtype: torch.dtype, tokens: int) -> None:
    """Of the sizes that `tiles` chooses, some wider than these tensors."""
    x = (randn(1, tokens, 300, seed=0) * 4).round().to(dtype) / 4
    gate, up, down = ((randn(70, 300, seed=i) / 2).round().to(dtype) / 16 for i in (1, 2, 3))
    mlp_weights = [gate, up, down, None, None, None, "silu", 0]
    neurons = some_neurons(I, 1).fmod(70).unique()[None, None]
    calls = [
        (linear.linear, sirius.linear, [x, gate]),
        (linear.linear, sirius.linear, [x[..., :70], gate.t()]),
        (linear.linears, sirius.linears, [x, [gate, up[:3], down], [None] * 3]),
        (linear.sparse_linear, sirius.sparse_linear, [x, gate.t().contiguous(), None, 0.7]),
        (mlp.dense_mlp, sirius.dense_mlp, [x, *mlp_weights]),
        (mlp.cats_mlp, sirius.cats_mlp, [x, *mlp_weights, 0.3]),
        (mlp.griffin_mlp, sirius.griffin_mlp, [x, *mlp_weights, neurons]),
    ]
    for kernel, operator, args in calls:
        with references():
            expected = operator(*args)
        near(kernel(*args), expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("keep", "dtype"),
    slow_but(
        product((25, 69), DTYPES),
        {(25, torch.float32)},
        {(69, torch.bfloat16), (25, torch.float16)},
    ),
)
def test_topk_takes_the_largest(dtype: torch.dtype, keep: int) -> None:
    x, gate = distinct(dtype)
    args = [x, gate, *mlp_args(dtype=dtype)[2:7], "relu", 0, keep]
    with references():
        expected = sirius.topk_mlp(*args)
    near(mlp.topk_mlp(*args), expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", gate_but(DTYPES, {torch.float32}), ids=str)
@pytest.mark.parametrize("block", [64, 256])  # several programs, and one
def test_topk_takes_the_first_of_equals(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(tiles, "SELECTED", block)
    gate = torch.ones(I, C, dtype=dtype)
    gate[50] = 2
    down = torch.eye(I, dtype=dtype)[:, :C].contiguous()  # y says which neurons were used
    x = torch.ones(1, 1, C, dtype=dtype)
    y = mlp.topk_mlp(x, gate, None, down, None, None, None, "relu", 0, 4)
    assert y is not None
    assert y[0, 0].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_threshold_is_compared_as_torch_compares_it(dtype: torch.dtype, threshold: float) -> None:
    """Rounded to the type: an activation equal to the rounded threshold is not above it."""
    stored = torch.tensor(threshold, dtype=dtype)
    around = torch.stack([stored * 0.99, stored, stored * 1.01])[:, None]
    args = [torch.ones(1, 1, 1, dtype=dtype), around, None, torch.ones_like(around)]
    done = mlp.cats_mlp(*args, None, None, None, "relu", 0, threshold)
    assert done is not None
    assert done[1].tolist() == [1]


# what is skipped, and what is shared


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tokens", gate_but((1, 3), {1}))
def test_skipped_rows_are_not_read(tokens: int) -> None:
    """They hold nothing but NaN, which a product with 0 would pass on."""
    nan = float("nan")
    args = mlp_args(tokens=tokens, rows=1)
    x, gate, up, down = args[:4]
    neurons = some_neurons(33, 1)
    left = torch.ones(I, dtype=torch.bool)
    left[neurons[1, 0]] = False
    expected = naive.griffin_mlp(*args, neurons)
    poisoned = [torch.where(left[:, None], nan, w) for w in (gate, up, down)]
    near(mlp.griffin_mlp(x, *poisoned, *args[4:], neurons), expected)

    g = torch.nn.functional.silu(x @ gate.t()).abs().mean((0, 1))
    expected = naive.cats_mlp(*args, 0.3)
    poisoned = [gate, *(torch.where((g <= 0.3)[:, None], nan, w) for w in (up, down))]
    near(mlp.cats_mlp(x, *poisoned, *args[4:], 0.3), expected)

    weight = randn(C, O, seed=1)
    dropped = x.abs().mean((0, 1)) <= 0.7
    expected = naive.sparse_linear(x, weight, None, 0.7)
    weight = torch.where(dropped[:, None], nan, weight)
    near(linear.sparse_linear(x, weight, None, 0.7), expected)


SOME = some_neurons(40)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        pytest.param("topk_mlp", (30,), marks=pytest.mark.gate),
        pytest.param("cats_mlp", (0.3,), marks=pytest.mark.gate),
        pytest.param("griffin_mlp", (SOME,), marks=pytest.mark.gate),
        ("griffin_cats_mlp", (SOME, 0.3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_s_result_does_not_depend_on_its_neighbours(
    name: str, extra: tuple[Any, ...]
) -> None:
    x, *weights = mlp_args()
    kernel = getattr(mlp, name)
    of_all = kernel(x, *weights, *extra)
    for row in range(B):
        own = slice(row, row + 1)
        alone = [given[:, own] if given is SOME else given for given in extra]
        of_one = kernel(x[own], *weights, *alone)
        if isinstance(of_one, tuple):
            assert of_one[1].tolist() == [of_all[1][row]]
            assert torch.equal(of_one[0][0], of_all[0][row])
        else:
            assert torch.equal(of_one[0], of_all[row])


@pytest.mark.usefixtures("small")
def test_a_neuron_that_is_not_there_is_left_out() -> None:
    args = mlp_args("gelu", bias=True)
    there = some_neurons(40)
    with_others = there.clone()
    with_others[..., ::3] = torch.tensor([-1, I, 1 << 40])[torch.arange(14) % 3]
    expected = [
        naive.griffin_mlp(*(a[r : r + 1] if a is args[0] else a for a in args), own)
        for r in range(B)
        for own in [there[:, r : r + 1, torch.arange(40) % 3 != 0]]
    ]
    near(mlp.griffin_mlp(*args, with_others), torch.cat(expected))


@pytest.mark.gate
@pytest.mark.usefixtures("small")
def test_slices_of_larger_tensors() -> None:
    """A fused weight's parts have rows further apart than they are long; so may x have."""
    x, gate, up, down, *rest = mlp_args(bias=True)
    fused = torch.cat([gate, up, down], 1)
    wide = torch.stack([x, x], -1)[..., 0]
    expected = mlp.dense_mlp(x, gate, up, down, *rest)
    assert expected is not None
    near(mlp.dense_mlp(wide, *fused.split(C, 1), *rest), expected)
    near(mlp.cats_mlp(wide, *fused.split(C, 1), *rest, -1.0)[0], expected)
    by_inputs = fused[:, :O].t()[:, :C]
    near(linear.linear(wide, by_inputs), x @ by_inputs.t())


# what kernels leave to the references


def test_more_tokens_than_kernels_take() -> None:
    most = tiles.MOST_TOKENS
    assert linear.linear(randn(most, C, seed=0), randn(O, C, seed=1)) is not None
    assert linear.linear(randn(most + 1, C, seed=0), randn(O, C, seed=1)) is None
    weights = [randn(O, C, seed=1)] * 2
    assert linear.linears(randn(most + 1, C, seed=0), weights, [None] * 2) is None
    assert mlp.dense_mlp(*mlp_args(rows=most // T + 1)) is None
    assert mlp.cats_mlp(*mlp_args(tokens=most + 1), 0.3) is None
    x = randn(1, most + 1, C, seed=0)
    assert linear.sparse_linear(x, randn(C, O, seed=1), None, 0.5) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda args: args.__setitem__(0, args[0].double()),
        lambda args: args.__setitem__(0, args[0][:0]),
        lambda args: args.__setitem__(1, args[1].double()),
        lambda args: args.__setitem__(2, args[2][:-1]),
        lambda args: args.__setitem__(3, args[3].t().contiguous().t()),
        lambda args: args.__setitem__(4, randn(I + 1, seed=0)),
        lambda args: args.__setitem__(6, randn(C, seed=0).half()),
        lambda args: args.__setitem__(7, "unheard_of"),
    ],
)
def test_other_arguments(change: Any) -> None:
    args = mlp_args()
    change(args)
    assert mlp.dense_mlp(*args) is None
    assert mlp.topk_mlp(*args, 5) is None
    assert mlp.griffin_mlp(*args, some_neurons(5)) is None


def test_other_weights_of_one_input() -> None:
    x, weight = randn(1, T, C, seed=0), randn(O, C, seed=1)
    assert linear.linears(x, [weight] * 4, [None] * 4) is not None
    assert linear.linears(x, [weight] * 5, [None] * 5) is None
    assert linear.linears(x, [], []) is None
    for other in (weight.half(), weight[:, 1:], weight[:0], weight.t().contiguous().t()):
        assert linear.linears(x, [weight, other], [None] * 2) is None
    assert linear.linears(x, [weight] * 2, [None, randn(O + 1, seed=2)]) is None
    assert linear.linears(x.double(), [weight.double()] * 2, [None] * 2) is None


def test_other_neurons() -> None:
    args = mlp_args()
    assert mlp.griffin_mlp(*args, some_neurons(5).int()) is None
    assert mlp.griffin_mlp(*args, some_neurons(5, rows=1)) is None
    assert mlp.griffin_cats_mlp(*args, some_neurons(0), 0.3) is None
    assert mlp.topk_mlp(*args, 0) is None
    assert mlp.topk_mlp(*args, I + 1) is None
