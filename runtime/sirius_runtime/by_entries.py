"""A period by the entries of a program: draft, verify, commit.

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


class TreeState(Protocol):
    """A `State` in tensors that runs an entry over the nodes of a tree."""

    program: ProgramSpec

    @property
    def length(self) -> Tensor: ...

    @property
    def root(self) -> Tensor: ...

    @property
    def active(self) -> Tensor: ...

    def nodes(self, entry: str, tree: Tree, nodes: Tensor) -> dict[str, Tensor]:
        """Runs an entry over these nodes [T] of every row's tree; keeps their K/V."""
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
    """Nothing here reads a device value, but whether any row drafts on where drafts may stop early,
    or some were looked up.

    scorer: what processes logits before anything is chosen by them. The full path's after each
    verified node are processed with that node's own history, the committed tokens and its path:
    what is accepted and emitted is what the dense model chooses under the same processors. The
    sparse path's are processed alike, because a draft that knows nothing of a penalty is refused by
    it: for a random two-layer Llama (topk, 0.9 kept, K = 8, exact) the advance is 7.1 tokens under
    a repetition penalty of 1.3 and 7.1 under no_repeat_ngram_size=2, and with plain drafts 3.0 and
    2.6. Sampling stays lossless: p and q are both what the processors leave.

    all_levels: draft all of them, and ask nothing of the device.
    """

    scorer: Scorer | None = None
    all_levels: bool = False

    def period(self, state: TreeState, plan: Plan, most_B: Tensor, clock: PhaseClock) -> Outcome:
        with clock(Phase.DRAFT):
            draft, levels = self.draft(state, plan, most_B)
        with clock(Phase.VERIFY):
            result = self.verify(state, plan, draft.tree)
        logits_BNV, verdict = self.commit(state, draft, result["logits"], plan, most_B)
        if plan.observes:
            state.observe(observed(result["activity"], verdict.nodes, verdict.advance))
        if plan.refreshes:
            state.choose_neurons()
        counts = [verdict.advance[:, None], draft.depth[:, None]]
        packed = torch.cat([verdict.tokens, *counts], 1)
        return Outcome(packed, levels, evidence=Evidence(draft, logits_BNV, verdict))

    def draft(self, state: TreeState, plan: Plan, most_B: Tensor) -> tuple[Draft, int]:
        """Sparse steps from the root, a level of the tree each, for the rows that look nothing up;
        leaves out levels never drafted.
        """
        vocabulary = state.program.model.vocab_size if plan.draws else None
        period, width, given = plan.period, plan.width, plan.given
        grown = begin(
            state.root, state.active, most_B, period=period, width=width, sampled_from=vocabulary
        )
        if given is not None:
            grown = grown._replace(live=grown.live & (given[:, 0] < 0))
        asks = (plan.confidence > 0.0 or given is not None) and not self.all_levels
        # Made on the device: a graph of its work could not hold a copy from the host.
        confidence = torch.full((), plan.confidence, dtype=torch.float32, device=most_B.device)
        levels = 0
        while levels < period - 1 and not (asks and not grown.live.any()):
            levels += 1
            level = torch.full((), levels, dtype=torch.int64, device=most_B.device)
            nodes = beams(level - 1, width, 1 if levels == 1 else width)
            result = state.nodes(SPARSE, grown.tree, nodes)
            state.count_kept(result, grown.live)
            logits = self._processed(result["logits"], state, grown.tree, nodes)
            grown = extend(grown, logits, level, plan.propose, most_B, confidence)
        if given is None:
            return first_levels(grown.draft, levels, width), levels
        draft = first_levels(grown.draft, max(levels, given.shape[1]), width)
        return with_given(draft, given), levels

    def verify(self, state: TreeState, plan: Plan, tree: Tree) -> dict[str, Tensor]:
        """One full forward over the tree: logits [B, N, V]. Overwrites the draft's K/V."""
        nodes = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
        return state.nodes(OBSERVE if plan.observes else FULL, tree, nodes)

    def commit(
        self, state: TreeState, draft: Draft, logits_BNV: Tensor, plan: Plan, most_B: Tensor
    ) -> tuple[Tensor, Verdict]:
        """Accepts, corrects and rolls back: the length moves past the kept tokens, no further.

        A row commits `most_B` tokens at the most, as if its draft were that short. The K/V of the
        kept path moves into the slots of its positions; slots beyond the new length hold stale K/V,
        which is overwritten before it can be seen. Also returns the logits that decided.
        """
        nodes = torch.arange(logits_BNV.shape[1], device=logits_BNV.device)
        logits_BNV = self._processed(logits_BNV, state, draft.tree, nodes)
        verdict = judge(draft, logits_BNV, plan.decide, most_B, plan.period)
        if self.scorer is not None:
            self.scorer.commit(logits_BNV, state.length + 1, verdict)
        if plan.width > 1:  # in a chain it lies there already
            state.compact(verdict.nodes)
        state.commit(verdict.advance, verdict.root)
        return logits_BNV, verdict

    def _processed(self, logits_BnV: Tensor, state: TreeState, tree: Tree, nodes: Tensor) -> Tensor:
        if self.scorer is None:
            return logits_BnV
        return self.scorer.nodes(logits_BnV, state.length + 1, tree, nodes)


def chooser(sampling: Sampling, scorer: Scorer | None = None) -> Choose:
    """Chooses by logits as they come, or by those that the scorer leaves."""

    def choose(logits_BV: Tensor, count_B: Tensor, number_B: Tensor | None) -> Tensor:
        def pick(logits: Tensor) -> Tensor:
            if number_B is None:
                return likeliest(logits)
            return draw(sampling.distribution(logits), number_B)

        return pick(logits_BV) if scorer is None else scorer.pick(logits_BV, count_B, pick)

    return choose
