"""A batch over a model's entries, driven step by step by a test, without a decoder's host side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sirius_runtime.by_entries import ByEntries, chooser
from sirius_runtime.decoder import Backend, Outcome, Strategy, Way, steps
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, Verdict
from sirius_runtime.sampling import Sampling
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import ROWS_OF, TensorState


class Batch:
    """A state, and the strategy that runs its periods; `refresh` as of a decoder."""

    def __init__(
        self,
        backend: Backend,
        rows: int,
        slots: int,
        *,
        refresh: int = 0,
        strategy: Strategy | None = None,
    ) -> None:
        self.state = TensorState(backend, rows, slots)
        self.entries = ByEntries()
        self._strategy = strategy or self.entries
        self._steps = steps(chooser(Sampling()))
        self._clock = PhaseClock(torch.device("cpu"))
        self._refresh, self._periods = refresh, 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Caches, lengths, roots and what else there is, by name."""
        found = {name: getattr(self.state, name) for name in ROWS_OF}
        return {name: value for name, value in found.items() if value is not None}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits, _ = self.state.prefill(prompts)
        self.state.root = logits.argmax(-1)
        self.state.choose_neurons()
        return self.state.root

    def draft(self, plan: Plan, most: Tensor) -> Draft:
        return self.entries.draft(self.state, self._of_period(plan, False), most)[0]

    def verify(self, draft: Draft) -> Tensor:
        """Logits [B, N, V]."""
        return self.entries.verify(self.state, Plan(1), draft)["logits"]

    def commit(self, draft: Draft, logits: Tensor, plan: Plan, most: Tensor) -> Verdict:
        return self.entries.commit(self.state, draft, logits, plan, most)[1]

    def period(self, plan: Plan, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, K], of which `advance` [B] are committed, and the drafted levels [B]."""
        self._periods += 1
        due = self._refresh > 0 and self._periods % self._refresh == 0
        plan = self._of_period(plan, due)
        packed = self._strategy.period(self.state, plan, most, self._clock).packed
        return packed[:, :-2], packed[:, -2], packed[:, -1]

    def step(self, way: Way) -> Outcome:
        one = torch.ones(self.state.rows, dtype=torch.int64, device=self.state.root.device)
        return self._steps[way].period(self.state, Plan(1), one, self._clock)

    def set_active(self, active: Sequence[bool]) -> None:
        self.state.active = self.state.array(np.array(active))

    def _of_period(self, plan: Plan, due: bool) -> Plan:
        return replace(plan, observes=self._refresh > 0, refreshes=due)
