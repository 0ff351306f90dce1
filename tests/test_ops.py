"""Every `sirius::` operator is registered truly: schemas as to mutation, fakes as to shapes."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from sirius_runtime import kernels
from sirius_runtime.nested import Layout, nest
from sirius_runtime.operators import OPERATORS, Operator
from tests.support.operators import (
    LAYER,
    ROWS,
    TOKENS,
    TREE,
    Block,
    linear_args,
    mlp_args,
    moe_args,
    randn,
    sirius,
)


def samples() -> dict[str, tuple[Any, ...]]:
    mlp = tuple(mlp_args(bias=True))
    moe = tuple(moe_args(bias=True))
    block = Block([3, 0], [TREE], sinks=True)
    qkv = block.q, block.k, block.v
    where = block.positions, block.slots, block.length, block.mask
    valid = torch.ones(ROWS, TOKENS).bool()
    neurons = torch.arange(4).expand(2, ROWS, 4).contiguous()
    linear = linear_args()
    return {
        "attention": (*qkv, 0, 0.4, 3, 0.7, block.sink),
        "cached_attention": (*qkv, block.k_cache, block.v_cache, *where, LAYER, 0.4, None, None),
        "block_attention": block.apart([1, 2]),
        "dense_mlp": mlp,
        "dense_mlp_statistic": (*mlp, valid),
        "dense_mlp_activity": mlp,
        "topk_mlp": (*mlp, 4),
        "cats_mlp": (*mlp, 0.1),
        "griffin_mlp": (*mlp, neurons),
        "griffin_cats_mlp": (*mlp, neurons, 0.1),
        "linear": (linear[0], linear[1].t(), linear[2]),
        "linears": (linear[0], [linear[1].t(), linear[1].t()[1:]], [linear[2], None]),
        "sparse_linear": (*linear, 0.3),
        "embedding": (
            nest(randn(5, 64, seed=1), Layout.BY_OUTPUTS),
            torch.tensor([[4, 0]]),
            torch.float32,
        ),
        "dense_moe": moe,
        "topk_moe": (*moe, 7),
        "experts_moe": (*moe, 2, True),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(
        getattr(sirius, name).default,
        samples()[name],
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("row", OPERATORS.values(), ids=lambda row: row.name)
def test_what_a_row_names_is_there(row: Operator) -> None:
    """Kernels on CUDA are looked for in the text: their modules import Triton."""
    assert row.reference.__name__ == row.name
    assert row.cpu is None or row.cpu.__name__ == row.name
    if row.cuda is not None:
        text = (Path(kernels.__file__).parent / "cuda" / f"{row.cuda}.py").read_text()
        assert f"\ndef {'keeping' if row.keeps else row.name}(" in text
    if row.onnx is not None:
        translation = getattr(import_module(f"sirius_compile.onnx.{row.onnx}"), row.name)
        assert len(signature(translation).parameters) - 1 == len(row.overload._schema.arguments)
    if row.dense is not None:
        found = row.reference(*samples()[row.name])
        y = found[0] if isinstance(found, tuple) else found
        assert row.dense(*samples()[row.name]).shape == y.shape
    if row.scores is not None:  # of each token, compared with the last argument
        assert row.overload._schema.arguments[-1].name in ("threshold", "keep")
        assert row.scores(*samples()[row.name]).ndim == (2 if row.name == "topk_moe" else 3)


def test_every_operator_is_checked() -> None:
    registered = {
        name.removeprefix("sirius::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sirius::")
    }
    assert registered == samples().keys()
