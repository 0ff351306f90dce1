"""Chooses what the sparse path keeps: the kept share, the dense layers and the thresholds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sirius_compile.acceptance import (
    LEAST_DRAFTS,
    MOST_DRAFTS,
    Drafts,
    acceptance_spec,
    measure_drafts,
)
from sirius_compile.allocation import LEAST_KEPT
from sirius_compile.calibration import Activations, Calibration, calibrate, read_activations
from sirius_compile.config import DEFAULT_KEEP, CompileConfig, DenseLayers
from sirius_compile.pipeline import Thresholds, lay_out, sparsify
from sirius_compile.product import Compiled, SparsePath
from sirius_compile.ranking import LayerAgreement, rank_layers
from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.watch import Watch, unwatched
from sirius_compile.writing import Text
from sirius_passes.manager import run_passes
from sirius_passes.nest_weights import NestWeights
from sirius_passes.program import FULL, PREFILL, SPARSE, Program, copy_program
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ConfigError
from sirius_runtime.graph import to_document
from sirius_runtime.spec import AcceptanceSpec, Layout, Method, WeightSpec

LEAST_KEEP = 0.01  # the smallest share that `--density` tries
CLOSE = 5e-4  # difference in density that the search for `--density` accepts


class Chooser:
    """Applies passes to copies of a dense product, and runs the copies on text."""

    def __init__(
        self,
        config: CompileConfig,
        dense: Compiled,
        text: Callable[[Tokenwise, bool], tuple[Text, Text]],
        device: torch.device,
        watch: Watch = unwatched,
    ) -> None:
        """`text(path, held_only)` gives the calibration text and the held-out text. It is called
        only if text is needed. `path` is a program that keeps all units and can write the text;
        `held_only`: only the held-out text is needed. `device`: the device that programs run on.
        """
        self._config, self._dense, self._program = config, dense, dense.program
        self._method = Method(config.sparsity)
        self._text, self._device, self._watch = text, device, watch
        bits = config.nested_bits
        self._nest = None if bits is None else NestWeights(bits)
        self._whole = None if bits is None else NestWeights(8)  # the sparse path reads both planes
        self._loaded: dict[tuple[str, Layout | None], tuple[bool, Tensor]] = {}
        self._activations: Activations | None = None  # of `drafts`

    def choose(self) -> SparsePath:
        """The chosen sparse path. Raises ConfigError, CalibrationError or UnsupportedModelError."""
        dense = DenseLayers.read(self._config.dense_layers)
        if self._method is not Method.NONE:
            dense.check(self._program.state.layers)
        fixed = self._fixed
        # The density hardly depends on which layers stay dense, because layers are alike.
        keep = self._keep(fixed or range(dense.auto))
        calibrated = self._method.has_thresholds
        measured = self._config.measure and self._config.drafts
        if not (calibrated or dense.auto or measured):
            return SparsePath(keep, fixed, None, ())
        chosen = SparsePath(keep, fixed, None, ())
        if not (calibrated or dense.auto):  # the path that writes the text is the one measured
            path = self._path(self._try(keep, fixed, None), nest=self._nest)
            return replace(chosen, acceptance=self._measure(path, self._text(path, True)[1]))
        # With nested weights, both planes are read to write the text and to choose thresholds on
        # it. Products of many tokens are faster so. And with the high plane alone, errors would
        # accumulate over a long text, as they do not over a short draft.
        path = self._path(self._try(keep, fixed, None), nest=self._whole)
        used, held = self._text(path, False)
        if calibrated:
            chosen = replace(chosen, calibration=calibrate(path, used, held, keep, self._watch))
        if dense.auto:
            chosen = self._leave_dense(dense.auto, chosen, used, held)
        if not measured:
            return chosen
        path = self._path(
            self._try(chosen.keep, chosen.dense_layers, chosen.thresholds), nest=self._nest
        )
        return replace(chosen, acceptance=self._measure(path, held))

    def texts(self, keep: float, held_only: bool) -> tuple[Text, Text]:
        """The calibration text and the held-out text, for several calls of `drafts`."""
        path = self._path(self._try(keep, self._fixed, None), nest=self._whole)
        return self._text(path, held_only)

    def kept(self, keep: float) -> tuple[float, ...]:
        """The number of units that each site keeps if the share is `keep`."""
        program = self._try(keep, self._fixed, None)
        return tuple(site.kept for site in program.sparsity.sites)

    def drafts(self, keep: float, used: Text, held: Text) -> Drafts | None:
        """The drafts with the kept share `keep` on `held`, with thresholds from `used`. None if
        there are too few.
        """
        thresholds = None
        if self._method.has_thresholds:
            path = self._path(self._try(keep, self._fixed, None), nest=self._whole)
            # Thresholds among a prompt's neurons depend on which neurons it keeps.
            if self._activations is None or self._method.per_prompt:
                self._activations = read_activations(path, used, held, self._watch)
            found = calibrate(path, used, held, keep, self._watch, self._activations)
            thresholds = found.thresholds
        path = self._path(self._try(keep, self._fixed, thresholds), nest=self._nest)
        return self._drafts(path, held)

    @property
    def _fixed(self) -> tuple[int, ...]:
        """The layers that the options leave dense by their numbers."""
        return tuple(sorted(set(DenseLayers.read(self._config.dense_layers).fixed)))

    def _leave_dense(self, layers: int, chosen: SparsePath, used: Text, held: Text) -> SparsePath:
        """The choice, with the `layers` costliest layers dense, and calibrated for the others."""
        calibration = chosen.calibration
        ranking = self._rank(chosen.keep, calibration, [*used.samples, *held.samples])
        costly = tuple(sorted(one.layer for one in ranking[:layers]))
        keep = self._keep(costly)
        if calibration is not None:
            if keep != chosen.keep:
                path = self._path(self._try(keep, costly, None), nest=self._whole)
                calibration = calibrate(path, used, held, keep, self._watch)
            else:
                calibration = calibration.only(self._others(costly))
        return SparsePath(keep, costly, calibration, ranking)

    def _measure(self, path: Tokenwise, held: Text) -> AcceptanceSpec | None:
        """The measured acceptance of the path's drafts. None if there are too few drafts."""
        drafts = self._drafts(path, held)
        return None if drafts is None else acceptance_of(drafts, self._config)

    def _drafts(self, path: Tokenwise, held: Text) -> Drafts | None:
        """The path's drafts on the held-out text. None if there are too few."""
        found = measure_drafts(
            path,
            held,
            threshold=self._config.threshold,
            temperature=self._config.verify_temperature,
            most=MOST_DRAFTS,
            watch=self._watch,
        )
        return None if found is None or len(found.texts) < LEAST_DRAFTS else found

    def _keep(self, dense_layers: Collection[int]) -> float:
        config = self._config
        if config.density is None:
            assert not isinstance(config.keep, str)  # a search has replaced `auto`
            return DEFAULT_KEEP if config.keep is None else config.keep
        return keep_for_density(
            config.density,
            lambda keep: self._density(keep, dense_layers),
            self._method,
        )

    def _density(self, keep: float, dense_layers: Collection[int]) -> float:
        program = self._try(keep, dense_layers, None)
        if self._nest is not None:
            run_passes(program, lay_out(self._nest))
        return program.sparsity.density

    def _rank(
        self, keep: float, calibration: Calibration | None, samples: Sequence[Sample]
    ) -> tuple[LayerAgreement, ...]:
        thresholds = None if calibration is None else calibration.thresholds
        return rank_layers(self._path(self._try(keep, (), thresholds)), samples)

    def _others(self, layers: Collection[int]) -> list[int]:
        return [layer for layer in range(self._program.state.layers) if layer not in layers]

    def _try(
        self, keep: float, dense_layers: Collection[int], thresholds: Thresholds | None
    ) -> Program:
        program = copy_program(self._program)
        run_passes(program, sparsify(self._method, keep, thresholds, dense_layers))
        return program

    def _path(self, program: Program, nest: NestWeights | None = None) -> Tokenwise:
        """The program, ready to run over whole texts. Its weights are laid out for the kernels.

        If only linears are sparse, weights stay as in the checkpoint: linears read either layout,
        and this saves a copy. `nest`: the pass that nests the weights, if any.
        """
        if not self._method.skips_channels or self._method.rewrites_mlps or nest is not None:
            run_passes(program, lay_out(nest))
        return Tokenwise(
            self._dense.spec_of(program),
            {name: to_document(program.graphs[name]) for name in (PREFILL, SPARSE, FULL)},
            {name: self._weight(spec) for name, spec in program.weights.items()},
            dtype=dtype_of(self._dense.spec.model.dtype),
            device=self._device,
        )

    def _weight(self, spec: WeightSpec) -> Tensor:
        """A weight. All programs share one copy; programs with the other layout transpose it."""
        key = spec.name, spec.nested
        if key not in self._loaded:
            self._loaded[key] = (spec.transposed, self._dense.weights(spec))
        transposed, weight = self._loaded[key]
        return weight if spec.nested or transposed == spec.transposed else weight.mT


def acceptance_of(drafts: Drafts, config: CompileConfig) -> AcceptanceSpec:
    """The acceptance of drafts, with the best of the periods and confidences that options allow."""
    return acceptance_spec(
        drafts,
        threshold=config.threshold,
        temperature=config.verify_temperature,
        periods=None if config.period is None else [config.period],
        confidences=None if config.confidence is None else [config.confidence],
    )


def keep_for_density(density: float, density_of: Callable[[float], float], method: Method) -> float:
    """The kept share whose density is nearest to `density`.

    Searches by interpolation, because density is almost linear in the kept share. Raises
    ConfigError if even the method's lowest density is above `density`.
    """
    low, high = LEAST_KEPT if method.skips_channels else LEAST_KEEP, 1.0
    least = low
    at_low, at_high = density_of(low), density_of(high)
    if density < at_low - CLOSE:
        raise ConfigError(
            f"--density {density:g} can't be reached by --sparsity {method}: with {low:.0%} kept "
            f"it still reads {at_low:.3f} of the weights. Give a higher --density, or another "
            f"--sparsity ({Method.GRIFFIN_TEAL} has the lowest)"
        )
    for _ in range(20):
        if at_high - at_low < 1e-12:
            break
        middle = low + (density - at_low) / (at_high - at_low) * (high - low)
        middle = min(max(middle, least), 1.0)
        at_middle = density_of(middle)
        if abs(at_middle - density) < CLOSE:
            return middle
        if at_middle < density:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    # The number of kept neurons is an integer, so some densities are never hit: take the nearer.
    return low if density - at_low <= at_high - density else high
