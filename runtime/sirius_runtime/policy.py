"""Acceptance, correction, sampling and neuron choice: pure tensor functions with static shapes, no
host reads.

`by_entries` calls them, and the pass `build_period` traces them into the period's graph. Shape
letters: `B` rows, `N` nodes of a draft tree, `K` tokens of a path, `V` vocabulary, `I` neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.tree import Tree, longest_path


class Draft(NamedTuple):
    """The sparse path's draft.

    `depth` [B] int64: the number of levels that count for each row. `distributions` [B, K - 1, V]:
    for a sampled chain, the distribution that each token was drawn from; else None.
    """

    tree: Tree
    depth: Tensor
    distributions: Tensor | None


class Decision(NamedTuple):
    """The full path's decision on a draft, node by node.

    `passes` [B, N] bool: the node's token is accepted if its parent's is. `corrections` [B, N]
    int64: the token to emit after the node if a child was refused. `bonuses` [B, N] int64: the
    token to emit after the node if no child was judged, because the draft ends there.
    """

    passes: Tensor
    corrections: Tensor
    bonuses: Tensor


Decide = Callable[[Draft, Tensor], Decision]
"""Decides which drafted tokens pass, from the draft and the full path's logits [B, N, V] after each
node.
"""


class Verdict(NamedTuple):
    """The tokens that a period commits: the first `advance` [B] of `tokens` [B, K]; the last of
    these is `root` [B], the next root. `nodes` [B, K]: the accepted path through the tree, from the
    root, and 0 after its end.
    """

    tokens: Tensor
    advance: Tensor
    root: Tensor
    nodes: Tensor


def judge(draft: Draft, logits_BNV: Tensor, decide: Decide, most_B: Tensor, period: int) -> Verdict:
    """Accepts the longest path of tokens that pass, and emits one token of the full path after it.

    The emitted token comes from the logits after the last accepted node: it corrects the refused
    token, or is a bonus where the whole draft was accepted. A row commits at most `most_B` tokens
    (1 or more), as if that were its period. `draft.depth` must not exceed the levels of the tree.
    `period` is K.
    """
    decision = decide(draft, logits_BNV)
    deepest = draft.depth.minimum(most_B - 1)
    path = longest_path(draft.tree, decision.passes, deepest, period)
    last = path.last[:, None]
    root = torch.where(
        path.depth < deepest,
        decision.corrections.gather(1, last)[:, 0],
        decision.bonuses.gather(1, last)[:, 0],
    )
    kept = draft.tree.tokens.gather(1, path.nodes[:, 1:])
    tokens = torch.cat([kept, torch.zeros_like(last)], 1).scatter(
        1, path.depth[:, None], root[:, None]
    )
    return Verdict(tokens, path.depth + 1, root, path.nodes)


def likeliest(logits: Tensor) -> Tensor:
    """The token [...] with the largest of logits [..., V], the first of equal ones. `NO_TOKEN`
    where the largest is NaN or infinite, so that the host sees it without another device read.
    """
    logits = logits.float()  # the max of bfloat16 takes five times as long
    token = logits.argmax(-1)
    return _if_finite(logits.gather(-1, token[..., None])[..., 0], token)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws an index from unnormalised `weights` [..., V] for each `uniform` number [...], by the
    inverse of the cumulative distribution. Never an index of weight 0, unless all are 0 (then the
    last). `NO_TOKEN` where the sum is NaN or infinite.
    """
    # float32 sums over a large vocabulary would shift the tail's probabilities.
    sums = weights.double().cumsum(-1)
    below = sums <= (uniform * sums[..., -1])[..., None]
    return _if_finite(sums[..., -1], below.sum(-1).clamp(max=weights.shape[-1] - 1))


def select_neurons(statistic: Tensor, count: int) -> Tensor:
    """The indices of the `count` neurons with the largest statistic [layers, B, I], ascending:
    int64 [layers, B, count].
    """
    return statistic.topk(count, -1, sorted=False).indices.sort(-1).values


def observed(activity: Tensor, nodes_BK: Tensor, advance_B: Tensor) -> Tensor:
    """GRIFFIN's statistic [layers, B, I] over the tokens that a period ran and accepted.

    `activity` [layers, B, N, I]: the term of each node (`dense_mlp_activity`). `nodes_BK`: the
    accepted path, whose first `advance_B` entries are its nodes.
    """
    kept = torch.arange(nodes_BK.shape[1], device=nodes_BK.device) < advance_B[:, None]
    weights = activity.new_zeros(activity.shape[1:3]).scatter_add(
        1, nodes_BK, kept.to(activity.dtype)
    )
    return torch.einsum("lbni,bn->lbi", activity, weights)


def _if_finite(value: Tensor, token: Tensor) -> Tensor:
    """`token` where `value` is finite, else `NO_TOKEN`."""
    return torch.where(value - value == 0, token, NO_TOKEN)


def is_choice(choice_BN: Tensor, tree: Tree) -> Tensor:
    """Whether each node's token is the one chosen after its parent: bool [B, N]."""
    return choice_BN.gather(1, tree.parents) == tree.tokens


def after_parent(values_BNV: Tensor, tree: Tree) -> Tensor:
    """The value [B, N] of each node's token in `values_BNV` at its parent."""
    V = values_BNV.shape[-1]
    return values_BNV.flatten(1).gather(1, tree.parents * V + tree.tokens)
