"""Rules as functions of a draft and logits, with the numbers that they ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from sirius_runtime.drafting import Propose
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Decide
from sirius_runtime.rules import Noise, best_paths, by_chance, drawn_chain
from sirius_runtime.sampling import Sampling


def asked(sampling: Sampling, noise: Noise | None, temperature: float = 0.6) -> Any:
    """What rules are given, of random numbers in their parts."""
    return SimpleNamespace(sampling=sampling, numbers=noise, verify_temperature=temperature)


exactly: Decide = Plan(1, rule="exact").decide


def threshold_of(threshold: float | Tensor, temperature: float | Tensor) -> Decide:
    numbers: Any = {"threshold": threshold, "verify_temperature": temperature}
    return Plan(1, **numbers).decide


def sampled(sampling: Sampling, noise: Noise) -> Decide:
    return lambda draft, logits: by_chance(draft, logits, asked(sampling, noise))


def best(width: int, temperature: float) -> Propose:
    given = asked(Sampling(), None, temperature)
    return lambda tree, logits, level: best_paths(tree, logits, level, width, given)


def drawn(sampling: Sampling, noise: Noise, temperature: float) -> Propose:
    given = asked(sampling, noise, temperature)
    return lambda tree, logits, level: drawn_chain(tree, logits, level, 1, given)
