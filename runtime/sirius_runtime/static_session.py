"""A Session whose state never moves, so that a device can replay its periods from a recording."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sirius_runtime.drafting import DraftState
from sirius_runtime.plan import Plan
from sirius_runtime.sampling import Rule
from sirius_runtime.session import Backend, Outcome, Pick, Session, greedy
from sirius_runtime.stats import Phase, PhaseClock, StatsRecorder


class Replay(Protocol):
    """Runs work on the device: as it is, or by a recording that was made of it."""

    def __call__(self, key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Does what `work` does. Equal keys of one session mean the same work; `state` is all that
        two runs of it would change twice.
        """
        ...


def run_at_once(key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
    """The `Replay` that records nothing."""
    work()


class StaticSession(Session):
    """As `Session`, for periods of at most `size` tokens (K).

    A period and a step read and write tensors that are made once: the state (`length`, `root`,
    `active`, caches, neurons, statistic), what the host gives (`most` [B], `noise` [B, 2, K]) and
    what it reads (`packed` [B, K + 2], of `Outcome`). In between nothing is asked of the device and
    all shapes are fixed, so the work can be recorded, by `replay`, and replayed:

    - Every period drafts all K - 1 levels. Where drafts stop early, or a row may commit less, the
      levels that nobody is live in count for no row, as in a Session's; they still cost their time.
    - Whether neurons are chosen anew after a period is the host's to know: that is other work.
    - A prompt is run as it comes, by the Session's own `prefill`.

    `begin` makes it ready for another batch of as many rows, in the same storage.
    """

    resizable: ClassVar[bool] = False

    def __init__(
        self,
        backend: Backend,
        rows: int,
        capacity: int,
        recorder: StatsRecorder,
        *,
        size: int,
        refresh: int = 0,
        replay: Replay = run_at_once,
    ) -> None:
        # What the work itself would record, it would record when it is recorded.
        unheard = StatsRecorder(rows, 0, 0, PhaseClock(torch.device("cpu")))
        super().__init__(backend, rows, capacity, unheard, refresh=refresh)
        self._size, self._replay, self._told = size, replay, recorder
        device = backend.device
        self._most = torch.ones(rows, dtype=torch.int64, device=device)
        self._noise = torch.zeros(rows, 2, size, dtype=torch.float64, device=device)
        self._packed = torch.zeros(rows, size + 2, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None  # [B, V], of a step whose token the host draws
        self._fixed: dict[str, Tensor] = {}
        self._settle()

    def begin(self, recorder: StatsRecorder) -> None:
        """Forgets the sequences; the storage stays."""
        self._told, self._periods, self._statistic = recorder, 0, None
        self._kept.zero_()
        self._kept_tokens.zero_()
        self.active.fill_(True)

    def prefill(self, prompts: Sequence[Sequence[int]], pick: Pick = greedy) -> Tensor:
        before = self._recorder.prefill_passes
        super().prefill(prompts, pick)
        self._told.prefill_passes += self._recorder.prefill_passes - before
        self._settle()
        return self.root

    def period(self, plan: Plan, most_B: Tensor) -> Outcome:
        """One period. `plan.size` is at most K; the tensors of the outcome are overwritten by the
        next period.
        """
        assert plan.size <= self._size
        self._most.copy_(most_B)
        own = replace(plan, size=self._size, noise=None)
        if plan.noise is not None:
            self._noise.copy_(plan.noise)
        due = self._count_period()
        with self._told.clock(Phase.PERIOD):
            self._run_fixed(("period", own, due), lambda: self._fixed_period(own, due))
        self._told.draft_steps += self._size - 1
        self._told.full_passes += 1
        return Outcome(self._packed)

    def full_step(self, pick: Pick = greedy) -> Tensor:
        with self._told.clock(Phase.VERIFY):
            self._fixed_step("full", super().full_step, pick)
        self._told.full_passes += 1
        return self.root

    def sparse_step(self, pick: Pick = greedy) -> Tensor:
        with self._told.clock(Phase.DRAFT):
            self._fixed_step("sparse", super().sparse_step, pick)
        self._told.draft_steps += 1
        return self.root

    def set_active(self, active_B: Tensor) -> None:
        self.active.copy_(active_B)

    def _drafts_on(self, plan: Plan, state: DraftState) -> bool:
        return True

    def _fixed_period(self, plan: Plan, due: bool) -> None:
        """A period from the fixed tensors to the fixed tensors."""
        noise = self._noise if plan.rule is Rule.SAMPLE else None
        outcome = self._period(replace(plan, noise=noise), self._most, due)
        self._packed.copy_(outcome.packed)
        self._settle()

    def _fixed_step(self, name: str, step: Callable[[Pick], Tensor], pick: Pick) -> None:
        """A step whose token is the likeliest is one piece of work. One that the host draws takes
        its logits from the device's work, and ends outside of it.
        """
        if pick is greedy:
            self._run_fixed((name, "greedy"), lambda: self._settle_after(step, greedy))
            return
        self._run_fixed((name, "logits"), lambda: self._settle_after(step, self._put_aside))
        assert self._logits is not None
        self._advance(pick(self._logits))
        self._settle()

    def _put_aside(self, logits_BV: Tensor) -> Tensor:
        """A `Pick` that keeps the logits, and the root as it is."""
        if self._logits is None:
            self._logits = torch.empty_like(logits_BV)
        self._logits.copy_(logits_BV)
        return self.root

    def _settle_after(self, step: Callable[[Pick], Tensor], pick: Pick) -> None:
        length = self.length
        step(pick)
        if pick is not greedy:  # `_advance` is still to come
            self.length = length
        self._settle()

    def _run_fixed(self, key: Hashable, work: Callable[[], None]) -> None:
        self._replay(key, work, [*self._fixed.values(), self._kept, self._kept_tokens])

    def _settle(self) -> None:
        """Moves the state into the tensors that were made for it first."""
        self.length = self._own("length", self.length)
        self.root = self._own("root", self.root)
        self.active = self._own("active", self.active)
        if self._statistic is not None:
            self._statistic = self._own("statistic", self._statistic)
        if "neurons" in self._state:
            self._state["neurons"] = self._own("neurons", self._state["neurons"])

    def _own(self, name: str, value: Tensor) -> Tensor:
        own = self._fixed.get(name)
        if own is None:
            own = self._fixed[name] = value.clone()
        elif own is not value:
            own.copy_(value)
        return own
