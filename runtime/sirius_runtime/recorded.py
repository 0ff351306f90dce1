"""Periods and steps from fixed storage to fixed storage, so that a device can replay them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sirius_runtime.decoder import Outcome, Strategy, Way
from sirius_runtime.plan import Plan
from sirius_runtime.stats import Phase, PhaseClock
from sirius_runtime.tensor_state import ROWS_OF, TensorState


class Replay(Protocol):
    """Runs work on the device: as it is, or by a recording that was made of it."""

    def __call__(self, key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Does what `work` does. Within a session, equal keys mean equal work. `state`: the tensors
        that a second run of it would change again.
        """
        ...


def run_at_once(key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
    """The `Replay` that records nothing."""
    work()


class Storage:
    """Tensors made once, for periods of at most `period` tokens (K) over one state.

    `own`: the state's tensors, but for the caches, which are written in place anyway; what the host
    gives (`most` [B], `noise` [B, 2, K]); and what it reads, `packed` of `Outcome`, by strategy.
    """

    def __init__(self, state: TensorState, period: int, replay: Replay) -> None:
        self.state, self.period, self.replay = state, period, replay
        noise = torch.zeros(state.rows, 2, period, dtype=torch.float64, device=state.root.device)
        self.own = {"noise": noise}
        self.counts: dict[Hashable, Outcome] = {}

    def hold(self, name: str, value: Tensor) -> Tensor:
        """The tensor that was first made for `name`, with this value."""
        own = self.own.get(name)
        if own is None:
            own = self.own[name] = value.clone()
        elif own is not value:
            own.copy_(value)
        return own

    def settle(self) -> None:
        """Moves the state into its own tensors."""
        for name in (*ROWS_OF, "kept", "kept_tokens"):
            value = getattr(self.state, name)
            if value is not None and not name.endswith("_cache"):
                setattr(self.state, name, self.hold(name, value))


_PHASES = {Way.DRAFT: Phase.PERIOD, Way.DENSE: Phase.VERIFY, Way.SPARSE: Phase.DRAFT}


@dataclass(frozen=True)
class Recorded:
    """Runs another strategy's periods; equal ones are recorded once, by `Storage.replay`.

    A recording reads nothing back from the device, and all its shapes are fixed: every period
    drafts all K - 1 levels. Where drafts stop early, or a row may commit less, the levels without a
    live row do not count, but still cost time. The host decides whether neurons are chosen again
    after a period; such a period is recorded apart. The tensors of the outcome are overwritten by
    the next period.
    """

    way: Way
    inner: Strategy
    storage: Storage

    def period(self, state: TensorState, plan: Plan, most_B: Tensor, clock: PhaseClock) -> Outcome:
        storage = self.storage
        assert plan.period <= storage.period
        storage.settle()
        most = storage.hold("most", most_B)
        own = replace(plan, period=storage.period) if self.way is Way.DRAFT else plan
        key = self.way, replace(own, noise=None), plan.noise is None
        if plan.noise is not None:
            noise = storage.own["noise"]
            noise[:, : plan.noise.shape[1], : plan.noise.shape[2]].copy_(plan.noise)
            own = replace(own, noise=noise)

        def work() -> None:
            # Times within a recording are not measured.
            outcome = self.inner.period(state, own, most, PhaseClock(torch.device("cpu")))
            packed = storage.hold(f"packed {self.way}", outcome.packed)
            storage.counts[key] = replace(outcome, packed=packed, evidence=None)
            storage.settle()

        with clock(_PHASES[self.way]):
            storage.replay(key, work, list(storage.own.values()))
        return storage.counts[key]
