"""The CPU kernels of nested weights: against their references, and bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.errors import OperandError, OperandIndexError
from sirius_runtime.kernels import linear, mlp
from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import references, using
from sirius_runtime.nested import Layout, by_numbers, multiplying, nest
from tests.support.fast import gate_but
from tests.support.kernels import SETS, forbid_references, require
from tests.support.operators import randn, sirius

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One activation rounded the other way, of an MLP's product, is a step of 1 in 127 of its group.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
ROUNDED = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3}
# Neither are multiples of a step of 16 groups, of a tile of 128 outputs, of a chunk of 64 neurons.
O, C = 1184, 608  # noqa: E741
TOKENS = (1, 2, 3, 4, 5, 8, 13, 33)
PLANES = (1, 2)


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    require(request.param)
    with using(request.param):
        yield request.param


@pytest.fixture
def best() -> None:
    require(InstructionSet.PORTABLE)


@pytest.fixture(scope="module")
def nested() -> dict[str, Tensor]:
    """Weights of O outputs and C inputs, and `down` of C outputs and O inputs."""
    wide, other, back = (
        randn(*size, seed=i) / 25 for i, size in enumerate([(O, C), (O, C), (C, O)])
    )
    return {
        "gate": nest(wide, Layout.BY_OUTPUTS),
        "by_inputs": nest(wide, Layout.BY_INPUTS),
        "up": nest(other, Layout.BY_OUTPUTS),
        "down": nest(back, Layout.BY_INPUTS),
    }


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the token that is worst."""
    found, wanted = found.double(), wanted.double()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def mlp_args(nested: dict[str, Tensor], planes: int, *, up: bool = True) -> list[Any]:
    weights = [nested[name][:planes] for name in ("gate", "up", "down")]
    return [weights[0], weights[1] if up else None, weights[2], None, None, None, "silu", 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", PLANES)
def test_linears(
    isa: InstructionSet,
    planes: int,
    dtype: torch.dtype,
    nested: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bias = randn(O, seed=5, dtype=dtype)
    for tokens in TOKENS if dtype is torch.float32 else (1, 5):
        x = randn(1, tokens, C, seed=tokens, dtype=dtype)
        for layout in ("gate", "by_inputs"):
            weight = nested[layout][:planes]
            with references():
                wanted = sirius.linear(x, weight, bias)
            with monkeypatch.context() as only:
                forbid_references(only)
                found = sirius.linear(x, weight, bias)
            assert error(found, wanted) <= EXACT[dtype], (layout, tokens)
        threshold = 0.75  # about the mean of |x|
        with references():
            wanted, count = sirius.sparse_linear(x, nested["by_inputs"][:planes], bias, threshold)
        found, kept = sirius.sparse_linear(x, nested["by_inputs"][:planes], bias, threshold)
        assert 0 < int(count) < C
        assert torch.equal(kept, count)
        assert error(found, wanted) <= EXACT[dtype], tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", PLANES)
def test_mlps(
    isa: InstructionSet, planes: int, dtype: torch.dtype, nested: dict[str, Tensor]
) -> None:
    neurons = randn(1, 1, O, seed=9).argsort(-1)[..., : O // 3]
    for tokens in (1, 2, 13) if dtype is torch.float32 else (1,):
        x = randn(1, tokens, C, seed=tokens, dtype=dtype)
        calls: list[tuple[Any, ...]] = [
            (sirius.dense_mlp,),
            (sirius.dense_mlp_activity,),
            (sirius.griffin_mlp, neurons),
        ]
        if dtype is torch.float32:  # in 16 bits, scores at the border differ by a rounding
            calls += [(sirius.topk_mlp, O // 2), (sirius.cats_mlp, 0.2)]
            calls += [(sirius.griffin_cats_mlp, neurons, 0.2)]
        for operator, *extra in calls:
            args = (x, *mlp_args(nested, planes), *extra)
            with references():
                wanted = operator(*args)
            found = operator(*args)
            pairs = (
                [(found, wanted)] if isinstance(found, Tensor) else zip(found, wanted, strict=True)
            )
            for one, other in pairs:
                if one.dtype is torch.int64:
                    assert torch.equal(one, other), (operator, tokens)
                else:
                    assert error(one, other) <= ROUNDED[dtype], (operator, tokens)
    plain = (x, *mlp_args(nested, planes, up=False))
    with references():
        wanted = sirius.dense_mlp(*plain)
    assert error(sirius.dense_mlp(*plain), wanted) <= ROUNDED[dtype]


@pytest.mark.parametrize(
    "isa", gate_but(SETS, {*SETS} - {InstructionSet.PORTABLE}), indirect=True
)  # without vector instructions it takes two seconds
def test_a_tokens_result_is_the_same_alone_and_among_others(
    isa: InstructionSet, nested: dict[str, Tensor]
) -> None:
    x = randn(1, 33, C, seed=3)

    def alone(call: Callable[[Tensor], Tensor]) -> None:
        together = call(x)
        for tokens in (1, 2, 4, 5, 8):
            parts = torch.cat([call(part) for part in x.split(tokens, 1)], 1)
            assert torch.equal(parts, together), tokens

    for planes in PLANES:
        for name in ("gate", "by_inputs"):
            weight = nested[name][:planes]
            alone(lambda part, weight=weight: sirius.linear(part, weight))  # type: ignore[misc]
        args = mlp_args(nested, planes)
        alone(lambda part, args=args: sirius.dense_mlp(part, *args))  # type: ignore[misc]


def test_rows_of_a_weight_that_is_part_of_another(best: None, nested: dict[str, Tensor]) -> None:
    x = randn(1, 1, C, seed=3)
    rows, columns = nested["gate"][:, 32:65], nested["by_inputs"][..., 16:64]
    assert torch.equal(sirius.linear(x, rows), sirius.linear(x, nested["gate"])[..., 32:65])
    whole = sirius.linear(x, nested["by_inputs"])[..., 32:128]
    assert error(sirius.linear(x, columns), whole) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens(best: None, dtype: torch.dtype, nested: dict[str, Tensor]) -> None:
    """More than a call of a kernel takes: some at a time, to the bit as those alone."""
    x, bias = randn(2, 75, C, seed=3).to(dtype), randn(O, seed=4).to(dtype)
    for planes in PLANES:
        for name in ("gate", "by_inputs"):
            weight = nested[name][:planes]
            with references():
                wanted = sirius.linear(x, weight, bias)
            found = sirius.linear(x, weight, bias)
            assert error(found, wanted) <= EXACT[dtype]
            assert torch.equal(linear.nested_product(x, weight, bias), found)
            alone = [sirius.linear(part, weight, bias) for part in x.flatten(0, 1).split(5)]
            if linear.emulated(dtype) or dtype is torch.float32:
                assert torch.equal(torch.cat(alone).view_as(found), found)


def test_products_without_kernels(nested: dict[str, Tensor]) -> None:
    """Nor do they look for one where a weight is asked for that none serves."""
    x = randn(2, 75, C, seed=3)
    wanted = by_numbers(x, nested["gate"])
    with references(), multiplying(linear.nested_product):
        assert torch.equal(sirius.linear(x, nested["gate"]), wanted)
    double = linear.nested_product(x.double(), nested["gate"])
    assert error(double, wanted) <= EXACT[torch.float32]


def test_mlps_of_many_tokens(best: None, nested: dict[str, Tensor]) -> None:
    x = randn(2, 50, C, seed=3)
    args = (x, *mlp_args(nested, 2))
    valid = torch.ones(2, 50, dtype=torch.bool)
    with references():
        results = [*sirius.dense_mlp_activity(*args), *sirius.dense_mlp_statistic(*args, valid)]
    found = [*sirius.dense_mlp_activity(*args), *sirius.dense_mlp_statistic(*args, valid)]
    for one, other in zip(found, results, strict=True):
        assert error(one, other) <= ROUNDED[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings(isa: InstructionSet, dtype: torch.dtype, nested: dict[str, Tensor]) -> None:
    ids = torch.tensor([[0, 7, O - 1], [7, 7, 31]])
    with references():
        wanted = sirius.embedding(nested["gate"], ids, dtype)
    assert torch.equal(sirius.embedding(nested["gate"], ids, dtype), wanted)


def test_numbers_that_are_none_stay_so(isa: InstructionSet, nested: dict[str, Tensor]) -> None:
    for value in (float("nan"), float("inf")):
        x = randn(1, 2, C, seed=3)
        x[0, 1, 40] = value
        for name in ("gate", "by_inputs"):
            y = sirius.linear(x, nested[name])
            assert bool(y[0, 0].isfinite().all())
            assert not bool(y[0, 1].isfinite().any())


def test_tiny_numbers_are_noughts(isa: InstructionSet, nested: dict[str, Tensor]) -> None:
    x = torch.full((1, 1, C), 1e-35)
    x[0, 0, :32] = 2.0**-99
    for name in ("gate", "by_inputs"):
        with references():
            wanted = sirius.linear(x, nested[name])
        assert bool(wanted.any())
        assert error(sirius.linear(x, nested[name]), wanted) <= 1e-5


def test_other_sizes_are_refused(best: None, nested: dict[str, Tensor]) -> None:
    x = randn(1, 1, C - 32, seed=3)
    with pytest.raises(OperandError, match=r"sirius::linear: weight has 608 inputs, not 576"):
        linear.linear(x, nested["gate"])
    with pytest.raises(
        OperandError, match=r"sirius::sparse_linear: weight has 608 inputs, not 576"
    ):
        linear.sparse_linear(x, nested["by_inputs"], None, 0.1)
    x = randn(1, 1, C, seed=3)
    gate, up, down, *rest = mlp_args(nested, 2)
    for changed, said in (
        ((gate, up[:, :-32], down), "up has 1152 outputs, not 1184"),
        ((gate, up, down[:, :-1]), "down has 1152 inputs, not 1184"),
        ((gate, up, down[..., :-16]), "down has 576 outputs, not 608"),
    ):
        with pytest.raises(OperandError, match=f"sirius::dense_mlp: {said}"):
            mlp.dense_mlp(x, *changed, *rest)
    with pytest.raises(OperandIndexError, match=r"sirius::embedding: ids holds 1184"):
        linear.embedding(nested["gate"], torch.tensor([[O]]), torch.float32)
