"""Drafting and acceptance whose rule is an input of the graph: the same functions that the Session
calls, chosen between by `higher_order.cond`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.drafting import BeamProposer, SampleProposer
from sirius_runtime.policy import (
    Decision,
    Draft,
    ExactAcceptance,
    Noise,
    SampleAcceptance,
    ThresholdAcceptance,
)
from sirius_runtime.sampling import Rule, Sampling
from sirius_runtime.tree import Level, Tree

Branch = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Parameters:
    """What a run asks of a period, as tensors: the graph's inputs of these names."""

    rule: Tensor
    threshold: Tensor
    verify_temperature: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    noise: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def acceptance(self, rule: Rule) -> ThresholdAcceptance | ExactAcceptance | SampleAcceptance:
        match rule:
            case Rule.THRESHOLD:
                return ThresholdAcceptance(self.threshold, self.verify_temperature)
            case Rule.EXACT:
                return ExactAcceptance()
            case Rule.SAMPLE:
                return SampleAcceptance(self.sampling, Noise.unpack(self.noise))


@dataclass(frozen=True)
class RuntimeProposer:
    """`BeamProposer`, or in a chain that samples `SampleProposer`."""

    parameters: Parameters

    def propose(
        self, tree: Tree, logits_BWV: Tensor, level: Tensor, width: int
    ) -> tuple[Level, Tensor | None]:
        if width > 1:
            return BeamProposer(self.parameters.verify_temperature).propose(
                tree, logits_BWV, level, width
            )

        def best(*flat: Tensor) -> tuple[Tensor, ...]:
            tree, logits, level, given = _unpack(flat)
            new, _ = BeamProposer(given.verify_temperature).propose(tree, logits, level, 1)
            # Aliases may not leave a branch: parents would be a view of `level`.
            return *(t.clone() for t in new), torch.zeros_like(logits[:, 0], dtype=torch.float32)

        def drawn(*flat: Tensor) -> tuple[Tensor, ...]:
            tree, logits, level, given = _unpack(flat)
            proposer = SampleProposer(
                given.sampling, Noise.unpack(given.noise), given.verify_temperature
            )
            new, q = proposer.propose(tree, logits, level, 1)
            assert q is not None
            return *(t.clone() for t in new), q

        operands = (*tree, logits_BWV, level, *self.parameters.flat())
        *new, q = _choose(self.parameters.rule == Rule.SAMPLE, drawn, best, operands)
        return Level(*new), q


@dataclass(frozen=True)
class RuntimeAcceptance:
    """`ThresholdAcceptance`, `ExactAcceptance` or `SampleAcceptance`."""

    parameters: Parameters

    def decide(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        has_q = draft.distributions is not None

        def decided(rule: Rule) -> Branch:
            def branch(*flat: Tensor) -> tuple[Tensor, ...]:
                tree, depth, logits = Tree(*flat[:4]), flat[4], flat[5]
                # The distributions of a chain that was not drawn mean nothing.
                q = flat[6] if has_q and rule is Rule.SAMPLE else None
                acceptance = Parameters(*flat[6 + has_q :]).acceptance(rule)
                decision = acceptance.decide(Draft(tree, depth, q), logits)
                # Greedy corrections are bonuses too, but a branch may not return one value twice.
                return decision.passes, torch.stack([decision.corrections, decision.bonuses])

            return branch

        def greedy(*flat: Tensor) -> tuple[Tensor, ...]:
            rule = flat[-len(self.parameters.flat())]
            threshold, exact = decided(Rule.THRESHOLD)(*flat), decided(Rule.EXACT)(*flat)
            passes = torch.where(rule == Rule.EXACT, exact[0], threshold[0])
            return passes, threshold[1]

        operands: tuple[Tensor, ...] = (*draft.tree, draft.depth, logits_BNV)
        if draft.distributions is not None:
            operands += (draft.distributions,)
        operands += self.parameters.flat()
        sampled = self.parameters.rule == Rule.SAMPLE
        passes, tokens = _choose(sampled, decided(Rule.SAMPLE), greedy, operands)
        return Decision(passes, tokens[0], tokens[1])


def _unpack(flat: Sequence[Tensor]) -> tuple[Tree, Tensor, Tensor, Parameters]:
    return Tree(*flat[:4]), flat[4], flat[5], Parameters(*flat[6:])


def _choose(
    which: Tensor, true: Branch, false: Branch, operands: Sequence[Tensor]
) -> tuple[Any, ...]:
    return torch.ops.higher_order.cond(which, true, false, tuple(operands))
