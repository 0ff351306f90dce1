"""Runs a period through the entries of a program: draft, verify, commit.

Shape letters: `B` rows, `N` nodes of a draft tree, `K` tokens of a path, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sirius_runtime.decoder import Choose, Evidence, Outcome
from sirius_runtime.drafting import begin, extend, first_levels, with_given
from sirius_runtime.entries import FULL, OBSERVE, SPARSE
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, Verdict, draw, judge, likeliest, observed
from sirius_runtime.sampling import Sampling
from sirius_runtime.scorer import Scorer
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.stats import Phase, PhaseClock
from sirius_runtime.tree import Tree, beams

ROOM = 16
"""A chain has nodes for a multiple of so many tokens."""


class TreeState(Protocol):
    """A `State` of tensors that can run an entry over the nodes of a draft tree."""

    program: ProgramSpec

    @property
    def length(self) -> Tensor: ...

    @property
    def root(self) -> Tensor: ...

    @property
    def active(self) -> Tensor: ...

    def nodes(self, entry: str, tree: Tree, nodes: Tensor) -> dict[str, Tensor]:
        """Runs an entry over these nodes [T] of every row's tree; writes their K/V to the cache."""
        ...

    def compact(self, nodes_BK: Tensor) -> None:
        """Moves the K/V of a path's nodes to the slots after `length`, in order."""
        ...

    def commit(self, advance: Tensor, root_B: Tensor) -> None: ...

    def observe(self, statistic: Tensor) -> None: ...

    def choose_neurons(self) -> None: ...

    def count_kept(self, result: Mapping[str, Tensor], rows_B: Tensor) -> None: ...


@dataclass(frozen=True)
class ByEntries:
    """The `Strategy` that runs entry by entry.

    The host reads only one value from the device: whether any row drafts on. It reads it only where
    drafts may stop early or were looked up.

    scorer: processes logits before tokens are chosen by them. The full path's logits at a verified
    node are processed with that node's history: the committed tokens and the node's path. So the
    accepted and emitted tokens are those that the dense model chooses under the same processors.
    The sparse path's logits are processed in the same way, because verification refuses drafts that
    ignore a penalty. For a random two-layer Llama (topk, 0.9 kept, K = 8, exact) the mean advance
    is 7.1 tokens under a repetition penalty of 1.3 and 7.1 under no_repeat_ngram_size=2; with
    unprocessed drafts it is 3.0 and 2.6. Sampling stays lossless: p and q are both distributions
    after the processors.

    all_levels: always draft all levels, so that the host reads nothing from the device.
    """

    scorer: Scorer | None = None
    all_levels: bool = False

    def period(self, state: TreeState, plan: Plan, most_B: Tensor, clock: PhaseClock) -> Outcome:
        with clock(Phase.DRAFT):
            draft, levels = self.draft(state, plan, most_B)
        with clock(Phase.VERIFY):
            result = self.verify(state, plan, draft)
        logits_BNV, verdict = self.commit(state, draft, result["logits"], plan, most_B)
        if plan.observes:
            state.observe(observed(result["activity"], verdict.nodes, verdict.advance))
        if plan.refreshes:
            state.choose_neurons()
        counts = [verdict.advance[:, None], draft.depth[:, None]]
        packed = torch.cat([verdict.tokens, *counts], 1)
        return Outcome(packed, levels, evidence=Evidence(draft, logits_BNV, verdict))

    def draft(self, state: TreeState, plan: Plan, most_B: Tensor) -> tuple[Draft, int]:
        """Drafts by sparse steps from the root, one tree level each, for the rows without a
        looked-up draft (`plan.given`). Returns the draft without the levels that no row drafted,
        and the number of sparse steps.

        A chain stops at a token that ends the answer: whether the full path keeps or refuses that
        token, it drops those after it. In a tree, other paths go on.
        """
        vocabulary = state.program.model.vocab_size if plan.draws else None
        period, width, given = plan.period, plan.width, plan.given
        # Chains of few lengths: steps of the same shapes are recorded once (`backends.tape`).
        room = -(-period // ROOM) * ROOM if width == 1 else period
        grown = begin(
            state.root,
            state.active,
            most_B,
            period=period,
            width=width,
            sampled_from=vocabulary,
            room=room,
        )
        if given is not None:
            grown = grown._replace(live=grown.live & (given[:, 0] < 0))
        stops = width == 1 and len(plan.ends) > 0 and not self.all_levels
        asks = (plan.confidence > 0.0 or given is not None or stops) and not self.all_levels
        # Made on the device: a recorded CUDA graph can't contain a copy from the host.
        confidence = torch.full((), plan.confidence, dtype=torch.float32, device=most_B.device)
        ending = plan.ending(most_B.device) if stops else None
        levels = 0
        while levels < period - 1 and not (asks and not grown.live.any()):
            levels += 1
            level = torch.full((), levels, dtype=torch.int64, device=most_B.device)
            nodes = beams(level - 1, width, 1 if levels == 1 else width)
            result = state.nodes(SPARSE, grown.tree, nodes)
            state.count_kept(result, grown.live)
            logits = self._processed(result["logits"], state, grown.tree, nodes)
            grown = extend(grown, logits, level, plan.propose, most_B, confidence)
            if ending is not None:
                ended = (grown.tree.tokens[:, levels, None] == ending).any(1)
                grown = grown._replace(live=grown.live & ~ended)
        if given is None:
            return first_levels(grown.draft, levels, width), levels
        draft = first_levels(grown.draft, max(levels, given.shape[1]), width)
        return with_given(draft, given), levels

    def verify(self, state: TreeState, plan: Plan, draft: Draft) -> dict[str, Tensor]:
        """One forward pass of the full path over the tree: logits [B, N, V]. Overwrites the K/V
        that the sparse path wrote.
        """
        tree = draft.tree
        nodes = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
        return state.nodes(OBSERVE if plan.observes else FULL, tree, nodes)

    def commit(
        self, state: TreeState, draft: Draft, logits_BNV: Tensor, plan: Plan, most_B: Tensor
    ) -> tuple[Tensor, Verdict]:
        """Accepts, corrects and rolls back: the new length is behind the last kept token.

        A row commits at most `most_B` tokens, as if its draft were that short. The K/V of the kept
        path moves to the slots after the old length, in order. Slots beyond the new length hold
        stale K/V, which is overwritten before any query sees it. Returns the processed logits
        [B, N, V] and the verdict.
        """
        nodes = torch.arange(logits_BNV.shape[1], device=logits_BNV.device)
        logits_BNV = self._processed(logits_BNV, state, draft.tree, nodes)
        verdict = self.judge(draft, logits_BNV, plan, most_B)
        if self.scorer is not None:
            self.scorer.commit(logits_BNV, state.length + 1, verdict)
        if plan.width > 1:  # the K/V of a chain is in order already
            state.compact(verdict.nodes)
        state.commit(verdict.advance, verdict.root)
        return logits_BNV, verdict

    def judge(self, draft: Draft, logits_BNV: Tensor, plan: Plan, most_B: Tensor) -> Verdict:
        """The verdict of the plan's rule on a draft, by the full path's logits [B, N, V]."""
        return judge(draft, logits_BNV, plan.decide, most_B, plan.period)

    def _processed(self, logits_BnV: Tensor, state: TreeState, tree: Tree, nodes: Tensor) -> Tensor:
        if self.scorer is None:
            return logits_BnV
        return self.scorer.nodes(logits_BnV, state.length + 1, tree, nodes)


def chooser(sampling: Sampling, scorer: Scorer | None = None) -> Choose:
    """A function that chooses each row's next token by its logits, processed if there is a scorer:
    the likeliest token, or a drawn one where it is given random numbers.
    """

    def choose(logits_BV: Tensor, count_B: Tensor, number_B: Tensor | None) -> Tensor:
        def pick(logits: Tensor) -> Tensor:
            if number_B is None:
                return likeliest(logits)
            return draw(sampling.distribution(logits), number_B)

        return pick(logits_BV) if scorer is None else scorer.pick(logits_BV, count_B, pick)

    return choose
