"""Calibration: the thresholds of the sparse path, as quantiles of activations over text.

Some text is held out, and what the thresholds keep of it is reported: a promise that is checked on
the text that made it would always hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sirius_compile.allocation import allocate
from sirius_compile.pipeline import Thresholds
from sirius_compile.quantiles import QuantileSketch
from sirius_compile.texts import Sample, hold_out
from sirius_compile.tokenwise import Look, Tokenwise
from sirius_passes.sparsify import KEEP_ALL, Threshold
from sirius_runtime.errors import CalibrationError
from sirius_runtime.spec import SiteSpec

FAR = 0.1  # a share this far from the one asked for is none


@dataclass(frozen=True)
class SiteReport:
    """Of one site: the share of its units that was asked for, the threshold, and the share that it
    keeps of the text held out. `linear`: its units are a linear's input channels.
    """

    layer: int
    weight: str
    linear: bool
    target: float
    threshold: float
    reached: float


@dataclass(frozen=True)
class Calibration:
    """What calibration read and chose. `tokens` and `held_out`: counts of tokens."""

    tokens: int
    held_out: int
    sites: tuple[SiteReport, ...]

    @property
    def thresholds(self) -> Thresholds:
        """What the passes take."""
        return Thresholds(
            tuple(Threshold(s.threshold, s.target) for s in self.sites if not s.linear),
            tuple(Threshold(s.threshold, s.target) for s in self.sites if s.linear),
        )

    def only(self, layers: Collection[int]) -> Calibration:
        """The same of these layers alone."""
        return replace(self, sites=tuple(s for s in self.sites if s.layer in layers))


def calibrate(path: Tokenwise, samples: Sequence[Sample], keep: float) -> Calibration:
    """Thresholds of the counted sites of `path`, which keeps all of them: those of MLPs keep the
    share `keep` of their neurons, those of linears share their layer's by their error.

    Raises CalibrationError where there is too little text, or where a site's activations leave no
    threshold that keeps some units and not all.
    """
    used, held = hold_out(samples)
    sketch = QuantileSketch()
    for sample in used:
        observe(path, sample, sketch.add)
    sites = path.spec.sparsity.counted
    linears = [node.target is torch.ops.sirius.sparse_linear.default for node in path.counted]
    shares = allocate(path, used, sketch, keep) if any(linears) else [keep] * len(sites)
    thresholds = [
        KEEP_ALL if share == 1.0 else sketch.quantile(site, 1.0 - share)
        for site, share in enumerate(shares)
    ]
    for index, site in enumerate(sites):
        _check(site, shares[index], thresholds[index], sketch.share_above(index, thresholds[index]))
    reached = _shares(path, held, thresholds)
    return Calibration(
        tokens=sum(map(len, used)),
        held_out=sum(map(len, held)),
        sites=tuple(
            SiteReport(site.layer, site.weight, linear, *values)
            for site, linear, *values in zip(
                sites, linears, shares, thresholds, reached, strict=True
            )
        ),
    )


def observe(path: Tokenwise, sample: Sample, look: Look) -> None:
    """Shows the scores of a sample's tokens to `look`: those after the prompt where the prompt
    chose, else all.
    """
    ids = torch.tensor([sample.tokens])
    neurons = path.neurons(ids[:, : sample.prompt])
    first = 0 if neurons is None else min(sample.prompt, len(sample) - 1)
    path.sparse(ids, neurons, lambda site, scores: look(site, scores[:, first:]))


def _check(site: SiteSpec, wanted: float, threshold: float, reached: float) -> None:
    where = f"layer {site.layer}, {site.weight}"
    # A threshold of next to 0 drops what is 0 already (ReLU): no loss, however many they are.
    zeros = threshold < torch.finfo(torch.float32).tiny
    if abs(reached - wanted) > FAR and not (zeros and 0.0 < reached < wanted):
        raise CalibrationError(
            f"{where}: no threshold keeps {wanted:.0%} on this text (the nearest keeps "
            f"{reached:.0%}); its activations are all but constant. Give other text by "
            "--calibration, or keep the layer dense by --dense-layers"
        )


def _shares(path: Tokenwise, samples: Sequence[Sample], thresholds: Sequence[float]) -> list[float]:
    """Share of each site's units above its threshold, over the samples' tokens."""
    kept, seen = [0.0] * len(thresholds), [0] * len(thresholds)

    def look(site: int, scores: Tensor) -> None:
        kept[site] += float((scores > thresholds[site]).sum())
        seen[site] += scores.numel()

    for sample in samples:
        observe(path, sample, look)
    return [k / max(s, 1) for k, s in zip(kept, seen, strict=True)]
