"""Acceptance, correction and neuron choice: pure tensor functions with static shapes, no host
reads.

The Session calls them; nothing here knows of caches or graphs. Shape letters: `B` rows, `K` tokens
of a period's chunk (the root and K - 1 drafted tokens), `V` vocabulary, `I` neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sirius_runtime.errors import ConfigError


class Acceptance(Protocol):
    """Decides which drafted tokens pass."""

    def passes(self, logits_BKV: Tensor, drafted_BK: Tensor) -> Tensor:
        """True [B, K - 1] where the drafted token passes; its full-path logits stand beside it."""
        ...


@dataclass(frozen=True)
class ThresholdAcceptance:
    """Sirius' rule: a token passes if softmax(full logits / temperature) gives it >= threshold.

    arXiv 2409.03856, section 4; the reference uses a threshold of 0.1 and a temperature of 0.6.
    A threshold of 0 accepts all, one above 1 none.
    """

    threshold: float
    temperature: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0.0:
            raise ConfigError(f"threshold must be >= 0, got {self.threshold}")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"verify_temperature must be > 0, got {self.temperature}")

    def passes(self, logits_BKV: Tensor, drafted_BK: Tensor) -> Tensor:
        scaled = logits_BKV.float() / self.temperature
        chosen = scaled.gather(-1, drafted_BK[..., None])[..., 0]
        return (chosen - scaled.logsumexp(-1)).exp() >= self.threshold


@dataclass(frozen=True)
class ExactAcceptance:
    """A token passes if it is the full path's argmax: the output is the dense greedy one."""

    def passes(self, logits_BKV: Tensor, drafted_BK: Tensor) -> Tensor:
        return logits_BKV.argmax(-1) == drafted_BK


@dataclass(frozen=True)
class Verdict:
    """What a period commits: the first `advance` [B] of `tokens` [B, K]; the last of them is `root`
    [B].
    """

    tokens: Tensor
    advance: Tensor
    root: Tensor


def judge(
    chunk_BK: Tensor, logits_BKV: Tensor, acceptance: Acceptance, most_B: Tensor | None = None
) -> Verdict:
    """Accepts the leading run of drafted tokens that pass, and corrects the one after it.

    `chunk_BK` is [root, s_1 .. s_{K-1}], `logits_BKV` the full path's logits after each of its
    tokens. The correction is the argmax after the last kept token: it replaces the first refused
    token, or is a bonus where all pass. A row commits `most_B` tokens at the most, as if that were
    the size of its chunk.
    """
    drafted = chunk_BK[:, 1:]
    passes = acceptance.passes(logits_BKV[:, :-1], drafted)
    # A running count of refusals rather than a running product of passes: ONNX has no product scan.
    accepted = (passes.logical_not().cumsum(1) == 0).sum(1)
    if most_B is not None:
        accepted = accepted.minimum(most_B - 1)
    after_kept = accepted[:, None, None].expand(-1, 1, logits_BKV.shape[-1])
    correction = logits_BKV.gather(1, after_kept)[:, 0].argmax(-1)
    tokens = torch.cat([drafted, torch.zeros_like(chunk_BK[:, :1])], 1)
    tokens = tokens.scatter(1, accepted[:, None], correction[:, None])
    return Verdict(tokens, accepted + 1, correction)


def chain_mask(tokens: int, device: torch.device) -> Tensor:
    """The tree mask [1, T, T] of a chain: each token's distance to those before it, -1 after it."""
    index = torch.arange(tokens, device=device)
    distance = index[:, None] - index[None, :]
    return distance.clamp(min=-1)[None]


def select_neurons(statistic: Tensor, count: int) -> Tensor:
    """The `count` neurons of largest statistic [layers, B, I], ascending, int64 [layers, B,
    count].
    """
    return statistic.topk(count, -1, sorted=False).indices.sort(-1).values
