"""Whether counts look like a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL = 1e-4  # a p-value below it says no; seeds are fixed, so that the answer is too


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square test: how likely are counts as far off as these, or farther.

    0 where something was counted that has no probability. Cells that expect fewer than five counts
    are one cell, as the test asks.
    """
    counts, probabilities = counts.flatten().double(), probabilities.flatten().double()
    probabilities = probabilities / probabilities.sum()
    if counts[probabilities == 0].any():
        return 0.0
    expected = counts.sum() * probabilities
    few = expected < 5
    observed = torch.cat([counts[~few], counts[few].sum()[None]])
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    assert freedom > 0, "one cell always fits"
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
