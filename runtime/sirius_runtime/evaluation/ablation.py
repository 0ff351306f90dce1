"""What `sirius ablate` takes out of the algorithm: strategies that differ from `ByEntries` in one
thing each, and a model that runs its periods by one of them.

They are for measurement only: no option of `generate` selects them, and the runtime's own strategy
does not know of them. Shape letters as in `by_entries`; `G` K/V heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sirius_runtime.by_entries import ByEntries, TreeState
from sirius_runtime.decoder import Backend, Decoder, Way
from sirius_runtime.errors import ConfigError
from sirius_runtime.model import SiriusModel
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, Verdict, judge
from sirius_runtime.request import Request
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import TensorState


class WithoutRewriting(ByEntries):
    """KV rewriting off: tokens that the sparse path ran keep its K/V when they are committed.

    Verification itself is as ever: a drafted token attends to the full path's K/V of the tokens
    before it in its period, and to what earlier periods left of those before. The last drafted
    token has the full path's K/V, because the sparse path proposed it but never ran it.
    """

    def verify(self, state: TreeState, plan: Plan, draft: Draft) -> dict[str, Tensor]:
        assert isinstance(state, TensorState)
        own = torch.arange(draft.tree.tokens.shape[1], device=state.length.device)
        slots = (state.length[:, None] + own)[None, :, None, :, None]
        # By row: a batch may have run more levels than a row's draft has.
        ran = (draft.tree.depth < draft.depth[:, None])[None, :, None, :, None]
        caches = state.k_cache, state.v_cache

        def block(cache: Tensor) -> Tensor:
            return cache.gather(3, slots.expand(*cache.shape[:3], -1, cache.shape[4]))

        sparse = [block(cache) for cache in caches]
        result = super().verify(state, plan, draft)
        kept = (torch.where(ran, s, block(c)) for s, c in zip(sparse, caches, strict=True))
        state.write(*kept)
        return result


class WholePeriods(ByEntries):
    """Rollback of whole periods: a draft of which any token is refused is dropped with all tokens
    before that one. The full path's own token after the root is then the only one of the period.
    Of a tree, a path is kept only if it reaches the last level.
    """

    def judge(self, draft: Draft, logits_BNV: Tensor, plan: Plan, most_B: Tensor) -> Verdict:
        decision = plan.decide(draft, logits_BNV)
        verdict = judge(draft, logits_BNV, lambda *_: decision, most_B, plan.period)
        whole = verdict.advance > draft.depth.minimum(most_B - 1)
        none = decision._replace(passes=decision.passes & whole[:, None])
        return judge(draft, logits_BNV, lambda *_: none, most_B, plan.period)


_STRATEGIES: Mapping[tuple[str, str], type[ByEntries]] = {
    ("kv_rewriting", "off"): WithoutRewriting,
    ("rollback", "period"): WholePeriods,
}


def ablated(model: SiriusModel, research: Mapping[str, str]) -> SiriusModel:
    """`model` with periods that lack something: options of `modes.RESEARCH` and their values, one
    or both. It shares the weights and the back end.
    """
    kinds = [_STRATEGIES[item] for item in research.items()]
    kind = kinds[0] if len(kinds) == 1 else type("Ablated", tuple(kinds), {})
    names = ", ".join(f"{name}={value}" for name, value in research.items())
    backend = cast(Backend, _Ablated(model.backend, kind, names))
    return SiriusModel(backend, model.tokenizer, chat=model.chat)


class _Ablated:
    """A back end whose decoders draft by another strategy; all else is the inner one's."""

    def __init__(self, inner: Backend, kind: type[ByEntries], names: str) -> None:
        self._inner, self._kind, self._names = inner, kind, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        decoder = self._inner.open(request, rows, tokens, clock)
        own = decoder.ways[Way.DRAFT]
        if not isinstance(own, ByEntries):
            raise ConfigError(
                f"{self._names}: only back ends that run a period entry by entry can do this; use "
                "backend eager or inductor"
            )
        if request.lookup and issubclass(self._kind, WithoutRewriting):
            raise ConfigError(
                f"{self._names}: a looked-up draft has no K/V of the sparse path; leave lookup out"
            )
        decoder.ways[Way.DRAFT] = self._kind(own.scorer, own.all_levels)
        return decoder
