"""Quantiles of what is too much to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.errors import CalibrationError


class QuantileSketch:
    """Quantiles of non-negative values per site, from a histogram of their float32 bit patterns.

    The patterns of non-negative floats are in the order of the values, so the leading 17 bits below
    the sign are bins of a relative width of 2^-9: exact counts, one pass, a megabyte a site.
    """

    _DROPPED_BITS = 14
    _BINS = 1 << (31 - _DROPPED_BITS)
    _INFINITE = 0x7F800000 >> _DROPPED_BITS  # the bin of infinity; after it come those of NaN

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}
        self._totals: dict[int, Tensor] = {}  # up to each bin, once they are asked for

    @property
    def sites(self) -> list[int]:
        """The sites that have values, in order."""
        return sorted(self._counts)

    def add(self, site: int, values: Tensor) -> None:
        """Counts `values`, any shape; raises CalibrationError where one is not finite."""
        values = values.detach().float().flatten().cpu()
        bins = (values.view(torch.int32) & 0x7FFFFFFF) >> self._DROPPED_BITS
        counts = torch.bincount(bins, minlength=self._BINS)
        if int(counts[self._INFINITE :].sum()):
            raise CalibrationError(
                "activations are not finite on the calibration text; the weights or their dtype "
                "are broken (try --dtype float32)"
            )
        self._counts[site] = self._counts.get(site, 0) + counts
        self._totals.pop(site, None)

    def quantile(self, site: int, share: float) -> float:
        """The smallest bin edge with at least `share` of the site's values at or below it."""
        if site not in self._totals:
            self._totals[site] = self._counts[site].cumsum(0).double()
        totals = self._totals[site]
        index = int(torch.searchsorted(totals, share * totals[-1]))
        edge = ((index + 1) << self._DROPPED_BITS) - 1
        return float(torch.tensor(edge, dtype=torch.int32).view(torch.float32))

    def share_above(self, site: int, threshold: float) -> float:
        """Share of the site's values in the bins above `threshold`'s."""
        if threshold < 0.0:
            return 1.0
        index = int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32))
        counts = self._counts[site]
        return float(counts[(index >> self._DROPPED_BITS) + 1 :].sum()) / float(counts.sum())
