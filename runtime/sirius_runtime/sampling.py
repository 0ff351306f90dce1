"""The sampling options of a run, as Python numbers or as a graph's tensors.

Options are read and checked without PyTorch; it is imported when a distribution is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from sirius_runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Scalar: TypeAlias = "Tensor | float"

LEAST_TEMPERATURE = 1e-6
"""The least temperature. At a lower one, logits / temperature could overflow float32; at this one,
the likeliest token already has probability 1.
"""

NO_TOKEN = -1
"""Stands for a token that can't be chosen, because the logits hold NaN or infinity."""


@dataclass(frozen=True)
class Sampling:
    """A distribution over the vocabulary: softmax(logits / temperature), restricted in
    transformers' order to: the `top_k` likeliest tokens; the smallest set of likeliest tokens with
    total probability `top_p`; the tokens with at least `min_p` times the likeliest one's
    probability; and the locally typical tokens with total probability `typical_p`.

    top_k 0, top_p 1, min_p 0 and typical_p 1 restrict nothing. Graphs have no min_p and typical_p.
    Raises ConfigError for a number out of range.
    """

    temperature: Scalar = 1.0
    top_k: Tensor | int = 0
    top_p: Scalar = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        for value, allowed, range_ in (
            (self.temperature, lambda v: 0.0 < v < float("inf"), "temperature must be > 0"),
            (
                self.temperature,
                lambda v: v >= LEAST_TEMPERATURE,
                f"temperature must be >= {LEAST_TEMPERATURE} (mode exact is greedy)",
            ),
            (self.top_k, lambda v: v >= 0, "top_k must be >= 0 (0: no limit)"),
            (self.top_k, lambda v: v < 2**63, "top_k must be below 2^63 (0: no limit)"),
            (self.top_p, lambda v: 0.0 < v <= 1.0, "top_p must be in (0, 1]"),
            (self.min_p, lambda v: 0.0 <= v <= 1.0, "min_p must be in [0, 1]"),
            (self.typical_p, lambda v: 0.0 < v <= 1.0, "typical_p must be in (0, 1]"),
        ):
            if _known(value) and not allowed(value):
                raise ConfigError(f"{range_}, got {value}")

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [..., V], float32, of logits [..., V]."""
        import torch

        scaled = logits.float() / self.temperature
        if self._cuts_nothing():
            return scaled.softmax(-1)
        values, order = scaled.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(values.shape[-1], device=values.device)
        limit = torch.where(torch.as_tensor(self.top_k) > 0, self.top_k, values.shape[-1])
        values = values.masked_fill(rank >= limit, float("-inf"))
        # In float32 the sum over a large vocabulary reaches 1 before its tail.
        p = values.softmax(-1, dtype=torch.float64)
        likelier = p.cumsum(-1) - p
        beyond = (likelier >= self.top_p) & (rank > 0)
        values = values.masked_fill(beyond & torch.as_tensor(self.top_p < 1.0), float("-inf"))
        if self.min_p > 0.0:
            p = values.softmax(-1)
            values = values.masked_fill(p < self.min_p * p[..., :1], float("-inf"))
        if self.typical_p < 1.0:
            values = values.masked_fill(~_typical(values, self.typical_p), float("-inf"))
        return torch.zeros_like(values).scatter(-1, order, values.softmax(-1))

    def _cuts_nothing(self) -> bool:
        """Whether no token is excluded; False if that is not known, because options are inputs of a
        graph.
        """
        if not (_known(self.top_k) and _known(self.top_p)):
            return False
        return bool(self.top_k == 0 and self.top_p == 1.0) and self.fits_graph

    @property
    def fits_graph(self) -> bool:
        """Whether the graphs `period` and `pick` can draw from it."""
        return self.min_p == 0.0 and self.typical_p == 1.0


def _typical(logits: Tensor, mass: float) -> Tensor:
    """The locally typical tokens, bool [..., V]: those whose -log p is nearest to the entropy, with
    total probability `mass` (Meister et al., arXiv 2202.00666).
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
    before = (p.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    farthest = distance.gather(-1, before.clamp(max=distance.shape[-1] - 1))
    return (-log_p - entropy).abs() <= farthest


def _known(value: Any) -> bool:
    """Whether `value` is a Python number, not an input of a graph."""
    return isinstance(value, Real)
