"""The Session behind the seam of `decoder`: tensors inside, plain numbers outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sirius_runtime.decoder import RowPeriod, Uniform
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.period_session import PeriodSession
from sirius_runtime.plan import Plan
from sirius_runtime.policy import draw
from sirius_runtime.request import Request
from sirius_runtime.scored_session import ScoredSession
from sirius_runtime.scorer import Scorer
from sirius_runtime.session import Backend, Pick, Session, greedy
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import StatsRecorder


class TorchDecoder:
    """See `sirius_runtime.decoder.Decoder`."""

    # Its state too is made of inference tensors: compiled code tells them from others.
    @torch.inference_mode()
    def __init__(
        self,
        backend: Backend,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
        session: Session | None = None,
    ) -> None:
        """`session`: one with room for the rows; by default one is opened."""
        self._request, self._uniform, self._device = request, uniform, backend.device
        if session is None:
            session = _session(backend, request, rows, tokens, recorder)
        self._session, self.resizable = session, session.resizable

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        return self._session.prefill(prompts, self._pick).tolist()

    @torch.inference_mode()
    def period(self, plan: Plan, sizes: Sequence[int], noise: np.ndarray | None) -> list[RowPeriod]:
        if noise is not None:
            plan = replace(plan, noise=torch.from_numpy(noise).to(self._device))
        outcome = self._session.period(plan, torch.tensor(sizes, device=self._device))
        read = outcome.packed.tolist()  # the one read of device values in a period
        return [RowPeriod(tokens[:advance], drafted) for *tokens, advance, drafted in read]

    @torch.inference_mode()
    def full_step(self) -> list[int]:
        return self._session.full_step(self._pick).tolist()

    @torch.inference_mode()
    def sparse_step(self) -> list[int]:
        return self._session.sparse_step(self._pick).tolist()

    @torch.inference_mode()
    def set_active(self, active: Sequence[bool]) -> None:
        self._session.set_active(torch.tensor(active, device=self._device))

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        self._session.select(torch.tensor(rows, device=self._device))

    @torch.inference_mode()
    def logprobs(self) -> list[list[TokenLogprobs]]:
        assert isinstance(self._session, ScoredSession)
        return self._session.scorer.logprobs()

    def density(self) -> float:
        return self._session.density()

    def array(self, tokens: Sequence[Any]) -> Tensor:
        return torch.tensor(tokens)

    @property
    def _pick(self) -> Pick:
        return greedy if self._uniform is None else self._draw

    def _draw(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row, drawn with the row's own number."""
        assert self._uniform is not None
        p = self._request.plan.sampling.distribution(logits_BV)
        return draw(p, torch.from_numpy(self._uniform(1)).to(self._device)[:, 0])


def _session(
    backend: Backend, request: Request, rows: int, tokens: int, recorder: StatsRecorder
) -> Session:
    """The session that a request needs, with room for rows of `tokens`."""
    refresh, limits = request.refresh, backend.limits
    if limits is not None and request.whole_periods:
        slots = cache_slots(tokens, limits.period, max(request.widths))  # of the compiled size
        return PeriodSession(backend, rows, slots, recorder, refresh=refresh)
    slots = cache_slots(tokens, request.period, max(request.widths))
    if request.scoring is None:
        return Session(backend, rows, slots, recorder, refresh=refresh)
    vocabulary = backend.program.model.vocab_size
    scorer = Scorer(request, rows, slots, vocabulary, backend.device)
    return ScoredSession(backend, rows, slots, recorder, scorer=scorer, refresh=refresh)
