"""Mixtures of experts, dense and sparse, against the loops of `tests.support.naive`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sirius_runtime.ops import moe
from sirius_runtime.ops.moe import EXPERT_ACTIVATIONS
from tests.support import naive
from tests.support.operators import DTYPES, NEURONS, ROUTED, assert_near, moe_args, sirius

OPERATORS: dict[str, tuple[Any, ...]] = {
    "dense_moe": (),
    "topk_moe": (17,),
    "experts_moe": (2, True),
}


def test_every_activation_has_a_naive_form() -> None:
    assert naive.EXPERT_ACTIVATIONS.keys() == EXPERT_ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", EXPERT_ACTIVATIONS)
def test_dense_moe(act: str, bias: bool, dtype: torch.dtype) -> None:
    args = moe_args(act, dtype, bias=bias)
    assert_near(sirius.dense_moe(*args), naive.dense_moe(*args))


@pytest.mark.parametrize(("gate", "up", "wanted"), [(20, 20, 56), (20, -20, -42), (-20, 20, 0)])
def test_clamped_swiglu_is_bounded(gate: float, up: float, wanted: float) -> None:
    """A gate of 20 counts as 7, an up of 20 as 7 + 1 and of -20 as -7 + 1."""
    one = torch.ones(1, 1, 1)
    mlps = one * gate, one * up, one, None, None, None, "clamped_swiglu", 0
    y = sirius.dense_moe(one[0], torch.tensor([[0]]), one[0], *mlps)
    assert y.item() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", [1, 17, ROUTED * NEURONS])
@pytest.mark.parametrize("act", ["silu", "clamped_swiglu"])
def test_topk_moe(act: str, keep: int, bias: bool) -> None:
    args = moe_args(act, bias=bias)
    found, wanted = sirius.topk_moe(*args, keep), naive.topk_moe(*args, keep)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_topk_moe_ranks_neurons_of_all_experts_by_weight_too() -> None:
    """Activations 3, 2 of one expert and 4, 1 of another; each neuron shows in an output."""
    gate = torch.tensor([[[3.0], [2.0]], [[4.0], [1.0]]])
    down = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]])
    x, experts = torch.ones(1, 1), torch.tensor([[0, 1]])

    def run(weights: list[float], keep: int) -> float:
        mlps = gate, None, down, None, None, None, "relu", 0
        return float(sirius.topk_moe(x, experts, torch.tensor([weights]), *mlps, keep))

    assert run([0.5, 0.5], 2) == 0.5 * 3 + 0.5 * 400
    assert run([0.75, 0.25], 2) == 0.75 * (3 + 20)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("keep", [1, 2, ROUTED])
def test_experts_moe(keep: int, normalised: bool) -> None:
    args = moe_args(bias=True)
    found = sirius.experts_moe(*args, keep, normalised)
    torch.testing.assert_close(
        found, naive.experts_moe(*args, keep, normalised), rtol=1e-5, atol=1e-5
    )


def test_experts_in_any_order_are_kept_by_weight() -> None:
    args = moe_args()
    turned = [args[0], args[1].flip(-1), args[2].flip(-1), *args[3:]]
    torch.testing.assert_close(
        sirius.experts_moe(*args, 2, True), sirius.experts_moe(*turned, 2, True)
    )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_plain_experts_have_no_up(name: str, plain: bool) -> None:
    args = moe_args("gelu", bias=True, plain=plain)
    found = getattr(sirius, name)(*args, *OPERATORS[name])
    wanted = getattr(naive, name)(*args, *OPERATORS[name])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "clamped_swiglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_decompositions_are_the_same_functions(name: str, bias: bool, act: str) -> None:
    args = (*moe_args(act, bias=bias), *OPERATORS[name])
    decomposed = getattr(moe, f"decomposed_{name}")
    torch.testing.assert_close(
        decomposed(*args), getattr(sirius, name)(*args), rtol=1e-5, atol=1e-5
    )


def test_tokens_do_not_share_what_they_keep() -> None:
    """A token's output is the same beside others and alone."""
    x, experts, weights, *rest = moe_args()
    for name, extra in OPERATORS.items():
        operator = getattr(sirius, name)
        together = operator(x, experts, weights, *rest, *extra)
        alone = [
            operator(x[n : n + 1], experts[n : n + 1], weights[n : n + 1], *rest, *extra)
            for n in range(4)
        ]
        assert_near(together, torch.cat(alone))
