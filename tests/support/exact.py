"""Numbers whose products and sums are exact in float32, and what linears and MLPs make of them.

Weights and activations are small integers times a power of two. A sum of their products is the
same number in whatever order it is added up, so that a kernel's result has one right value to the
last bit, once rounded, and a column, a channel or a neuron too many or too few is seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLAB = 1 << 24  # numbers that are handled in float32 at once


def integers(*shape: int, seed: int, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """Multiples of `unit` from -4 to 3."""
    result = torch.empty(shape, dtype=dtype)
    flat, generator = result.view(-1), torch.Generator().manual_seed(seed)
    for begin in range(0, flat.numel(), _SLAB):
        here = flat[begin : begin + _SLAB]
        words = torch.empty(here.numel() // 7 + 1, dtype=torch.int64).random_(generator=generator)
        random = words.view(torch.int8).view(-1, 8)[:, :7].reshape(-1)[: here.numel()]
        here.copy_((random & 7) - 4)
    return result.mul_(unit)


def by_outputs(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C] times the transpose of weight [O, C], in float32."""
    rows = max(1, _SLAB // weight.shape[1])
    return torch.cat([x.float() @ part.float().t() for part in weight.split(rows)], 1)


def by_inputs(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C] times weight [C, O], in float32."""
    rows = max(1, _SLAB // weight.shape[1])
    y = x.new_zeros(x.shape[0], weight.shape[1], dtype=torch.float32)
    for columns, part in zip(x.float().split(rows, 1), weight.split(rows), strict=True):
        y += columns @ part.float()
    return y


def calls(tokens: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """How many tokens a call has, and which of the sum(tokens) rows are its own."""
    begin = 0
    for count in tokens:
        yield count, slice(begin, begin + count)
        begin += count


def shared(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Each row's sum over the rows of its call, and divided by their number: [2, N, I]."""
    sums, means = torch.empty_like(scores), torch.empty_like(scores)
    for count, own in calls(tokens):
        sums[own] = scores[own].sum(0)
        means[own] = sums[own] / count
    return torch.stack([sums, means])
