"""Drafting and acceptance in the graph of a period, where the rule is an input of the graph.

`higher_order.cond` selects among the traced functions of `sirius_runtime.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.entries import plan_inputs
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Decision, Draft
from sirius_runtime.rules import OPTIONS, RULES
from sirius_runtime.sampling import Sampling
from sirius_runtime.tree import Level, Tree

Branch = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class TracedRules:
    """`Plan.propose` and `Plan.decide` for a plan whose fields are tensors of the graph.

    `given`: the graph's inputs by name, at least those of `plan_inputs`. `period`: K; `width`: w.
    """

    given: Mapping[str, Tensor]
    period: int
    width: int

    def propose(self, tree: Tree, logits_BWV: Tensor, level: Tensor) -> tuple[Level, Tensor | None]:
        if self.width > 1:
            return self._plan(next(iter(RULES)), self._flat).propose(tree, logits_BWV, level)

        def drafted(rule: str) -> Branch:
            def branch(*flat: Tensor) -> tuple[Tensor, ...]:
                tree, logits, level = Tree(*flat[:4]), flat[4], flat[5]
                new, q = self._plan(rule, flat[6:]).propose(tree, logits, level)
                if q is None:
                    q = torch.zeros_like(logits[:, 0], dtype=torch.float32)
                # A branch may not return a view of an operand, and parents is a view of `level`.
                return *(t.clone() for t in new), q

            return branch

        groups: dict[Any, list[str]] = {}
        for name, rule in RULES.items():
            groups.setdefault(rule.draft, []).append(name)
        branches = {tuple(names): drafted(names[0]) for names in groups.values()}
        operands = (*tree, logits_BWV, level, *self._flat)
        *new, q = self._by_rule(branches, operands)
        return Level(*new), q

    def decide(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        has_q = draft.distributions is not None

        def decided(rule: str, *flat: Tensor) -> tuple[Tensor, ...]:
            tree, depth, logits = Tree(*flat[:4]), flat[4], flat[5]
            # Only a sampled chain has draft distributions.
            q = flat[6] if has_q and RULES[rule].draws else None
            decision = self._plan(rule, flat[6 + has_q :]).decide(Draft(tree, depth, q), logits)
            # Greedy rules return one tensor as corrections and bonuses, and a branch of `cond` may
            # not return the same tensor twice.
            return decision.passes, torch.stack([decision.corrections, decision.bonuses])

        def greedy(*flat: Tensor) -> tuple[Tensor, ...]:
            """All greedy rules in one branch, which is cheaper than one branch each."""
            first, *others = greedy_rules
            passes, tokens = decided(first, *flat)
            for name in others:
                other, chosen = decided(name, *flat), flat[6 + has_q] == _number(name)
                passes = torch.where(chosen, other[0], passes)
                tokens = torch.where(chosen, other[1], tokens)
            return passes, tokens

        greedy_rules = tuple(name for name, rule in RULES.items() if not rule.draws)
        sampling_rules = [name for name, rule in RULES.items() if rule.draws]
        branches = {greedy_rules: greedy} | {
            (name,): partial(decided, name) for name in sampling_rules
        }
        operands: tuple[Tensor, ...] = (*draft.tree, draft.depth, logits_BNV)
        if draft.distributions is not None:
            operands += (draft.distributions,)
        passes, tokens = self._by_rule(branches, (*operands, *self._flat))
        return Decision(passes, tokens[0], tokens[1])

    @property
    def _flat(self) -> tuple[Tensor, ...]:
        """The plan's inputs in order; `rule` is the first."""
        return tuple(self.given[name] for name in plan_inputs(tuple(RULES)))

    def _plan(self, rule: str, flat: Sequence[Tensor]) -> Plan:
        """A plan for `rule`, with its other fields from `flat`."""
        fields: dict[str, Any] = dict(zip(plan_inputs(tuple(RULES)), flat, strict=True))
        return Plan(
            self.period,
            self.width,
            rule,
            sampling=Sampling(fields["temperature"], fields["top_k"], fields["top_p"]),
            noise=fields["noise"],
            **{name: fields[name] for name in OPTIONS if name in fields},
        )

    def _by_rule(
        self, branches: Mapping[tuple[str, ...], Branch], operands: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        """Runs the branch of the rule that the graph's input `rule` selects.

        `operands` end with `_flat`, whose first tensor is that input.
        """
        (_, branch), *others = branches.items()
        at = len(operands) - len(self._flat)
        for names, other in others:
            branch = partial(_one_of, at, names, other, branch)
        return branch(*operands)


def _one_of(
    at: int, names: Sequence[str], yes: Branch, no: Branch, *operands: Tensor
) -> tuple[Any, ...]:
    """Runs `yes` if the rule `operands[at]` is one of `names`, else `no`."""
    rule = operands[at]
    which = rule == _number(names[0])
    for name in names[1:]:
        which = which | (rule == _number(name))
    return torch.ops.higher_order.cond(which, yes, no, tuple(operands))


def _number(name: str) -> int:
    return list(RULES).index(name)
