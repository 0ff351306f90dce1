"""The CUDA kernels of nested weights, in Triton's interpreter: against the references."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.kernels.native import references
from sirius_runtime.nested import Layout, nest
from tests.support.fast import slow_but
from tests.support.operators import randn, sirius
from tests.support.triton_interpreter import interpreting, require_triton, small_tiles

require_triton()

from sirius_runtime.kernels.cuda import linear  # noqa: E402  (these import Triton)
from tests.support.cuda_kernels import mlp  # noqa: E402

O, C, I = 96, 608, 160  # 19 groups: not all lie in whole blocks of 16  # noqa: E741
NEAR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
ROUNDED = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # an activation of down the other way


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def near(found: Tensor | None, wanted: Tensor, most: float) -> None:
    assert found is not None, "the kernel did not serve"
    if wanted.dtype is torch.int64:
        assert torch.equal(found, wanted)
        return
    error = (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    assert float(error.max()) <= most


@pytest.mark.parametrize(
    ("layout", "planes", "dtype"),
    slow_but(
        product(Layout, (1, 2), NEAR),
        {(Layout.BY_INPUTS, 2, torch.float32)},
        {(Layout.BY_OUTPUTS, 2, torch.float32)},
    ),
)
def test_linears(layout: Layout, planes: int, dtype: torch.dtype) -> None:
    weight, bias = nest(randn(O, C, seed=1) / 25, layout)[:planes], randn(O, seed=2, dtype=dtype)
    for tokens in (1, 5):
        x = randn(1, tokens, C, seed=tokens, dtype=dtype)
        with references():
            wanted = sirius.linear(x, weight, bias)
        near(linear.linear(x, weight, bias), wanted, NEAR[dtype])
        if layout is Layout.BY_OUTPUTS:
            found = linear.linears(x, [weight, weight[:, 7:40]], [bias, None])
            assert found is not None
            with references():
                near(found[1], sirius.linear(x, weight[:, 7:40]), NEAR[dtype])
            continue
        with references():
            y, count = sirius.sparse_linear(x, weight, bias, 0.75)
        found = linear.sparse_linear(x, weight, bias, 0.75)
        assert found is not None
        assert 0 < int(count) < C
        near(found[0], y, NEAR[dtype])
        near(found[1], count, 0)


NEURONS = randn(1, 2, I, seed=9).argsort(-1)[..., :50]
CASES: list[tuple[str, tuple[Any, ...]]] = [
    ("dense_mlp", ()),
    ("dense_mlp_activity", ()),
    ("topk_mlp", (60,)),
    ("cats_mlp", (0.2,)),
    ("griffin_mlp", (NEURONS,)),
    ("griffin_cats_mlp", (NEURONS, 0.2)),
]


@pytest.mark.parametrize(
    ("case", "planes"), slow_but(product(range(len(CASES)), (1, 2)), (), {(2, 1)})
)
def test_mlps(case: int, planes: int) -> None:
    """Two rows, which keep neurons of their own."""
    name, extra = CASES[case]
    gate, up = (nest(randn(I, C, seed=i) / 25, Layout.BY_OUTPUTS)[:planes] for i in (1, 2))
    down = nest(randn(C, I, seed=3) / 12, Layout.BY_INPUTS)[:planes]
    biases = [randn(n, seed=4 + i) for i, n in enumerate((I, I, C))]
    for tokens in (1, 3):
        args = [randn(2, tokens, C, seed=tokens), gate, up, down, *biases, "silu", 0, *extra]
        with references():
            wanted = getattr(sirius, name)(*args)
        found = getattr(mlp, name)(*args)
        if isinstance(wanted, Tensor):
            found, wanted = (found,), (wanted,)
        for one, other in zip(found, wanted, strict=True):
            near(one, other, ROUNDED[torch.float32])
