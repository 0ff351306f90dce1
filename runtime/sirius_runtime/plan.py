"""The plan of a period, and the limits of a compiled period graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sirius_runtime.rules import RULES, Asked, best_paths, check_options, values
from sirius_runtime.sampling import Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sirius_runtime.policy import Decision, Draft
    from sirius_runtime.tree import Level, Tree


@dataclass(frozen=True)
class Plan(Asked):
    """How a period drafts and accepts: at most `period` - 1 levels (K - 1) of `width` nodes, and
    the acceptance rule with its options.

    `confidence` in [0, 1]: the probability below which a row's draft stops (0: never). `observes`:
    whether verification adds to the statistic of griffin's neurons; `refreshes`: whether they are
    selected again at the end. `given` [B, <= K - 1] int64: looked-up chains, with `NO_TOKEN` after
    the end of each; a row with a chain drafts nothing else. None: no row has one. `ends`: the
    tokens that end an answer; a chain is not drafted beyond one.

    Raises ConfigError for a value out of its range.
    """

    period: int
    width: int = 1
    rule: str = "sirius"
    confidence: float = 0.0
    observes: bool = False
    refreshes: bool = False
    given: Any = None
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def draws(self) -> bool:
        """Whether drafted tokens are sampled: in chains, if the rule samples. In a tree, the
        likeliest tokens are drafted.
        """
        return RULES[self.rule].draws and self.width == 1

    @property
    def first_number(self) -> Any:
        """The first of each row's random numbers [B]; None where nothing is drawn."""
        return None if self.noise is None else self.noise[:, 0, 0]

    def propose(self, tree: Tree, logits_BWV: Tensor, level: Tensor) -> tuple[Level, Tensor | None]:
        """See `sirius_runtime.drafting.Propose`."""
        draft = RULES[self.rule].draft if self.width == 1 else best_paths
        return draft(tree, logits_BWV, level, self.width, self)

    def decide(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        """See `sirius_runtime.policy.Decide`."""
        return RULES[self.rule].accept(draft, logits_BNV, self)

    def ending(self, device: torch.device) -> Tensor:
        """The tokens that end the rows' answers: int64 [1, E], or [B, E] where rows differ."""
        import torch

        return torch.tensor([self.ends], dtype=torch.int64, device=device)

    def inputs(self) -> dict[str, tuple[int | float, str]]:
        """The plan as inputs of the entry `period`, without rule and noise: (number, dtype) by
        name.
        """
        numbers = {**values(self), "confidence": self.confidence}
        return sampling_inputs(self.sampling) | {n: (v, "float32") for n, v in numbers.items()}


def sampling_inputs(sampling: Sampling) -> dict[str, tuple[int | float, str]]:
    """A `Sampling` of Python numbers as inputs of a graph: (number, dtype) by name."""
    return {
        "temperature": (float(sampling.temperature), "float32"),
        "top_k": (int(sampling.top_k), "int64"),
        "top_p": (float(sampling.top_p), "float32"),
    }


@dataclass(frozen=True)
class Limits:
    """The limits of a period that was compiled as one graph; None: no limit."""

    period: int
    tree_width: int
    rows: int | None = None
    context: int | None = None  # tokens of a row, prompt and answer
