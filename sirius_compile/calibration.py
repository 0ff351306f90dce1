"""Calibration: the thresholds of the sparse path, as quantiles of activations over text.

The report gives the share that the thresholds keep on held-out text. On the calibration text itself
they keep the share asked for by construction.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from sirius_compile.allocation import allocate
from sirius_compile.pipeline import Thresholds
from sirius_compile.quantiles import QuantileSketch
from sirius_compile.texts import check_amount
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.watch import Watch, each, unwatched
from sirius_compile.writing import Text, observe
from sirius_passes.sparsify import KEEP_ALL, Threshold
from sirius_runtime.errors import CalibrationError
from sirius_runtime.spec import SiteSpec

FAR = 0.1  # a threshold whose share is further than this from the one asked for is refused


@dataclass(frozen=True)
class SiteReport:
    """The threshold of one site.

    `linear`: whether the site's units are a linear's input channels; else they are neurons.
    `target`: the share of units asked for; `reached`: the share kept on the held-out text.
    """

    layer: int
    weight: str
    linear: bool
    target: float
    threshold: float
    reached: float


@dataclass(frozen=True)
class Calibration:
    """The result of calibration. `tokens`: in the calibration text; `held_out`: held-out tokens."""

    tokens: int
    held_out: int
    sites: tuple[SiteReport, ...]

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds in the form that the passes take."""
        return Thresholds(
            tuple(Threshold(s.threshold, s.target) for s in self.sites if not s.linear),
            tuple(Threshold(s.threshold, s.target) for s in self.sites if s.linear),
        )

    def only(self, layers: Collection[int]) -> Calibration:
        """This calibration, without the sites of other layers."""
        return replace(self, sites=tuple(s for s in self.sites if s.layer in layers))


@dataclass(frozen=True)
class Activations:
    """The quantiles of each site's activations on the calibration text and on the held-out text."""

    used: QuantileSketch
    held: QuantileSketch


def read_activations(
    path: Tokenwise, used: Text, held: Text, watch: Watch = unwatched
) -> Activations:
    """The activations at the counted sites of `path`, which must keep all units.

    Raises CalibrationError if there is too little text.
    """
    check_amount(len(used) + len(held))
    found = Activations(QuantileSketch(), QuantileSketch())
    parts = [(found.used, used, rows) for rows in used.parts()]
    parts += [(found.held, held, rows) for rows in held.parts()]
    for into, text, rows in each(watch, "read activations", parts):
        observe(path, text, rows, into.add)
    return found


def calibrate(
    path: Tokenwise,
    used: Text,
    held: Text,
    keep: float,
    watch: Watch = unwatched,
    activations: Activations | None = None,
) -> Calibration:
    """Thresholds for the counted sites of `path`, which must keep all units. MLPs keep the share
    `keep` of their neurons. A layer's sparsity is divided among its linears (`allocation`).
    `activations`: by default, those of `path` on the texts.

    Raises CalibrationError if there is too little text, or if no threshold of a site keeps about
    the share asked for.
    """
    if activations is None:
        activations = read_activations(path, used, held, watch)
    sketch, check = activations.used, activations.held
    sites = path.spec.sparsity.counted
    linears = [node.target is torch.ops.sirius.sparse_linear.default for node in path.counted]
    shares = allocate(path, used, sketch, keep, watch) if any(linears) else [keep] * len(sites)
    thresholds = [
        KEEP_ALL if share == 1.0 else sketch.quantile(site, 1.0 - share)
        for site, share in enumerate(shares)
    ]
    for index, site in enumerate(sites):
        _check(site, shares[index], thresholds[index], sketch.share_above(index, thresholds[index]))
    return Calibration(
        tokens=len(used),
        held_out=len(held),
        sites=tuple(
            SiteReport(
                site.layer,
                site.weight,
                linears[index],
                shares[index],
                thresholds[index],
                check.share_above(index, thresholds[index]),
            )
            for index, site in enumerate(sites)
        ),
    )


def _check(site: SiteSpec, wanted: float, threshold: float, reached: float) -> None:
    where = f"layer {site.layer}, {site.weight}"
    # A threshold near 0 drops units that are 0 anyway (ReLU), which loses nothing.
    zeros = threshold < torch.finfo(torch.float32).tiny
    if abs(reached - wanted) > FAR and not (zeros and 0.0 < reached < wanted):
        raise CalibrationError(
            f"{where}: no threshold keeps {wanted:.0%} on this text (the nearest keeps "
            f"{reached:.0%}), because its activations are almost constant. Give other text with "
            "--calibration, or keep the layer dense with --dense-layers"
        )
