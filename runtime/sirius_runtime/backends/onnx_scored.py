"""Sequences on ONNX Runtime whose logits are processed: periods by the entries, decided by PyTorch.

The graph `period` can't call a processor. Here a chain is drafted, verified and accepted step by
step: ONNX Runtime computes the logits, and the functions that the Session calls decide over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sirius_runtime.backends.onnx_decoder import OnnxDecoder
from sirius_runtime.backends.onnx_graphs import OnnxGraphs
from sirius_runtime.decoder import RowPeriod, Uniform
from sirius_runtime.drafting import begin, extend, first_levels
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, draw, judge, observed
from sirius_runtime.request import Request
from sirius_runtime.scorer import Scorer
from sirius_runtime.session import greedy
from sirius_runtime.stats import Phase, StatsRecorder


class ScoredOnnxDecoder(OnnxDecoder):
    """As `OnnxDecoder`, for chains, with processed logits in the place of logits; see
    `sirius_runtime.scored_session` for what that means.
    """

    def __init__(
        self,
        backend: OnnxGraphs,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
    ) -> None:
        super().__init__(backend, request, rows, tokens, recorder, uniform)
        self._vocabulary = backend.program.model.vocab_size
        self._scorer = Scorer(
            request, rows, tokens + request.period, self._vocabulary, torch.device("cpu")
        )
        self._roots = 0  # tokens after the cached ones that count: the root, once there is one

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self._scorer.begin(prompts)
        first = super().prefill(prompts)
        self._roots = 1
        return first

    def period(self, plan: Plan, sizes: Sequence[int], noise: np.ndarray | None) -> list[RowPeriod]:
        if noise is not None:
            plan = replace(plan, noise=torch.from_numpy(noise))
        start, most = self._length, torch.tensor(sizes)
        root, active = torch.from_numpy(self._root), torch.from_numpy(self._active)
        count = torch.from_numpy(start + 1)
        draft = self._draft(plan, most)
        self._length, refresh = start, self._request.refresh
        with self._recorder.clock(Phase.VERIFY):
            result = self._tokens("observe" if refresh else "full", draft.tree.tokens.numpy())
        self._recorder.full_passes += 1
        nodes = torch.arange(draft.tree.tokens.shape[1])
        logits = self._scorer.nodes(torch.from_numpy(result["logits"]), count, draft.tree, nodes)
        verdict = judge(draft, logits, plan.acceptance, most, plan.size)
        self._scorer.commit(logits, count, verdict)
        self._length = start + (verdict.advance * active).numpy()
        self._root = torch.where(active, verdict.root, root).numpy()
        if refresh:
            activity = torch.from_numpy(result["activity"])
            more = observed(activity, verdict.nodes, verdict.advance).numpy()
            self._statistic = more if self._statistic is None else self._statistic + more
        self._end_period()
        rows = zip(verdict.tokens, verdict.advance.tolist(), draft.depth.tolist(), strict=True)
        return [RowPeriod(tokens[:n].tolist(), levels) for tokens, n, levels in rows]

    def logprobs(self) -> list[list[TokenLogprobs]]:
        return self._scorer.logprobs()

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self._scorer.select(torch.tensor(rows))

    def _draft(self, plan: Plan, most_B: torch.Tensor) -> Draft:
        """A chain from each root, by sparse steps; moves `_length` over what was drafted."""
        start = self._length
        state = begin(
            torch.from_numpy(self._root),
            torch.from_numpy(self._active),
            most_B,
            size=plan.size,
            width=1,
            sampled_from=self._vocabulary if plan.draws else None,
        )
        confidence, levels = torch.tensor(plan.confidence), 0
        with self._recorder.clock(Phase.DRAFT):
            for levels in range(1, plan.size):
                node = levels - 1
                self._length = start + node  # what was drafted lies in the cache after the history
                ids = state.tree.tokens[:, node:levels].numpy()
                result = self._tokens("sparse", ids, weights=self._kept_weights)
                self._count_kept(result, state.live.numpy())
                logits = self._scorer.nodes(
                    torch.from_numpy(result["logits"]),
                    torch.from_numpy(start + 1),
                    state.tree,
                    torch.tensor([node]),
                )
                level = torch.tensor(levels)
                state = extend(state, logits, level, 1, plan.proposer, most_B, confidence)
                if plan.confidence and not state.live.any():
                    break
        return first_levels(state.draft, levels, 1)

    def _pick(self, logits_BV: np.ndarray) -> np.ndarray:
        count = torch.from_numpy(self._length + self._roots)
        return self._scorer.pick(torch.from_numpy(logits_BV), count, self._choose).numpy()

    def _choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        if self._uniform is None:
            return greedy(logits_BV)
        p = self._request.plan.sampling.distribution(logits_BV)
        return draw(p, torch.from_numpy(self._uniform(1))[:, 0])
