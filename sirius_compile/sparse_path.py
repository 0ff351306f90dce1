"""What the sparse path keeps: the share, the layers left dense and the thresholds, before its
passes run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from sirius_compile.allocation import LEAST_KEPT
from sirius_compile.calibration import Calibration, calibrate
from sirius_compile.config import DEFAULT_KEEP, CompileConfig, DenseLayers
from sirius_compile.pipeline import Thresholds, sparsify
from sirius_compile.product import Compiled, SparsePath
from sirius_compile.ranking import LayerAgreement, rank_layers
from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Tokenwise
from sirius_passes.manager import run_passes
from sirius_passes.program import FULL, PREFILL, SPARSE, Program, copy_program
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ConfigError
from sirius_runtime.graph import to_document
from sirius_runtime.spec import Method

LEAST_KEEP = 0.01  # the smallest share that `--density` tries
CLOSE = 5e-4  # in density


class Chooser:
    """Tries passes on copies of a product that is dense yet, and runs what comes out on text."""

    def __init__(
        self,
        config: CompileConfig,
        dense: Compiled,
        samples: Callable[[], Sequence[Sample]],
        device: torch.device,
    ) -> None:
        """`samples` gives the text, where any is needed; `device` reads it."""
        self._config, self._dense, self._program = config, dense, dense.program
        self._method = Method(config.sparsity)
        self._samples, self._device = samples, device
        self._loaded: dict[str, Tensor] = {}

    def choose(self) -> SparsePath:
        """Raises ConfigError, CalibrationError or UnsupportedModelError, naming the reason."""
        dense = DenseLayers.read(self._config.dense_layers)
        if self._method is not Method.NONE:
            dense.check(self._program.state.layers)
        fixed = tuple(sorted(set(dense.fixed)))
        # Which layers stay dense hardly matters to the density: they are alike.
        keep = self._keep(fixed or range(dense.auto))
        calibrated = self._method.has_thresholds
        samples = self._samples() if calibrated or dense.auto else ()
        calibration = self._calibrate(keep, fixed, samples) if calibrated else None
        if not dense.auto:
            return SparsePath(keep, fixed, calibration, ())
        ranking = self._rank(keep, calibration, samples)
        costly = tuple(sorted(one.layer for one in ranking[: dense.auto]))
        exact = self._keep(costly)
        if exact != keep:
            keep, calibration = exact, calibration and self._calibrate(exact, costly, samples)
        elif calibration is not None:
            calibration = calibration.only(self._others(costly))
        return SparsePath(keep, costly, calibration, ranking)

    def _keep(self, dense_layers: Collection[int]) -> float:
        config = self._config
        if config.density is None:
            return DEFAULT_KEEP if config.keep is None else config.keep
        return keep_for_density(
            config.density,
            lambda keep: self._try(keep, dense_layers, None).sparsity.density,
            self._method,
        )

    def _calibrate(
        self, keep: float, dense_layers: Collection[int], samples: Sequence[Sample]
    ) -> Calibration:
        return calibrate(self._path(self._try(keep, dense_layers, None)), samples, keep)

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

    def _path(self, program: Program) -> Tokenwise:
        for name, spec in program.weights.items():
            if name not in self._loaded:
                self._loaded[name] = self._dense.weights(spec)
        return Tokenwise(
            self._dense.spec_of(program),
            {name: to_document(program.graphs[name]) for name in (PREFILL, SPARSE, FULL)},
            self._loaded,
            dtype=dtype_of(self._dense.spec.model.dtype),
            device=self._device,
        )


def keep_for_density(density: float, density_of: Callable[[float], float], method: Method) -> float:
    """The kept share whose density is nearest to the one asked for, by interpolation: density grows
    with the share, nearly in a line.

    Raises ConfigError where the method reads more than that whatever it keeps.
    """
    low, high = LEAST_KEPT if Method.TEAL in method else LEAST_KEEP, 1.0
    least = low
    at_low, at_high = density_of(low), density_of(high)
    if density < at_low - CLOSE:
        raise ConfigError(
            f"--density {density:g} can't be reached by --sparsity {method}: with {low:.0%} kept "
            f"it still reads {at_low:.3f} of the weights. Ask for more, or use another --sparsity "
            f"({Method.GRIFFIN_TEAL} reaches lowest)"
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
    # Whole neurons only: the nearer of the two that are left.
    return low if density - at_low <= at_high - density else high
