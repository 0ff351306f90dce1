"""Copies of the rows of an MLP's weights that belong to a prompt's neurons (GRIFFIN).

    the weight, of I neurons           its rows of K neurons
    [I, C]                             [K, C]
    nested by outputs [1, I, R]        [1, K, R]
    nested by inputs [1, I/32, 34, R]  [1, K + I/16, R]: of each 32 neurons the two rows of scales,
                                       then the rows of the neurons among them

Neurons are in ascending order. Only single planes of nested weights are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.nested import GROUP, is_nested
from sirius_runtime.ops.operands import Mlp

_SCALES = 2  # rows of scales in each group of a weight by inputs


def chosen_shape(shape: Sequence[int], kept: int) -> tuple[int, ...]:
    """The shape of the copy, for a weight of this shape and `kept` neurons."""
    if len(shape) == 4:
        return (1, kept + _SCALES * shape[1], shape[3])
    return (*shape[:-2], kept, shape[-1])


def copy_rows(weight: Tensor, neurons: Tensor, into: Tensor) -> None:
    """Copies the rows of `neurons` [K] to `into`."""
    torch.index_select(_rows(weight), 0, _index(weight.shape, neurons), out=_rows(into))


def spread(chosen: Tensor, shape: Sequence[int], neurons: Tensor) -> Tensor:
    """A weight of this shape from its copied rows. The other rows are zeros."""
    weight = chosen.new_zeros(shape)
    _rows(weight).index_copy_(0, _index(shape, neurons), _rows(chosen))
    return weight


def spreading(call: Callable[..., Any], total: int) -> Callable[..., Any]:
    """`call`, an MLP that keeps the prompt's neurons, where some weights are copies of those rows.
    total: I. All rows of a call must have chosen the same neurons.
    """

    def run(x: Tensor, *own: Any) -> Any:
        mlp = Mlp(*own[: len(Mlp._fields)])
        neurons = own[len(mlp)][mlp.layer][0]
        gate, up = (whole(weight, total, neurons) for weight in (mlp.gate, mlp.up))
        down = whole(mlp.down, total, neurons, by_inputs=True)
        return call(x, *mlp._replace(gate=gate, up=up, down=down), *own[len(mlp) :])

    return run


def whole(weight: Tensor | None, total: int, neurons: Tensor, *, by_inputs: bool = False) -> Any:
    """The weight of `total` neurons, which is either given or spread from its rows. by_inputs: if
    it is nested, it is by inputs.
    """
    if weight is None or not is_chosen(weight, total, by_inputs=by_inputs):
        return weight
    shape = (*weight.shape[:-2], total, weight.shape[-1])
    if by_inputs and is_nested(weight):
        shape = (1, total // GROUP, GROUP + _SCALES, weight.shape[-1])
    return spread(weight, shape, neurons)


def is_chosen(weight: Tensor, total: int, *, by_inputs: bool = False) -> bool:
    """Whether it is a copy of rows; as for `whole`."""
    if by_inputs and is_nested(weight):
        return weight.ndim == 3
    return weight.shape[-2] != total


def _rows(weight: Tensor) -> Tensor:
    """The rows of a weight, or of a copy, as a matrix."""
    return weight.view(-1, weight.shape[-1])


def _index(shape: Sequence[int], neurons: Tensor) -> Tensor:
    """The indices of the rows that are copied, in their order in the copy."""
    if len(shape) != 4:
        return neurons
    groups = shape[1]
    kept = neurons.new_zeros(groups * GROUP, dtype=torch.bool)
    kept[neurons] = True
    scales = kept.new_ones(groups, _SCALES)
    group, place = torch.cat([scales, kept.view(groups, GROUP)], 1).nonzero(as_tuple=True)
    return group * (GROUP + _SCALES) + (place + GROUP) % (GROUP + _SCALES)  # stored behind
