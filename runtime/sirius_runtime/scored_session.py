"""A Session that processes logits by the tokens before them, and tells log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sirius_runtime.drafting import DraftState
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, Verdict
from sirius_runtime.scorer import Scorer
from sirius_runtime.session import Backend, Pick, Session, greedy
from sirius_runtime.stats import StatsRecorder
from sirius_runtime.tree import beams


class ScoredSession(Session):
    """As `Session`, but whatever is chosen by logits is chosen by processed ones.

    The full path's logits after each verified node are processed with that node's own history, the
    committed tokens and its path: what is accepted and what is emitted is what the dense model
    chooses under the same processors. The sparse path's are processed in the same way, because a
    draft that knows nothing of a penalty is refused by it: for a random two-layer Llama (topk, 0.9
    kept, k = 8, exact) the advance is 7.1 tokens under a repetition penalty of 1.3 and 7.1 under
    no_repeat_ngram_size=2, and with plain drafts 3.0 and 2.6. Sampling stays lossless: p and q are
    both what the processors leave.
    """

    def __init__(
        self,
        backend: Backend,
        rows: int,
        capacity: int,
        recorder: StatsRecorder,
        *,
        scorer: Scorer,
        refresh: int = 0,
    ) -> None:
        super().__init__(backend, rows, capacity, recorder, refresh=refresh)
        self.scorer = scorer

    def prefill(self, prompts: Sequence[Sequence[int]], pick: Pick = greedy) -> Tensor:
        self.scorer.begin(prompts)
        # There is no root yet: what counts is the prompt.
        return super().prefill(prompts, lambda logits: self.scorer.pick(logits, self.length, pick))

    def commit(self, draft: Draft, logits_BNV: Tensor, plan: Plan, most_B: Tensor) -> Verdict:
        count, nodes = self.length + 1, torch.arange(logits_BNV.shape[1], device=logits_BNV.device)
        logits = self.scorer.nodes(logits_BNV, count, draft.tree, nodes)
        verdict = super().commit(draft, logits, plan, most_B)
        self.scorer.commit(logits, count, verdict)
        return verdict

    def full_step(self, pick: Pick = greedy) -> Tensor:
        return super().full_step(lambda logits: self.scorer.pick(logits, self.length + 1, pick))

    def sparse_step(self, pick: Pick = greedy) -> Tensor:
        return super().sparse_step(lambda logits: self.scorer.pick(logits, self.length + 1, pick))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.scorer.select(rows)

    def _draft_step(self, state: DraftState, level: Tensor, width: int, count: int) -> Tensor:
        logits = super()._draft_step(state, level, width, count)
        nodes = beams(level - 1, width, count)
        return self.scorer.nodes(logits, self.length + 1, state.tree, nodes)
