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
    """What the sparse path proposes.

    `depth` [B] int64: the levels that count for each row. `distributions` [B, K - 1, V]: of a
    sampled chain, the distribution that each token was drawn from; else None.
    """

    tree: Tree
    depth: Tensor
    distributions: Tensor | None


class Decision(NamedTuple):
    """The full path's decision on a draft, node by node.

    `passes` [B, N] bool: the node's token is kept if its parent's is. `corrections` [B, N] int64:
    the token to emit after the node if a child was refused. `bonuses`: the same if no child was
    judged.
    """

    passes: Tensor
    corrections: Tensor
    bonuses: Tensor


Decide = Callable[[Draft, Tensor], Decision]
"""Which drafted tokens pass, by the full path's logits after each node [B, N, V]."""


class Verdict(NamedTuple):
    """What a period commits: the first `advance` [B] of `tokens` [B, K]; the last of them is `root`
    [B]. `nodes` [B, K]: the kept path through the tree, root first, 0 after its end.
    """

    tokens: Tensor
    advance: Tensor
    root: Tensor
    nodes: Tensor


def judge(draft: Draft, logits_BNV: Tensor, decide: Decide, most_B: Tensor, period: int) -> Verdict:
    """Keeps the longest path of tokens that pass, and emits one token of the full path after it.

    The emitted token comes from the logits of the last kept node: it corrects the token that was
    refused there, or is a bonus where the path ends with the draft. A row commits at most `most_B`
    tokens (1 or more), as if that were its period; `draft.depth` is within the levels that the
    draft has. `period` is K.
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
    """The token [...] of the largest of logits [..., V], the first of equals; `NO_TOKEN` where the
    largest is NaN or infinite. The host finds it in what it reads anyway.
    """
    logits = logits.float()  # the max of bfloat16 takes five times as long
    token = logits.argmax(-1)
    return _if_finite(logits.gather(-1, token[..., None])[..., 0], token)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index of `weights` [..., V], unnormalised, per `uniform` number [...], by the inverse of
    the distribution function; never one of weight 0 (where all are 0, the last). `NO_TOKEN` where
    their sum is NaN or infinite.
    """
    # float32 sums over a large vocabulary would shift the tail's probabilities.
    sums = weights.double().cumsum(-1)
    below = sums <= (uniform * sums[..., -1])[..., None]
    return _if_finite(sums[..., -1], below.sum(-1).clamp(max=weights.shape[-1] - 1))


def select_neurons(statistic: Tensor, count: int) -> Tensor:
    """The `count` neurons of largest statistic [layers, B, I], ascending, int64 [layers, B,
    count].
    """
    return statistic.topk(count, -1, sorted=False).indices.sort(-1).values


def observed(activity: Tensor, nodes_BK: Tensor, advance_B: Tensor) -> Tensor:
    """GRIFFIN's statistic [layers, B, I] of the tokens that a period ran and kept.

    `activity` [layers, B, N, I]: the terms of the nodes (`dense_mlp_activity`); `nodes_BK`: the
    kept path, of which the first `advance_B` nodes were run.
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
    """Whether each node's token [B, N] is what was chosen after its parent."""
    return choice_BN.gather(1, tree.parents) == tree.tokens


def after_parent(values_BNV: Tensor, tree: Tree) -> Tensor:
    """The value [B, N] that each node's token has after its parent."""
    V = values_BNV.shape[-1]
    return values_BNV.flatten(1).gather(1, tree.parents * V + tree.tokens)
