"""One plan for a batch whose rows have different acceptance and sampling settings.

The batch drafts and verifies as one. Rows with equal plans form a `Part`; each part's plan proposes
and accepts tokens for its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sirius_runtime.plan import Plan
from sirius_runtime.policy import Decision, Draft, draw, likeliest
from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.tree import Level, Tree

if TYPE_CHECKING:
    from sirius_runtime.decoder import Choose
    from sirius_runtime.scorer import Scorer


@dataclass(frozen=True)
class Asking:
    """A row's plan for its next period, and its uniform random numbers: [2, K] for a period, [1, 1]
    for a step, None if it does not sample.
    """

    plan: Plan
    noise: np.ndarray | None


@dataclass(frozen=True)
class Part:
    """The indices `rows` [b] of rows with equal plans, and that plan with their noise [b, 2, K].
    drawn: whether they sample.
    """

    rows: Tensor
    plan: Plan
    drawn: bool

    def pick(self, logits_bV: Tensor) -> Tensor:
        """The next token [b] of a step, from logits [b, V]."""
        if not self.drawn:
            return likeliest(logits_bV)
        return draw(self.plan.sampling.distribution(logits_bV), self.plan.first_number)


@dataclass(frozen=True)
class MixedPlan(Plan):
    """A plan for a batch, whose period is the longest of its rows. All parts have the same `width`
    and `confidence`.
    """

    parts: tuple[Part, ...] = ()
    place: Tensor = field(default_factory=lambda: torch.empty(0))
    """Each row's index [B] in the concatenation of the parts' rows."""

    @classmethod
    def of(cls, asked: Sequence[Asking], period: int, device: torch.device) -> MixedPlan:
        """The plan for the rows of a batch, for a period of at most `period` tokens (K)."""
        groups: dict[tuple[Plan, bool], list[int]] = {}
        for row, asking in enumerate(asked):
            plan = replace(asking.plan, noise=None, period=period)
            groups.setdefault((plan, asking.noise is not None), []).append(row)
        parts = []
        for (plan, drawn), rows in groups.items():
            noise = None
            if drawn:
                padded = np.zeros((len(rows), 2, max(period, 1)))
                for index, row in enumerate(rows):
                    drawn_2K = asked[row].noise
                    assert drawn_2K is not None
                    kinds, count = drawn_2K.shape
                    padded[index, :kinds, :count] = drawn_2K[:, :period]
                noise = torch.as_tensor(padded, device=device)
            parts.append(Part(torch.tensor(rows, device=device), replace(plan, noise=noise), drawn))
        first = asked[0].plan
        return cls(
            period=period,
            width=first.width,
            confidence=first.confidence,
            ends=tuple({end for asking in asked for end in asking.plan.ends}),
            parts=tuple(parts),
            place=torch.cat([part.rows for part in parts]).argsort(),
        )

    @property
    def draws(self) -> bool:
        return any(part.plan.draws for part in self.parts)

    def propose(self, tree: Tree, logits_BWV: Tensor, level: Tensor) -> tuple[Level, Tensor | None]:
        if len(self.parts) == 1:
            return self.parts[0].plan.propose(tree, logits_BWV, level)
        done = [
            part.plan.propose(_rows_of(tree, part), logits_BWV[part.rows], level)
            for part in self.parts
        ]
        new = Level(*self._merged(new for new, _ in done))
        if not self.draws:
            return new, None
        none = logits_BWV.new_zeros(logits_BWV.shape[0], logits_BWV.shape[2], dtype=torch.float32)
        q = [
            none[: len(part.rows)] if part_q is None else part_q
            for part, (_, part_q) in zip(self.parts, done, strict=True)
        ]
        return new, torch.cat(q)[self.place]

    def ending(self, device: torch.device) -> Tensor:
        table = torch.full((len(self.place), len(self.ends)), NO_TOKEN, device=device)
        for part in self.parts:
            table[part.rows, : len(part.plan.ends)] = part.plan.ending(device)
        return table

    def decide(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        if len(self.parts) == 1:
            return self.parts[0].plan.decide(draft, logits_BNV)
        decided = []
        for part in self.parts:
            q = draft.distributions
            q = q[part.rows] if q is not None and part.plan.draws else None
            drafted = Draft(_rows_of(draft.tree, part), draft.depth[part.rows], q)
            decided.append(part.plan.decide(drafted, logits_BNV[part.rows]))
        return Decision(*self._merged(decided))

    def chooser(self, scorer: Scorer | None) -> Choose:
        """The function that chooses a step's tokens, from logits that `scorer`, if there is one,
        processes first.
        """

        def pick(logits_BV: Tensor) -> Tensor:
            return torch.cat([part.pick(logits_BV[part.rows]) for part in self.parts])[self.place]

        def choose(logits_BV: Tensor, count_B: Tensor, number_B: Any) -> Tensor:
            return pick(logits_BV) if scorer is None else scorer.pick(logits_BV, count_B, pick)

        return choose

    def _merged(self, values: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
        """The parts' tensors, merged in the order of the batch's rows."""
        return [torch.cat(tensors)[self.place] for tensors in zip(*values, strict=True)]


def _rows_of(tree: Tree, part: Part) -> Tree:
    return Tree(*(tensor[part.rows] for tensor in tree))
