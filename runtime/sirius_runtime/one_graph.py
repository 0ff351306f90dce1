"""A period as one call of the graph `period`, which takes the state and returns the next one.

The draft loop, the tree, acceptance and rollback are in the graph (the pass `build_period`). This
module only passes the state. It is shared by the PyTorch and ONNX Runtime back ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sirius_runtime.decoder import Outcome
from sirius_runtime.entries import PERIOD
from sirius_runtime.plan import Limits, Plan
from sirius_runtime.state import State
from sirius_runtime.stats import Phase, PhaseClock


@dataclass(frozen=True)
class OneGraph:
    """The `Strategy` that calls the graph `period`. limits: those that it was compiled for."""

    limits: Limits

    def period(self, state: State, plan: Plan, most_B: object, clock: PhaseClock) -> Outcome:
        xp = state.xp
        noise = state.array(np.zeros((state.rows, 2, self.limits.period)))
        if plan.noise is not None:
            noise[:, :, : plan.noise.shape[2]] = plan.noise
        inputs = {
            "root": state.root,
            "active": state.active,
            "most": most_B,
            "noise": noise,
            "rule": state.array(np.array(state.program.period.rules.index(plan.rule))),
            "refresh": state.array(np.array(plan.refreshes)),
            **{name: state.array(np.array(*number)) for name, number in plan.inputs().items()},
        }
        with clock(Phase.PERIOD):
            result = state.run(PERIOD, inputs)
            state.write(result["k_kept"], result["v_kept"])
        state.root, state.length = result["root"], result["length"]
        state.statistic = result.get("statistic")
        if "neurons" in result:
            state.neurons = result["neurons"]
        elif plan.refreshes:
            state.choose_neurons()
        tokens, advance, drafted = result["tokens"], result["advance"], result["drafted"]
        if "kept" in result:
            state.kept = state.kept + result["kept"].sum(1)
            state.kept_tokens = state.kept_tokens + drafted.sum()
        packed = xp.concatenate([tokens, advance[:, None], drafted[:, None]], 1)
        return Outcome(packed, int(result["levels"]))
