"""Linears of one input, and those that skip input channels, against `tests.support.naive`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sirius_runtime.kernels.native import references
from tests.support import naive
from tests.support.operators import (
    CHANNELS,
    DTYPES,
    ROWS,
    TOKENS,
    assert_near,
    linear_args,
    randn,
    sirius,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("kernels", [False, True])
def test_linears(kernels: bool, tokens: int, dtype: torch.dtype) -> None:
    x = linear_args(dtype, tokens=tokens)[0]
    sizes = (4, 1, 9)
    weights = [randn(n, CHANNELS, seed=n, dtype=dtype) for n in sizes]
    biases = [randn(4, seed=0, dtype=dtype), None, randn(9, seed=1, dtype=dtype)]
    with nullcontext() if kernels else references():
        found = sirius.linears(x, weights, biases)
    for y, weight, bias in zip(found, weights, biases, strict=True):
        rows = [[naive.linear(t, weight, bias) for t in row] for row in x.double().tolist()]
        assert_near(y, torch.tensor(rows, dtype=dtype))
        assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.3, 9.0])
@pytest.mark.parametrize("bias", [False, True])
def test_sparse_linear(bias: bool, threshold: float, tokens: int, dtype: torch.dtype) -> None:
    args = linear_args(dtype, tokens=tokens, bias=bias)
    y, counts = sirius.sparse_linear(*args, threshold)
    wanted_y, wanted = naive.sparse_linear(*args, threshold)
    assert_near(y, wanted_y)
    assert torch.equal(counts, wanted)


def test_a_channel_is_kept_above_the_threshold_not_at_it() -> None:
    x = torch.tensor([[[1.0, -2.0, 3.0]]])
    y, counts = sirius.sparse_linear(x, torch.eye(3), None, 2.0)
    assert (y.flatten().tolist(), counts.tolist()) == ([0.0, 0.0, 3.0], [1])


def test_tokens_of_a_row_share_their_channels() -> None:
    x = torch.tensor([[[4.0, 0.0, 2.5], [0.0, 4.0, 2.5]]])
    y, counts = sirius.sparse_linear(x, torch.eye(3), None, 2.0)
    assert (y[0].tolist(), counts.tolist()) == ([[0.0, 0.0, 2.5], [0.0, 0.0, 2.5]], [1])
    _, counts = sirius.sparse_linear(x.transpose(0, 1), torch.eye(3), None, 2.0)
    assert counts.tolist() == [2, 2]


def test_without_a_threshold_it_is_a_linear() -> None:
    x, weight, bias = linear_args()
    y, counts = sirius.sparse_linear(x, weight, bias, -1.0)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.t(), bias))
    assert counts.tolist() == [CHANNELS] * ROWS
    assert y.shape[1] == TOKENS
