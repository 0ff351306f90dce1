"""The sampling options of a run, as plain numbers or as a graph's tensors.

PyTorch is imported once there are tensors to work on: options are read and checked without it.
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
"""Below it, logits divided by the temperature overflow float32; at it, the likeliest token has
probability 1.
"""

NO_TOKEN = -1
"""The token where none can be chosen: logits have NaN, or none is finite."""


@dataclass(frozen=True)
class Sampling:
    """A distribution over the vocabulary: softmax(logits / temperature), cut to the `top_k`
    likeliest tokens, to the smallest set of probability `top_p`, to the tokens of `min_p` times the
    likeliest one's probability, and to the smallest set of probability `typical_p` whose surprise
    is nearest to the entropy (transformers' order).

    top_k 0, top_p 1, min_p 0 and typical_p 1 cut nothing. A graph has no min_p and no typical_p.
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
        """Known only of plain numbers: a graph that takes them at run time always sorts."""
        if not (_known(self.top_k) and _known(self.top_p)):
            return False
        return bool(self.top_k == 0 and self.top_p == 1.0) and self.fits_graph

    @property
    def fits_graph(self) -> bool:
        """Whether the graphs `period` and `pick` can draw from it."""
        return self.min_p == 0.0 and self.typical_p == 1.0


def _typical(logits: Tensor, mass: float) -> Tensor:
    """The locally typical tokens [..., V] of probability `mass` (Meister et al., arXiv
    2202.00666).
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
    before = (p.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    farthest = distance.gather(-1, before.clamp(max=distance.shape[-1] - 1))
    return (-log_p - entropy).abs() <= farthest


def _known(value: Any) -> bool:
    """Whether `value` is a number, and not a graph's input."""
    return isinstance(value, Real)
