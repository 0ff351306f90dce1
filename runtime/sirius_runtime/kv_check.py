"""Checks that the K/V caches equal those of a dense run over the committed tokens.

The full path rewrites the K/V of each token that it verifies, so that all committed history holds
the full path's K/V (Sirius, arXiv 2409.03856, section 4). A slot that differs shows a bug: a missed
write, or a compaction that moved the wrong node.

Shape letters: `L` layers, `P` slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.spec import to_json
from sirius_runtime.state import State

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Tolerance of a slot's K or V: the norm of its difference over all heads, divided by the root mean
square of that norm over the layer's slots. It is not 0, because a prefill rounds differently from a
period.
"""
SHOWN = 20


@dataclass(frozen=True)
class CacheDifference:
    """The K or V (`tensor`) of a layer's slot, and its relative difference from the dense run's
    (`size`, as `TOLERANCES` defines it).
    """

    layer: int
    slot: int
    tensor: str
    size: float


@dataclass(frozen=True)
class CacheCheck:
    """slots: the number of committed tokens' slots; largest: the largest difference, within
    tolerance or not; inconsistent: how many exceed the tolerance; differences: the largest of
    those, at most `SHOWN`.
    """

    layers: int
    slots: int
    tolerance: float
    largest: CacheDifference
    inconsistent: int
    differences: tuple[CacheDifference, ...]

    def record(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        fields = to_json(self)
        assert isinstance(fields, dict)
        return fields


def check_kv(state: State, fresh: State, tokens: Sequence[int]) -> CacheCheck:
    """Compares the first row's caches with those that a prefill of `tokens` writes to `fresh`."""
    with state.computing():
        assert int(state.length[0]) == len(tokens)
        fresh.prefill([tokens])
        names = ("k", "v")
        pairs = zip(state.first_kv(len(tokens)), fresh.first_kv(len(tokens)), strict=True)
        sizes = torch.stack([_sizes(*pair) for pair in pairs])  # [2, L, P]
        values, order = sizes.flatten().sort(descending=True)
        tolerance = TOLERANCES[fresh.first_kv(1)[0].dtype]
        _, L, P = sizes.shape

        def difference(place: int) -> CacheDifference:
            at, size = int(order[place]), float(values[place])
            return CacheDifference(at // P % L, at % P, names[at // (L * P)], size)

        wrong = int((values > tolerance).sum())
        return CacheCheck(
            layers=L,
            slots=P,
            tolerance=tolerance,
            largest=difference(0),
            inconsistent=wrong,
            differences=tuple(difference(place) for place in range(min(wrong, SHOWN))),
        )


def _sizes(found: Tensor, dense: Tensor) -> Tensor:
    """The relative differences [L, P] of caches [L, 1, heads, P, D]; infinite where not finite."""
    found, dense = found[:, 0].float(), dense[:, 0].float()
    norms = dense.norm(dim=(1, 3))
    scale = norms.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(norms.dtype).tiny)
    sizes = (found - dense).norm(dim=(1, 3)) / scale
    return torch.where(sizes.isfinite(), sizes, float("inf"))
