"""What a run asks of acceptance and of drawing, as plain numbers or as a graph's tensors.

PyTorch is imported once there are tensors to work on: options are read and checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from sirius_runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Scalar: TypeAlias = "Tensor | float"


class Rule(IntEnum):
    """How drafted tokens are accepted: by a `…Acceptance` of this name."""

    THRESHOLD = 0
    EXACT = 1
    SAMPLE = 2


def check_threshold(threshold: Any, temperature: Any) -> None:
    """Raises ConfigError for numbers out of range; tensors are a graph's inputs, not yet known."""
    if _known(threshold) and not threshold >= 0.0:
        raise ConfigError(f"threshold must be >= 0, got {threshold}")
    if _known(threshold) and threshold == float("inf"):
        raise ConfigError("threshold must be finite, got inf; 1.1 accepts no draft either")
    if _known(temperature) and not 0.0 < temperature < float("inf"):
        raise ConfigError(f"verify_temperature must be > 0, got {temperature}")


@dataclass(frozen=True)
class Sampling:
    """A distribution over the vocabulary: softmax(logits / temperature), cut to the `top_k`
    likeliest tokens and then to the smallest set of probability `top_p` (transformers' order).

    top_k 0 and top_p 1 cut nothing.
    """

    temperature: Scalar = 1.0
    top_k: Tensor | int = 0
    top_p: Scalar = 1.0

    def __post_init__(self) -> None:
        for value, allowed, range_ in (
            (self.temperature, lambda v: 0.0 < v < float("inf"), "temperature must be > 0"),
            (self.top_k, lambda v: v >= 0, "top_k must be >= 0 (0: no limit)"),
            (self.top_p, lambda v: 0.0 < v <= 1.0, "top_p must be in (0, 1]"),
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
        return torch.zeros_like(values).scatter(-1, order, values.softmax(-1))

    def _cuts_nothing(self) -> bool:
        """Known only of plain numbers: a graph that takes them at run time always sorts."""
        if not (_known(self.top_k) and _known(self.top_p)):
            return False
        return bool(self.top_k == 0 and self.top_p == 1.0)


def _known(value: Any) -> bool:
    """Whether `value` is a number, and not a graph's input."""
    return isinstance(value, Real)
