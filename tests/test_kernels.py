"""The CPU kernels of MLPs and linears: against loops, against the references, and bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import references, using
from sirius_runtime.ops.mlp import ACTIVATIONS
from tests.support import naive
from tests.support.kernels import SETS, Fallback, forbid_references, require
from tests.support.operators import randn, sirius

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
B, T, C, I, O = 2, 3, 37, 150, 71  # no multiple of a vector, a chunk or a tile  # noqa: E741


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    require(request.param)
    with using(request.param):
        yield request.param


@pytest.fixture
def only_kernels(isa: InstructionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_references(monkeypatch)


@pytest.fixture
def best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for the best instruction set that there is, and no references."""
    require(InstructionSet.PORTABLE)
    forbid_references(monkeypatch)


def near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
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


def linear_args(
    dtype: torch.dtype, *, tokens: int = T, bias: bool = True, by_inputs: bool = False
) -> list[Tensor | None]:
    x = randn(B, tokens, C, seed=0, dtype=dtype)
    weight = randn(O, C, seed=1, dtype=dtype)
    if by_inputs:
        weight = weight.t().contiguous().t()
    return [x, weight, randn(O, seed=2, dtype=dtype) if bias else None]


# against loops


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("by_inputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, tokens: int, bias: bool, by_inputs: bool) -> None:
    x, weight, offset = linear_args(dtype, tokens=tokens, bias=bias, by_inputs=by_inputs)
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    near(sirius.linear(x, weight, offset), expected.to(dtype))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("outputs", [2049, 4096, 4864, 8960])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_outputs_than_one_task_takes(dtype: torch.dtype, outputs: int) -> None:
    """By inputs: a task's outputs are whole blocks of its sums, of one token as of several."""
    weight = (randn(70, outputs, seed=0) / 70**0.5).to(dtype)
    for tokens in (1, 2, 3):
        x = randn(1, tokens, 70, seed=1, dtype=dtype)
        exact = x.double() @ weight.double()
        near(sirius.linear(x, weight.t()), exact.to(dtype))
        near(sirius.sparse_linear(x, weight, None, -1.0)[0], exact.to(dtype))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dense_mlp(act: str, bias: bool, up: bool) -> None:
    args = mlp_args(act, bias=bias, up=up)
    near(sirius.dense_mlp(*args), naive.dense_mlp(*args))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("dense_mlp", ()),
        ("dense_mlp_activity", ()),
        ("dense_mlp_statistic", (torch.tensor([[True, False, True], [True, True, False]]),)),
        ("topk_mlp", (1,)),
        ("topk_mlp", (67,)),
        ("cats_mlp", (0.3,)),
        ("cats_mlp", (100.0,)),
        ("griffin_mlp", (some_neurons(67),)),
        ("griffin_mlp", (some_neurons(1),)),
        ("griffin_cats_mlp", (some_neurons(67), 0.3)),
    ],
)
def test_mlps_in_float32(name: str, extra: tuple[Any, ...], bias: bool) -> None:
    args = [*mlp_args(bias=bias), *extra]
    for actual, expected in pairs(getattr(sirius, name)(*args), getattr(naive, name)(*args)):
        if actual.is_floating_point():
            near(actual, expected)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("threshold", [-1.0, 0.7, 100.0])
def test_sparse_linear(threshold: float) -> None:
    x, weight, bias = linear_args(torch.float32, by_inputs=True)
    args = [x, weight.t(), bias, threshold]
    (y, counts), (wanted_y, wanted) = sirius.sparse_linear(*args), naive.sparse_linear(*args)
    near(y, wanted_y)
    assert torch.equal(counts, wanted)


def pairs(actual: Any, expected: Any) -> list[tuple[Tensor, Tensor]]:
    return list(
        zip(*(v if isinstance(v, tuple) else (v,) for v in (actual, expected)), strict=True)
    )


# against the references, in types that round


CASES = [
    ("dense_mlp", ()),
    ("dense_mlp_activity", ()),
    ("dense_mlp_statistic", (torch.tensor([[True, False, True], [True, True, False]]),)),
    ("cats_mlp", (0.3,)),
    ("griffin_mlp", (some_neurons(67),)),
    ("griffin_cats_mlp", (some_neurons(67), 0.3)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "extra"), CASES, ids=lambda value: str(value)[:20])
def test_mlps_in_types_that_round(
    isa: InstructionSet,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    extra: tuple[Any, ...],
    dtype: torch.dtype,
) -> None:
    """Products of quarters are exact, so that sums, and with them the choices, are the same."""
    args = [*mlp_args(dtype=dtype), *extra]
    args[0] = (args[0] * 4).round() / 4
    args[1] = (args[1] * 16).round() / 16
    with references():
        expected = getattr(sirius, name)(*args)
    forbid_references(monkeypatch)
    for actual, wanted in pairs(getattr(sirius, name)(*args), expected):
        if actual.dtype is torch.int64:
            assert torch.equal(actual, wanted)
        else:
            assert actual.dtype is wanted.dtype
            torch.testing.assert_close(actual, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("act", "up"), [("silu", True), ("gelu_tanh", True), ("relu2", False)])
def test_the_mlp_of_a_prompt(
    isa: InstructionSet, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, act: str, up: bool
) -> None:
    """Of more tokens than MLPs have kernels for: torch's products, and one pass between them."""
    args = mlp_args(act, dtype, tokens=70, bias=True, up=up)
    with references():
        expected = sirius.dense_mlp(*args)
    forbid_references(monkeypatch)
    near(sirius.dense_mlp(*args), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 70])
def test_the_statistic_of_a_prompt(
    isa: InstructionSet, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int
) -> None:
    """Also of more tokens than MLPs have kernels for, and of tokens that have none of z."""
    args = mlp_args(dtype=dtype, tokens=tokens, bias=True)
    valid = (randn(tokens, B, seed=7) > -1).t()
    with references():
        expected, statistic = sirius.dense_mlp_statistic(*args, valid)
    forbid_references(monkeypatch)
    actual, own = sirius.dense_mlp_statistic(*args, valid)
    near(actual, expected)
    assert own.dtype is torch.float32
    torch.testing.assert_close(own, statistic, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    none = torch.zeros_like(valid)
    assert not sirius.dense_mlp_statistic(*args, none)[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_topk_chooses_what_the_reference_chooses(
    isa: InstructionSet, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Where no two scores are equal: activations are a shuffle of 1 … 150."""
    _, gate, up, down, *_ = mlp_args(dtype=dtype)
    gate[:, 0] = randn(I, seed=5).argsort() + 1
    x = torch.zeros(1, 1, C, dtype=dtype)
    x[..., 0] = 1
    args = [x, gate, up, down, None, None, None, "relu", 0]
    for keep in (1, 50, 149, 150):
        with references():
            expected = sirius.topk_mlp(*args, keep)
        with monkeypatch.context() as patch:
            forbid_references(patch)
            near(sirius.topk_mlp(*args, keep), expected)


@pytest.mark.usefixtures("only_kernels")
def test_topk_takes_the_first_of_equals() -> None:
    gate = torch.ones(I, C)
    gate[100] = 2
    down = torch.eye(I)[:, :C].contiguous()  # y says which of the first neurons were used
    y = sirius.topk_mlp(torch.ones(1, 1, C), gate, None, down, None, None, None, "relu", 0, 4)
    assert y[0, 0].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_threshold_is_compared_as_torch_compares_it(
    isa: InstructionSet, dtype: torch.dtype, threshold: float
) -> None:
    """Rounded to the type: an activation equal to the rounded threshold is not above it."""
    stored = torch.tensor(threshold, dtype=dtype)
    x = torch.ones(1, 1, 1, dtype=dtype)
    around = torch.stack([stored * 0.99, stored, stored * 1.01])[:, None]
    args = [x, around, None, torch.ones_like(around), None, None, None, "relu", 0, threshold]
    _, counts = sirius.cats_mlp(*args)
    with references():
        _, expected = sirius.cats_mlp(*args)
    assert counts.tolist() == expected.tolist() == [1]


# bit for bit


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_s_result_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    for by_inputs in (False, True):
        x, weight, bias = linear_args(dtype, tokens=7, by_inputs=by_inputs)
        together = sirius.linear(x, weight, bias)
        alone = [[sirius.linear(x[b, t], weight, bias) for t in range(7)] for b in range(B)]
        assert torch.equal(together, torch.stack([torch.stack(row) for row in alone]))
    x, *mlp = mlp_args(dtype=dtype, tokens=7, bias=True)
    together = sirius.dense_mlp(x, *mlp)
    alone = [
        torch.cat([sirius.dense_mlp(x[b : b + 1, t : t + 1], *mlp) for t in range(7)], 1)
        for b in range(B)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 9, 12, 17, 47])
def test_many_tokens_over_several_blocks_of_columns(dtype: torch.dtype, tokens: int) -> None:
    """Rows of 301 numbers: sums are kept between blocks, of 16 tokens at a time."""
    x, weight = randn(tokens, 301, seed=0, dtype=dtype), randn(71, 301, seed=1, dtype=dtype)
    by_inputs = weight.t().contiguous().t()
    gate, up, down = ((randn(150, 301, seed=i) / 301**0.5).to(dtype) for i in (2, 3, 4))
    mlp = [gate, up, down, None, None, None, "silu", 0]
    for together, alone in (
        (sirius.linear(x, weight), [sirius.linear(t[None], weight) for t in x]),
        (sirius.linear(x, by_inputs), [sirius.linear(t[None], by_inputs) for t in x]),
        (sirius.dense_mlp(x[None], *mlp)[0], [sirius.dense_mlp(t[None, None], *mlp)[0] for t in x]),
    ):
        assert torch.equal(together, torch.cat(alone))
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(
        sirius.linear(x, weight).double(), expected, rtol=TOLERANCE[dtype], atol=1e-5 * 301
    )


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_result_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, *mlp = mlp_args(dtype=dtype, rows=5)
    neurons = some_neurons(80, rows=5)
    for row in range(5):
        part, own = x[row : row + 1], neurons[:, row : row + 1]
        for name, extra, extra_alone in (
            ("topk_mlp", (60,), (60,)),
            ("cats_mlp", (0.3,), (0.3,)),
            ("griffin_mlp", (neurons,), (own,)),
            ("griffin_cats_mlp", (neurons, 0.3), (own, 0.3)),
        ):
            operator = getattr(sirius, name)
            for alone, all_rows in pairs(
                operator(part, *mlp, *extra_alone), operator(x, *mlp, *extra)
            ):
                assert torch.equal(alone[0], all_rows[row])


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_neurons_are_the_dense_mlp(dtype: torch.dtype) -> None:
    args = mlp_args(dtype=dtype, bias=True)
    dense = sirius.dense_mlp(*args)
    assert torch.equal(sirius.topk_mlp(*args, I), dense)
    assert torch.equal(sirius.griffin_mlp(*args, some_neurons(I)), dense)
    y, counts = sirius.cats_mlp(*args, -1.0)
    assert torch.equal(y, dense)
    assert counts.tolist() == [I] * B


@pytest.mark.usefixtures("best")
def test_a_neuron_named_twice_counts_once() -> None:
    args = mlp_args()
    twice = torch.cat([some_neurons(9), some_neurons(9)], -1)
    assert torch.equal(sirius.griffin_mlp(*args, twice), sirius.griffin_mlp(*args, some_neurons(9)))


# threads


WIDE = 3 * 2048 + 70


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def wide_args() -> tuple[list[Any], list[Any]]:
    """Arguments of a linear and of an MLP that are work for several threads."""
    x, weight = randn(2, 3, 96, seed=0), randn(96, WIDE, seed=1)
    mlp = [randn(WIDE, 96, seed=i) for i in (2, 3, 4)]
    return [x, weight, None, 0.5], [x, *mlp, None, None, None, "silu", 0]


@pytest.mark.usefixtures("best", "threads")
def test_threads_change_nothing_from_one_call_to_the_next() -> None:
    channels, mlp = wide_args()
    y, counts = sirius.sparse_linear(*channels)
    dense = sirius.dense_mlp(*mlp)
    sparse = sirius.topk_mlp(*mlp, 999)
    torch.testing.assert_close(dense.double(), exact_mlp(*mlp[:4]), rtol=1e-4, atol=0.3)
    for _ in range(20):
        assert torch.equal(sirius.dense_mlp(*mlp), dense)
        assert torch.equal(sirius.topk_mlp(*mlp, 999), sparse)
        again, same = sirius.sparse_linear(*channels)
        assert torch.equal(again, y)
        assert torch.equal(same, counts)


def exact_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = x.double(), gate.double(), up.double(), down.double()
    return torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) @ down


@pytest.mark.usefixtures("best", "threads")
def test_threads_of_python_may_call_at_once() -> None:
    _, mlp = wide_args()
    expected = sirius.dense_mlp(*mlp)
    results: list[Tensor] = []

    def call() -> None:
        results.extend(sirius.dense_mlp(*mlp) for _ in range(10))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 40
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_works_without_its_parent_s_threads() -> None:
    require(InstructionSet.PORTABLE)
    script = """
import os, torch, sirius_runtime.operators
torch.set_num_threads(3)
x, w = torch.randn(1, 512), torch.randn(4096, 512)
expected = torch.ops.sirius.linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(torch.ops.sirius.linear(x, w), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# what kernels take, and what they leave to the references


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_larger_tensors(dtype: torch.dtype) -> None:
    """A fused weight's parts have rows further apart than they are long; so may x have."""
    x, gate, up, down, *rest = mlp_args(dtype=dtype, bias=True)
    fused = torch.cat([gate, up, down], 1)
    parts = fused.split(C, 1)
    wide = torch.stack([x, x], -1)[..., 0]
    assert not any(tensor.is_contiguous() for tensor in (wide, *parts))
    expected = sirius.dense_mlp(x, gate, up, down, *rest)
    assert torch.equal(sirius.dense_mlp(wide, *parts, *rest), expected)
    assert torch.equal(sirius.linear(wide, parts[0]), sirius.linear(x, gate))
    by_inputs = sirius.linear(wide, fused[:, :O].t()[:, :C])
    near(by_inputs, sirius.linear(x, fused[:C, :O].t().contiguous()))


def test_an_activation_that_kernels_do_not_know_is_the_reference_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ACTIVATIONS, "square", torch.square)
    args = mlp_args("square")
    x, gate, up, down = args[:4]
    expected = (x @ gate.t()).square() * (x @ up.t()) @ down
    torch.testing.assert_close(sirius.dense_mlp(*args), expected)


@pytest.mark.usefixtures("best")
@pytest.mark.parametrize(
    "change",
    [
        lambda args: args.__setitem__(0, args[0].double()),
        lambda args: args.__setitem__(1, args[1].double()),
        lambda args: args.__setitem__(3, args[3].t().contiguous().t()),
        lambda args: args.__setitem__(0, args[0].repeat(1, 30, 1)),
        lambda args: args.__setitem__(6, randn(2 * C, seed=0)[::2]),
        lambda args: args.__setitem__(0, args[0].to("meta")),
    ],
    ids=["type", "types", "layout", "tokens", "bias", "device"],
)
def test_what_no_kernel_serves_is_left_to_the_references(change: Any) -> None:
    args = mlp_args(bias=True)
    sirius.topk_mlp(*args, 9)
    change(args)
    if args[0].device.type == "meta":
        there = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        assert sirius.topk_mlp(*there, 9).is_meta
        return
    with pytest.raises(Fallback):
        sirius.topk_mlp(*args, 9)


@pytest.mark.usefixtures("best")
@pytest.mark.parametrize("bad", [-1, I])
def test_neurons_that_are_not_there_are_refused(bad: int) -> None:
    neurons = some_neurons(5)
    neurons[1, 1, 3] = bad
    with pytest.raises(IndexError, match="griffin_mlp"):
        sirius.griffin_mlp(*mlp_args(), neurons)
