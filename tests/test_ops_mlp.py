"""MLPs, dense and sparse, against the loops of `tests.support.naive`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sirius_runtime.ops.mlp import ACTIVATIONS
from tests.support import naive
from tests.support.operators import (
    DTYPES,
    NEURONS,
    ROWS,
    TOKENS,
    TOLERANCE,
    assert_near,
    mlp_args,
    randn,
    sirius,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dense_mlp(act: str, bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args(act, dtype, bias=bias)
    assert_near(sirius.dense_mlp(*args), naive.dense_mlp(*args))


def test_every_activation_has_a_naive_form() -> None:
    assert naive.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_mlp_statistic_counts_valid_tokens_only(bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args(dtype=dtype, bias=bias)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    y, statistic = sirius.dense_mlp_statistic(*args, valid)
    wanted_y, wanted = naive.dense_mlp_statistic(*args, valid)
    assert_near(y, wanted_y)
    assert statistic.dtype is torch.float32
    torch.testing.assert_close(statistic, wanted, rtol=0, atol=TOLERANCE[dtype])
    assert statistic[1].count_nonzero() == 0


def test_each_token_adds_one_to_the_statistic_over_neurons() -> None:
    args = mlp_args()
    _, statistic = sirius.dense_mlp_statistic(*args, torch.ones(ROWS, TOKENS).bool())
    torch.testing.assert_close(statistic.sum(1), torch.full((ROWS,), float(TOKENS)))


def test_statistics_of_chunks_add_up() -> None:
    x, *rest = mlp_args()
    valid = torch.ones(ROWS, TOKENS).bool()
    _, whole = sirius.dense_mlp_statistic(x, *rest, valid)
    _, first = sirius.dense_mlp_statistic(x[:, :1], *rest, valid[:, :1])
    _, second = sirius.dense_mlp_statistic(x[:, 1:], *rest, valid[:, 1:])
    torch.testing.assert_close(first + second, whole)


def test_a_token_without_any_activation_adds_nothing_to_the_statistic() -> None:
    x, *rest = mlp_args()
    _, statistic = sirius.dense_mlp_statistic(
        torch.zeros_like(x), *rest, torch.ones(ROWS, TOKENS).bool()
    )
    assert statistic.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dense_mlp_activity(act: str, bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args(act, dtype, bias=bias)
    y, activity = sirius.dense_mlp_activity(*args)
    wanted_y, wanted = naive.dense_mlp_activity(*args)
    assert_near(y, wanted_y)
    assert activity.dtype is torch.float32
    torch.testing.assert_close(activity, wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activity_summed_over_valid_tokens_is_the_statistic(dtype: torch.dtype) -> None:
    args = mlp_args(dtype=dtype, bias=True)
    valid = torch.tensor([[True, False, True], [False, True, False]])
    y, activity = sirius.dense_mlp_activity(*args)
    same_y, statistic = sirius.dense_mlp_statistic(*args, valid)
    assert torch.equal(y, same_y)
    torch.testing.assert_close((activity * valid[..., None]).sum(1), statistic)


def scores_of_rows(args: list[Any]) -> list[list[float]]:
    x, gate, act = args[0], args[1], naive.ACTIVATIONS[args[-2]]
    return [
        naive.scores([[act(g) for g in naive.linear(token, gate, None)] for token in tokens])
        for tokens in x.double().tolist()
    ]


KEEPS = (1, 7, 10)
THRESHOLDS = (0.0, 0.1, 0.25, 3.0, 5.5, 100.0)
FAR = 1.04  # eight roundings of bfloat16


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_no_rounding_decides_a_choice_of_neurons(act: str, tokens: int) -> None:
    """What the tests of choices below rest on; neurons that all say 0 may be chosen or not."""
    args = mlp_args(act, tokens=tokens, distinct=True)
    for scores in scores_of_rows(args):
        ranked = sorted(scores, reverse=True)
        for keep in KEEPS:
            assert ranked[keep - 1] == 0 or ranked[keep - 1] > FAR * ranked[keep]
        if act == "silu":
            for threshold in THRESHOLDS:
                means = [score / tokens for score in scores]
                assert not any(threshold < FAR * mean < FAR**2 * threshold for mean in means)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_topk_mlp_at_odd_sizes(act: str, bias: bool, tokens: int, dtype: torch.dtype) -> None:
    args = mlp_args(act, dtype, tokens=tokens, bias=bias, distinct=True)
    args[4] = None  # a gate bias would make near-ties
    for keep in KEEPS:  # of one token, the last of 10 are negative
        assert_near(sirius.topk_mlp(*args, keep), naive.topk_mlp(*args, keep))


def test_topk_mlp_chooses_by_magnitude_with_a_gate_bias() -> None:
    args = mlp_args(bias=True)
    assert_near(sirius.topk_mlp(*args, 4), naive.topk_mlp(*args, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_mlp_of_all_neurons_is_dense(dtype: torch.dtype) -> None:
    args = mlp_args(dtype=dtype, bias=True)
    torch.testing.assert_close(
        sirius.topk_mlp(*args, NEURONS), sirius.dense_mlp(*args), rtol=0, atol=0
    )


def two_tokens_of_three_neurons() -> list[Any]:
    """Activations 3, 0, 2 of the first token and 0, 3, 2 of the second; z is the same.

    Only the third neuron is the first choice of neither, and the first of both together. `down`
    tells the neurons apart.
    """
    x = torch.eye(2)[None]
    gate = torch.tensor([[3.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    down = torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 0.0]])
    return [x, gate, torch.ones(3, 2), down, None, None, None, "relu", 0]


def test_topk_mlp_tokens_of_a_row_share_their_neurons() -> None:
    x, *mlp = two_tokens_of_three_neurons()
    together = sirius.topk_mlp(x, *mlp, 1)
    assert together[0, :, 0].tolist() == [200.0, 200.0]
    alone = [sirius.topk_mlp(x[:, t, None], *mlp, 1)[0, 0, 0].item() for t in range(2)]
    assert alone == [3.0, 30.0]
    in_two_rows = sirius.topk_mlp(x.transpose(0, 1), *mlp, 1)
    assert in_two_rows[:, 0, 0].tolist() == alone


def test_cats_mlp_tokens_of_a_row_share_their_neurons() -> None:
    """Means of 1.5, 1.5 and 2: at 1.5 not kept."""
    x, *mlp = two_tokens_of_three_neurons()
    y, counts = sirius.cats_mlp(x, *mlp, 1.5)
    assert y[0, :, 0].tolist() == [200.0, 200.0]
    assert counts.tolist() == [1]
    y, counts = sirius.cats_mlp(x.transpose(0, 1), *mlp, 1.5)
    assert y[:, 0, 0].tolist() == [203.0, 230.0]
    assert counts.tolist() == [2, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("bias", [False, True])
def test_cats_mlp(threshold: float, bias: bool, tokens: int, dtype: torch.dtype) -> None:
    args = mlp_args("silu", dtype, tokens=tokens, bias=bias, distinct=True)
    args[4] = None
    y, counts = sirius.cats_mlp(*args, threshold)
    wanted_y, wanted = naive.cats_mlp(*args, threshold)
    assert_near(y, wanted_y)
    assert torch.equal(counts, wanted)


def test_cats_mlp_keeps_what_is_above_the_threshold_not_at_it() -> None:
    args = mlp_args("relu", tokens=1, distinct=True)  # activations 0 (5 of them), 1, 2, … 8
    _, counts = sirius.cats_mlp(*args, 3.0)
    assert counts.unique().tolist() == [5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_griffin_mlp_uses_the_row_s_own_neurons_of_its_layer(
    bias: bool, dtype: torch.dtype
) -> None:
    args = mlp_args(dtype=dtype, bias=bias)
    order = randn(2, ROWS, NEURONS, seed=9).argsort(-1)  # of 2 layers; the arguments are layer 1's
    for keep in (1, 6, NEURONS):
        neurons = order[..., :keep]
        assert_near(sirius.griffin_mlp(*args, neurons), naive.griffin_mlp(*args, neurons))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_griffin_cats_mlp(threshold: float, tokens: int, dtype: torch.dtype) -> None:
    args = mlp_args("silu", dtype, tokens=tokens, distinct=True)
    neurons = randn(2, ROWS, NEURONS, seed=9).argsort(-1)[..., :8]
    y, counts = sirius.griffin_cats_mlp(*args, neurons, threshold)
    wanted_y, wanted = naive.griffin_cats_mlp(*args, neurons, threshold)
    assert_near(y, wanted_y)
    assert torch.equal(counts, wanted)
    assert int(counts.max()) <= 8


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("operator", "extra"),
    [
        ("dense_mlp", ()),
        ("dense_mlp_activity", ()),
        ("dense_mlp_statistic", (torch.ones(ROWS, TOKENS).bool(),)),
        ("topk_mlp", (5,)),
        ("cats_mlp", (0.5,)),
        ("griffin_mlp", (torch.arange(6).expand(2, ROWS, 6),)),
        ("griffin_cats_mlp", (torch.arange(6).expand(2, ROWS, 6), 0.5)),
    ],
)
def test_a_plain_mlp_is_one_without_up(operator: str, extra: tuple[Any, ...], bias: bool) -> None:
    args = mlp_args("gelu_tanh", bias=bias)
    args[2] = args[5] = None
    found = getattr(sirius, operator)(*args, *extra)
    wanted = getattr(naive, operator)(*args, *extra)
    found, wanted = (v if isinstance(v, tuple) else (v,) for v in (found, wanted))
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
