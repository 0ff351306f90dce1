"""How a period runs, and what a back end's compiled period can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sirius_runtime.sampling import Rule, Sampling, check_threshold

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sirius_runtime.drafting import Proposer
    from sirius_runtime.policy import Acceptance, Noise


@dataclass(frozen=True)
class Plan:
    """A draft of at most `size` - 1 levels (K - 1) of `width` nodes, and how it is accepted.

    `threshold` and `verify_temperature`: of `Rule.THRESHOLD`; the temperature also scores drafts.
    `confidence` in [0, 1]: the probability below which a row's draft stops (0: never). `sampling`
    and `noise` [B, 2, >= K] float64, uniform in [0, 1): of `Rule.SAMPLE`.

    Raises ConfigError for a value out of its range.
    """

    size: int
    width: int = 1
    rule: Rule = Rule.THRESHOLD
    threshold: float = 0.1
    verify_temperature: float = 0.6
    confidence: float = 0.0
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold, self.verify_temperature)

    @property
    def draws(self) -> bool:
        """Whether drafted tokens are drawn: a chain's, where sampling; a tree's are the best."""
        return self.rule is Rule.SAMPLE and self.width == 1

    @property
    def proposer(self) -> Proposer:
        from sirius_runtime.drafting import BeamProposer, SampleProposer

        if not self.draws:
            return BeamProposer(self.verify_temperature)
        return SampleProposer(self.sampling, self._noise, self.verify_temperature)

    @property
    def acceptance(self) -> Acceptance:
        from sirius_runtime.policy import ExactAcceptance, SampleAcceptance, ThresholdAcceptance

        match self.rule:
            case Rule.THRESHOLD:
                return ThresholdAcceptance(self.threshold, self.verify_temperature)
            case Rule.EXACT:
                return ExactAcceptance()
            case Rule.SAMPLE:
                return SampleAcceptance(self.sampling, self._noise)

    @property
    def _noise(self) -> Noise:
        from sirius_runtime.policy import Noise

        assert self.noise is not None, "sampling needs noise"
        return Noise.unpack(self.noise)

    def numbers(self) -> dict[str, int | float]:
        """The plan as the inputs of the entry `period`, all but the noise."""
        return {
            "rule": int(self.rule),
            "threshold": self.threshold,
            "verify_temperature": self.verify_temperature,
            "confidence": self.confidence,
            **sampling_numbers(self.sampling),
        }

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """`numbers` as tensors, of the dtypes that the graph has."""
        import torch

        return {
            name: torch.tensor(
                value, dtype=torch.int64 if name in INTEGERS else torch.float32, device=device
            )
            for name, value in self.numbers().items()
        }


INTEGERS = ("rule", "top_k")
"""The numbers of a plan that are int64 in the graph; the others are float32."""


def sampling_numbers(sampling: Sampling) -> dict[str, int | float]:
    """A `Sampling` of plain numbers as inputs of a graph."""
    return {
        "temperature": float(sampling.temperature),
        "top_k": int(sampling.top_k),
        "top_p": float(sampling.top_p),
    }


@dataclass(frozen=True)
class Limits:
    """What a whole period that was compiled as one graph can take; None where anything goes."""

    period: int
    tree_width: int
    rows: int | None = None
    context: int | None = None  # tokens of a row, prompt and answer
