"""Linears, linears that skip input channels (TEAL, arXiv 2408.14690), and embeddings.

The weight of a linear that skips channels is input-major, [C, O]: a channel is one contiguous row,
which is not read if the channel is skipped. The reference computes every channel and masks. Weights
may be nested, by inputs for linears that skip: see `sirius_runtime.nested`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sirius_runtime import nested
from sirius_runtime.graph_rules import Array, made, need
from sirius_runtime.graph_sizes import Size
from sirius_runtime.nested import Layout, is_nested
from sirius_runtime.ops.products import product
from sirius_runtime.ops.rules import (
    counts,
    need_dtype,
    need_finite,
    need_matrix,
    need_model,
    need_shape,
    need_some,
    tokens,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C], weight [O, C] or nested in either layout, bias [O]; returns [..., O].

    Graphs use ``aten.linear`` for weights that are not nested. On the CPU, the eager back end
    replaces it by the kernel of this operator.
    """
    return nested.product(x, weight, bias) if is_nested(weight) else product(x, weight, bias)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`linear` of one x with each weight and bias.

    Graphs of artifacts do not use it. `backends.rewrite` joins linears of the same input (such as
    the queries, keys and values of a layer) to one call of its kernel.
    """
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def embedding(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [B, T], int64, of a nested weight [V, C] by outputs: [B, T, C] in `dtype`.

    Graphs use ``aten.embedding`` for weights that are not nested.
    """
    rows = weight.index_select(1, ids.flatten())
    return nested.unnest(rows, dtype).unflatten(0, ids.shape)


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """A linear over the input channels of each row whose |x|, averaged over the call's T tokens, is
    above `threshold` (TEAL).

    x [B, T, C]; weight [C, O], or nested by inputs; bias [O]. Returns y [B, T, O] and the number of
    kept channels, int64 [B]. The beams of a tree share their channels: with a choice for each beam,
    the union would soon be all channels.
    """
    kept = x.float().abs().mean(1, keepdim=True) > threshold
    if is_nested(weight):
        return nested.product(x * kept, weight, bias), kept.sum((1, 2))
    return product(x * kept, weight.mT, bias), kept.sum((1, 2))


def all_channels(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    """The first result of `sparse_linear` if no channel were skipped."""
    return linear(x, weight if is_nested(weight) else weight.mT, bias)


def channel_scores(x: Tensor, *_: object) -> Tensor:
    """The values [B, T, C] that `sparse_linear` compares with its threshold, for each token."""
    return x.float().abs()


def outputs_of(weight: Tensor) -> int:
    """The outputs O of a weight [O, C], which may be nested."""
    return nested.matrix_shape(tuple(weight.shape))[0] if is_nested(weight) else weight.shape[0]


def fake_sparse_linear(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    outputs = outputs_of(weight if is_nested(weight) else weight.mT)
    return x.new_empty(*x.shape[:-1], outputs), x.new_empty(x.shape[0], dtype=torch.int64)


def fake_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs_of(weight))


def fake_linears(x: Tensor, weights: Sequence[Tensor], _: object) -> list[Tensor]:
    return [fake_linear(x, weight) for weight in weights]


def fake_embedding(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    columns = nested.matrix_shape(tuple(weight.shape))[1]
    return weight.new_empty(*ids.shape, columns, dtype=dtype)


def _need_product(x: Array, weight: Array, layout: Layout, bias: Array | None) -> Size:
    """The number of outputs; checks that x and the weight can be multiplied."""
    need_model(x=x, bias=bias)
    O, C = need_matrix("weight", weight, layout, x.dtype)  # noqa: E741
    need_some(x=x, weight=weight)
    need(x.shape[-1:] == (C,), f"x {x} and weight {weight} can't be multiplied")
    need_shape("bias", bias, O)
    return O


def linear_rule(x: Array, weight: Array, bias: Array | None = None) -> Array:
    layout = Layout.BY_INPUTS if len(weight.shape) == 4 else Layout.BY_OUTPUTS
    return made(x.dtype, (*x.shape[:-1], _need_product(x, weight, layout, bias)))


def embedding_rule(weight: Array, ids: Array, dtype: torch.dtype) -> Array:
    need_dtype(torch.uint8, weight=weight)
    need_dtype(torch.int64, ids=ids)
    _, C = need_matrix("weight", weight, Layout.BY_OUTPUTS, dtype)
    need(dtype.is_floating_point, f"the dtype must be floating point, found {dtype}")
    return made(dtype, (*ids.shape, C))


def sparse_linear_rule(
    x: Array, weight: Array, bias: Array | None, threshold: float
) -> tuple[Array, Array]:
    B, T = tokens(x)
    O = _need_product(x, weight, Layout.BY_INPUTS, bias)  # noqa: E741
    need_finite(threshold=threshold)
    return made(x.dtype, (B, T, O)), counts(x)
