"""Drafting: how the sparse path's logits become the next level of the draft tree, and when a row
stops.

Pure tensor functions with static shapes and no host reads, like `tree` and `policy`; shape letters
as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sirius_runtime.policy import Draft
from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.sizes import node_count
from sirius_runtime.tree import Level, Tree, attach, plant

Propose = Callable[[Tree, Tensor, Tensor], tuple[Level, Tensor | None]]
"""Chooses the nodes of a level (int64 [], from 1) by the sparse logits [B, W, V] of the level
above. Also returns the distribution [B, V] that a token was drawn from, or None in greedy drafts.
"""


class DraftState(NamedTuple):
    """A draft in progress: the fields of `Draft`, and `live` [B] bool: rows that draft on."""

    tree: Tree
    depth: Tensor
    live: Tensor
    distributions: Tensor | None

    @property
    def draft(self) -> Draft:
        """The draft so far."""
        return Draft(self.tree, self.depth, self.distributions)


def begin(
    root_B: Tensor,
    active_B: Tensor,
    most_B: Tensor,
    *,
    period: int,
    width: int,
    sampled_from: int | None = None,
    room: int | None = None,
) -> DraftState:
    """A draft of the roots alone, with room for `period` - 1 levels. Active rows that may commit
    more than one token are live; `most_B` is at least 1.

    `sampled_from`: the vocabulary size, where tokens will be drawn; else None. `room`: the period
    that the tree has nodes for, if it is a longer one.
    """
    depth = torch.zeros_like(root_B)
    distributions = None
    if sampled_from is not None:
        distributions = torch.zeros(
            root_B.shape[0], period - 1, sampled_from, dtype=torch.float32, device=root_B.device
        )
    tree = plant(root_B, room or period, width)
    return DraftState(tree, depth, active_B & (most_B > 1), distributions)


def extend(
    state: DraftState,
    logits_BWV: Tensor,
    level: Tensor,
    propose: Propose,
    most_B: Tensor,
    confidence: Tensor,
) -> DraftState:
    """`state` with one more level, which counts for the rows that were live.

    A row drafts on while the probability of its best path (the sparse path's confidence in the
    draft) is at least `confidence` (float32 []; 0 never stops), and while it may commit more tokens
    (at most `most_B`, including its next root). The level that falls below `confidence` still
    counts: it is already drafted, and dropping it because of its tokens would bias sampling.
    """
    new, distribution = propose(state.tree, logits_BWV, level)
    depth = state.depth + state.live
    distributions = state.distributions
    if distributions is not None and distribution is not None:
        distributions = distributions.index_copy(1, level[None] - 1, distribution[:, None])
    live = state.live & (new.scores[:, 0] >= confidence.log()) & (depth < most_B - 1)
    return DraftState(attach(state.tree, new, level), depth, live, distributions)


def first_levels(draft: Draft, levels: int, width: int) -> Draft:
    """The first `levels` levels of a draft; the others were never drafted."""
    N, tree = node_count(levels + 1, width), draft.tree
    tree = Tree(tree.tokens[:, :N], tree.parents[:, :N], tree.scores[:, :N], tree.mask[:, :N, :N])
    q = None if draft.distributions is None else draft.distributions[:, :levels]
    return Draft(tree, draft.depth, q)


def with_given(draft: Draft, given_BG: Tensor) -> Draft:
    """A draft of chains, in which rows with a looked-up chain (`Plan.given`) take that chain. Where
    tokens are drawn, its tokens have the draft probability 1.
    """
    tree, q = draft.tree, draft.distributions
    B, N = tree.tokens.shape
    given = torch.full_like(tree.tokens, NO_TOKEN)
    given[:, 1 : given_BG.shape[1] + 1] = given_BG
    there, has = given >= 0, given_BG[:, :1] >= 0
    index = torch.arange(N, device=given.device)
    return Draft(
        Tree(
            tokens=torch.where(there, given, tree.tokens),
            parents=(index - 1).clamp(min=0).expand(B, N),
            scores=tree.scores.masked_fill(has, 0.0),
            mask=(index[:, None] - index).clamp(min=-1).expand(B, N, N),
        ),
        torch.where(has[:, 0], there.sum(1), draft.depth),
        None if q is None else _surely(q, given[:, 1:], has),
    )


def _surely(q_BLV: Tensor, tokens_BL: Tensor, has_B1: Tensor) -> Tensor:
    """`q`, with probability 1 for the looked-up tokens of the rows that have some."""
    sure = torch.zeros_like(q_BLV).scatter(2, tokens_BL.clamp(min=0)[:, :, None], 1.0)
    return torch.where(has_B1[:, :, None], sure, q_BLV)
