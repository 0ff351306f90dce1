"""Mixtures of experts by the CPU's MLP kernels, against the loops of `tests.support.naive`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import references
from sirius_runtime.ops import moe as reference
from tests.support import naive
from tests.support.kernels import forbid_references, require
from tests.support.operators import randn, sirius

N, K, E, C, I = 5, 3, 7, 37, 131  # noqa: E741
OPERATORS: dict[str, tuple[Any, ...]] = {
    "dense_moe": (),
    "topk_moe": (150,),
    "experts_moe": (2, True),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    require(InstructionSet.PORTABLE)
    forbid_references(monkeypatch)


def arguments(
    dtype: torch.dtype = torch.float32, *, tokens: int = N, bias: bool = True
) -> list[Any]:
    x = randn(tokens, C, seed=0, dtype=dtype)
    weights, experts = randn(tokens, E, seed=1).softmax(-1).topk(K)
    matrices = [(randn(E, I, C, seed=i) / C**0.5).to(dtype) for i in (2, 3, 4)]
    biases = [
        randn(E, n, seed=5 + i, dtype=dtype) if bias else None for i, n in enumerate((I, I, C))
    ]
    return [x, experts, weights, *matrices, *biases, "silu", 1]


def near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_in_float32(name: str, bias: bool) -> None:
    args = [*arguments(bias=bias), *OPERATORS[name]]
    near(getattr(sirius, name)(*args), getattr(naive, name)(*args))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense_moe", "experts_moe"])  # rounding decides what topk keeps
def test_in_other_types(name: str, dtype: torch.dtype) -> None:
    args = [*arguments(dtype), *OPERATORS[name]]
    near(getattr(sirius, name)(*args), getattr(naive, name)(*args))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("name", OPERATORS)
def test_a_token_s_output_is_its_own_to_the_bit(name: str) -> None:
    x, experts, weights, *rest = [*arguments(), *OPERATORS[name]]
    operator = getattr(sirius, name)
    together = operator(x, experts, weights, *rest)
    for n in range(N):
        row = slice(n, n + 1)
        assert torch.equal(operator(x[row], experts[row], weights[row], *rest)[0], together[n])


@pytest.mark.usefixtures("only_kernels")
def test_an_expert_without_kept_neurons_gives_its_bias() -> None:
    x, experts, weights, *rest = arguments(tokens=1)
    weights = torch.tensor([[1.0, 0.0, 0.0]])
    args = [x, experts, weights, *rest, 20]
    near(sirius.topk_moe(*args), naive.topk_moe(*args))
    weights[0, 1] = 1e-9  # so little that no neuron is kept, but its bias counts
    near(sirius.topk_moe(*args), naive.topk_moe(*args))


def test_many_tokens_and_gpt_oss_activation_are_the_reference_s() -> None:
    args = arguments(tokens=9)
    near(sirius.topk_moe(*args, 150), naive.topk_moe(*args, 150))
    args[-2] = "clamped_swiglu"
    for name, extra in OPERATORS.items():
        expected = getattr(reference, name)(*args, *extra)
        assert torch.equal(getattr(sirius, name)(*args, *extra), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_references_can_be_asked_for(name: str) -> None:
    args = [*arguments(), *OPERATORS[name]]
    with references():
        near(getattr(sirius, name)(*args), getattr(naive, name)(*args))
