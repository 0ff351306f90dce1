"""A Session whose periods each run as the one graph `period`, state in and state out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sirius_runtime.plan import Plan
from sirius_runtime.session import Backend, Outcome, Pick, Session, greedy
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import Phase, StatsRecorder


class PeriodSession(Session):
    """As `Session`, within the back end's `limits`.

    Where the graph was compiled for a number of rows, the batch is filled up with rows that are
    never active; nothing of them is returned.
    """

    resizable: ClassVar[bool] = False

    def __init__(
        self,
        backend: Backend,
        rows: int,
        capacity: int,
        recorder: StatsRecorder,
        *,
        refresh: int = 0,
    ) -> None:
        """As `Session`; a graph that was compiled for its own number of slots has that many."""
        assert backend.limits is not None
        self._limits = backend.limits
        if self._limits.context is not None:
            capacity = cache_slots(
                self._limits.context, self._limits.period, self._limits.tree_width
            )
        super().__init__(backend, rows, capacity, recorder, refresh=refresh)
        self._rows = rows

    def prefill(self, prompts: Sequence[Sequence[int]], pick: Pick = greedy) -> Tensor:
        first = super().prefill(prompts, pick)
        spare = (self._limits.rows or self._rows) - self._rows
        if spare:
            self._state = {name: _filled(value, spare, 1) for name, value in self._state.items()}
            if self._statistic is not None:
                self._statistic = _filled(self._statistic, spare, 1)
            self.length, self.root = _filled(self.length, spare), _filled(self.root, spare)
            self.active = _filled(self.active, spare)
        return first

    def period(self, plan: Plan, most_B: Tensor) -> Outcome:
        """One period, in one call of the graph."""
        rows, device = self.root.shape[0], self._backend.device
        # A row that commits nothing still has its root.
        most = torch.ones(rows, dtype=torch.int64, device=device)
        most[: self._rows] = most_B
        noise = torch.zeros(rows, 2, self._limits.period, dtype=torch.float64, device=device)
        if plan.noise is not None:
            noise[: self._rows, :, : plan.noise.shape[2]] = plan.noise
        due = self._count_period()
        inputs = {
            "root": self.root,
            "active": self.active,
            "most": most,
            "length": self.length,
            "noise": noise,
            **plan.tensors(device),
            **self._state,
        }
        if self._statistic is not None:
            inputs |= {"statistic": self._statistic, "refresh": torch.tensor(due, device=device)}
        with self._recorder.clock(Phase.PERIOD):
            result = self._backend.run("period", inputs)
        self._write("k_cache", result["k_kept"])
        self._write("v_cache", result["v_kept"])
        self.root, self.length = result["root"], result["length"]
        self._statistic = result.get("statistic")
        if "neurons" in result:
            self._state["neurons"] = result["neurons"]
        if "kept" in result:
            self._kept += result["kept"].sum(1)
            self._kept_tokens += result["drafted"].sum()
        self._recorder.draft_steps += int(result["levels"])
        self._recorder.full_passes += 1
        mine = slice(self._rows)
        return Outcome.of(result["tokens"][mine], result["advance"][mine], result["drafted"][mine])

    def set_active(self, active_B: Tensor) -> None:
        super().set_active(_filled(active_B, self.root.shape[0] - self._rows))


def _filled(value: Tensor, count: int, dim: int = 0) -> Tensor:
    """`value` with `count` rows of zeros after it."""
    shape = list(value.shape)
    shape[dim] = count
    return torch.cat([value, value.new_zeros(shape)], dim)
