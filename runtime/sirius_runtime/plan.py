"""How a period runs, and what a back end's compiled period can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sirius_runtime.drafting import BeamProposer, Proposer, SampleProposer
from sirius_runtime.policy import (
    Acceptance,
    ExactAcceptance,
    Noise,
    Rule,
    SampleAcceptance,
    Sampling,
    ThresholdAcceptance,
)


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
        ThresholdAcceptance(self.threshold, self.verify_temperature)  # checks them

    @property
    def draws(self) -> bool:
        """Whether drafted tokens are drawn: a chain's, where sampling; a tree's are the best."""
        return self.rule is Rule.SAMPLE and self.width == 1

    @property
    def proposer(self) -> Proposer:
        if not self.draws:
            return BeamProposer(self.verify_temperature)
        return SampleProposer(self.sampling, self._noise, self.verify_temperature)

    @property
    def acceptance(self) -> Acceptance:
        match self.rule:
            case Rule.THRESHOLD:
                return ThresholdAcceptance(self.threshold, self.verify_temperature)
            case Rule.EXACT:
                return ExactAcceptance()
            case Rule.SAMPLE:
                return SampleAcceptance(self.sampling, self._noise)

    @property
    def _noise(self) -> Noise:
        assert self.noise is not None, "sampling needs noise"
        return Noise.unpack(self.noise)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The plan as the inputs of the entry `period`, all but the noise."""

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        numbers = {
            "threshold": self.threshold,
            "verify_temperature": self.verify_temperature,
            "confidence": self.confidence,
            "temperature": float(self.sampling.temperature),
            "top_p": float(self.sampling.top_p),
        }
        return {
            "rule": scalar(self.rule, torch.int64),
            "top_k": scalar(int(self.sampling.top_k), torch.int64),
            **{name: scalar(value, torch.float32) for name, value in numbers.items()},
        }


@dataclass(frozen=True)
class Limits:
    """What a whole period that was compiled as one graph can take; None where anything goes."""

    period: int
    tree_width: int
    rows: int | None = None
    context: int | None = None  # tokens of a row, prompt and answer
