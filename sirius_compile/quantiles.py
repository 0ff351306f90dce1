"""Quantiles of activations that are too many to store."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.errors import CalibrationError


class QuantileSketch:
    """Quantiles of non-negative values per site, from a histogram of their float32 bit patterns.

    Bit patterns of non-negative floats are ordered like the values. The 17 bits after the sign are
    the bin number; a bin has a relative width of 2^-9. This takes one pass over the values and 1 MB
    a site.
    """

    _DROPPED_BITS = 14
    _BINS = 1 << (31 - _DROPPED_BITS)
    _INFINITE = 0x7F800000 >> _DROPPED_BITS  # the bin of infinity; those of NaN follow

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}
        self._totals: dict[int, Tensor] = {}  # cumulative counts, computed when needed

    @property
    def sites(self) -> list[int]:
        """The sites that have values, in order."""
        return sorted(self._counts)

    def add(self, site: int, values: Tensor) -> None:
        """Counts `values` of any shape. Raises CalibrationError if one is not finite."""
        values = values.detach().float().flatten().cpu()
        bins = (values.view(torch.int32) & 0x7FFFFFFF) >> self._DROPPED_BITS
        counts = torch.bincount(bins, minlength=self._BINS)
        if int(counts[self._INFINITE :].sum()):
            raise CalibrationError(
                "activations are not finite on the calibration text: the weights are damaged, or "
                "exceed the range of their dtype. Try --dtype float32"
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
        """The share of the site's values in bins above the bin of `threshold`."""
        if threshold < 0.0:
            return 1.0
        index = int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32))
        counts = self._counts[site]
        return float(counts[(index >> self._DROPPED_BITS) + 1 :].sum()) / float(counts.sum())
