"""Runs periods and steps over tensors with fixed addresses, so that a device can replay them."""

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
    """Runs work on the device, directly or from a recording of it."""

    def __call__(self, key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Has the effect of one call of `work`. Over one state, equal keys mean equal work.
        `state`: the tensors that `work` changes, to be restored if it runs more than once.
        """
        ...


def run_at_once(key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
    """A `Replay` that records nothing and calls `work`."""
    work()


class Storage:
    """Tensors with fixed addresses, for periods of at most `period` tokens (K) over one state.

    `own`: the state's tensors, without the caches, which are written in place anyway; the host's
    inputs (`most` [B], `noise` [B, 2, K]); and the output `Outcome.packed` of each strategy.
    """

    def __init__(self, state: TensorState, period: int, replay: Replay) -> None:
        self.state, self.period, self.replay = state, period, replay
        noise = torch.zeros(state.rows, 2, period, dtype=torch.float64, device=state.root.device)
        self.own = {"noise": noise}
        self.counts: dict[Hashable, Outcome] = {}

    def hold(self, name: str, value: Tensor) -> Tensor:
        """Copies `value` to the fixed tensor `name` (made at the first call), and returns that."""
        own = self.own.get(name)
        if own is None:
            own = self.own[name] = value.clone()
        elif own is not value:
            own.copy_(value)
        return own

    def settle(self) -> None:
        """Copies the state to its fixed tensors."""
        for name in (*ROWS_OF, "kept", "kept_tokens"):
            value = getattr(self.state, name)
            if value is not None and not name.endswith("_cache"):
                setattr(self.state, name, self.hold(name, value))


_PHASES = {Way.DRAFT: Phase.PERIOD, Way.DENSE: Phase.VERIFY, Way.SPARSE: Phase.DRAFT}


@dataclass(frozen=True)
class Recorded:
    """Runs another strategy's periods through `Storage.replay`, which may record each kind once.

    A recording reads nothing back from the device, and its shapes are fixed, so every period drafts
    all K - 1 levels. Where drafts stop early, or a row may commit less, the levels without a live
    row do not count but still cost time. The host decides whether neurons are chosen again after a
    period; such periods have another recording. The next period overwrites the outcome's tensors.
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
            # No times are measured within a recording, so this clock is not read.
            outcome = self.inner.period(state, own, most, PhaseClock(torch.device("cpu")))
            packed = storage.hold(f"packed {self.way}", outcome.packed)
            storage.counts[key] = replace(outcome, packed=packed, evidence=None)
            storage.settle()

        with clock(_PHASES[self.way]):
            storage.replay(key, work, list(storage.own.values()))
        return storage.counts[key]
