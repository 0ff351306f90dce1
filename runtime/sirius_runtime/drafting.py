"""Drafting: how the sparse path's logits become the next level of the draft tree, and when a row
stops.

Pure tensor functions with static shapes and no host reads, like `tree` and `policy`; shape letters
as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sirius_runtime.policy import Draft, Noise, draw
from sirius_runtime.sampling import Sampling, Scalar
from sirius_runtime.sizes import node_count
from sirius_runtime.tree import Level, Tree, attach, beams, plant, propose


class Proposer(Protocol):
    """Chooses the nodes of `level` (int64 [], from 1) by the sparse logits [B, W, V] above it.

    Also returns the distribution [B, V] that a token was drawn from, None where none was.
    """

    def propose(
        self, tree: Tree, logits_BWV: Tensor, level: Tensor, width: int
    ) -> tuple[Level, Tensor | None]: ...


@dataclass(frozen=True)
class BeamProposer:
    """The `width` best paths, scored at the verify temperature; for width 1 the likeliest token."""

    temperature: Scalar

    def propose(
        self, tree: Tree, logits_BWV: Tensor, level: Tensor, width: int
    ) -> tuple[Level, Tensor | None]:
        return propose(tree, logits_BWV, level, width, self.temperature), None


@dataclass(frozen=True)
class SampleProposer:
    """A chain whose tokens are drawn from the sparse path's own distribution."""

    sampling: Sampling
    noise: Noise
    temperature: Scalar

    def propose(
        self, tree: Tree, logits_BWV: Tensor, level: Tensor, width: int
    ) -> tuple[Level, Tensor | None]:
        assert width == 1, "a tree's candidates are not drawn"
        q = self.sampling.distribution(logits_BWV[:, 0])
        # A sparse path that computes NaN is sure of token 0: a draft may be of any distribution.
        sure = (torch.arange(q.shape[-1], device=q.device) == 0).to(q.dtype)
        q = torch.where(q == q, q, sure)
        token = draw(q, self.noise.draft.index_select(1, level[None] - 1)[:, 0])[:, None]
        log_p = (logits_BWV[:, 0].float() / self.temperature).log_softmax(-1)
        above = beams(level - 1, 1, 1)
        score = tree.scores.index_select(1, above) + log_p.gather(1, token)
        return Level(token, above.expand(token.shape), score), q


class DraftState(NamedTuple):
    """A draft in progress: as `Draft`, and `live` [B] bool: the rows that draft on."""

    tree: Tree
    depth: Tensor
    live: Tensor
    distributions: Tensor | None

    @property
    def draft(self) -> Draft:
        """What is drafted so far."""
        return Draft(self.tree, self.depth, self.distributions)


def begin(
    root_B: Tensor,
    active_B: Tensor,
    most_B: Tensor,
    *,
    size: int,
    width: int,
    sampled_from: int | None = None,
) -> DraftState:
    """The roots, with room for `size` - 1 levels. Rows that may commit more than one token draft;
    `most_B` is at least 1.

    `sampled_from`: the vocabulary size, where tokens will be drawn.
    """
    depth = torch.zeros_like(root_B)
    distributions = None
    if sampled_from is not None:
        distributions = torch.zeros(
            root_B.shape[0], size - 1, sampled_from, dtype=torch.float32, device=root_B.device
        )
    return DraftState(plant(root_B, size, width), depth, active_B & (most_B > 1), distributions)


def extend(
    state: DraftState,
    logits_BWV: Tensor,
    level: Tensor,
    width: int,
    proposer: Proposer,
    most_B: Tensor,
    confidence: Tensor,
) -> DraftState:
    """`state` with one level more; it counts for the rows that were live.

    A row drafts on while the probability of its best path, which is the sparse path's confidence in
    the draft, is at least `confidence` (float32 []; 0 never stops), and while it may commit
    more: `most_B` tokens, its own next root included. The level that falls below still counts: it
    is drafted, and leaving it out for what it holds would bias sampling.
    """
    new, distribution = proposer.propose(state.tree, logits_BWV, level, width)
    depth = state.depth + state.live
    distributions = state.distributions
    if distributions is not None and distribution is not None:
        distributions = distributions.index_copy(1, level[None] - 1, distribution[:, None])
    live = state.live & (new.scores[:, 0] >= confidence.log()) & (depth < most_B - 1)
    return DraftState(attach(state.tree, new, level), depth, live, distributions)


def first_levels(draft: Draft, levels: int, width: int) -> Draft:
    """The draft without the levels after the first `levels`, which were never drafted."""
    N, tree = node_count(levels + 1, width), draft.tree
    tree = Tree(tree.tokens[:, :N], tree.parents[:, :N], tree.scores[:, :N], tree.mask[:, :N, :N])
    q = None if draft.distributions is None else draft.distributions[:, :levels]
    return Draft(tree, draft.depth, q)
