"""The draft tree: beam expansion, tree masks and the accepted path.

Pure tensor functions with static shapes and no host reads: `by_entries` calls them, and the pass
`build_period` traces them into the period's graph. A tree of `period` K and `width` w has N =
(K - 1) w + 1 nodes, level-major: node 0 is the root (the last committed token), level d holds the w
best continuations of d tokens, best first. A chain is a tree of width 1. The cache slot of node j
is `length + j`; its position is `length + depth(j)`.

Shape letters: `B` rows, `N` nodes, `W` beams of a level (1 for the root's, else w), `K` tokens of a
path, the root included, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sirius_runtime.sizes import node_count


class Tree(NamedTuple):
    """A draft tree. Nodes that are not drafted yet see only themselves, and have depth -1.

    `tokens` and `parents` [B, N] int64; `scores` [B, N] float32: the sum of the tokens' log
    probabilities on the node's path; `mask` [B, N, N] int64: for query node i and key node j, the
    depth of i minus that of j, and -1 where j is neither i nor its ancestor.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    mask: Tensor

    @property
    def depth(self) -> Tensor:
        """Depth of each node [B, N]: 0 for the root, -1 for a node that is not drafted."""
        return self.mask[:, :, 0]


class Level(NamedTuple):
    """The nodes of a new level, best first; all [B, w]. `scores` are those of whole paths."""

    tokens: Tensor
    parents: Tensor
    scores: Tensor


class Path(NamedTuple):
    """An accepted path: its last node [B], that node's depth [B], and its nodes [B, K].

    Entries of `nodes` beyond the depth are 0.
    """

    last: Tensor
    depth: Tensor
    nodes: Tensor


def plant(root_B: Tensor, period: int, width: int) -> Tree:
    """A tree that has only its root, with room for all nodes."""
    B, N, device = root_B.shape[0], node_count(period, width), root_B.device
    is_root = torch.arange(N, device=device) == 0
    alone = torch.eye(N, dtype=torch.int64, device=device) - 1
    return Tree(
        tokens=root_B[:, None] * is_root,
        parents=torch.zeros(B, N, dtype=torch.int64, device=device),
        scores=torch.zeros(B, N, dtype=torch.float32, device=device),
        mask=alone.expand(B, N, N).clone(),
    )


def beams(level: Tensor, width: int, count: int) -> Tensor:
    """Node indices [count] of a level (int64 []): one for level 0, the root, `width` for others."""
    first = ((level - 1) * width + 1).clamp(min=0)
    return first + torch.arange(count, device=level.device)


def propose(
    tree: Tree, logits_BWV: Tensor, level: Tensor, width: int, temperature: Tensor | float
) -> Level:
    """The `width` best nodes of `level` (int64 [], from 1), by the sparse logits of the level
    above.

    Every beam proposes its likeliest tokens; of all paths, those with the largest sum of
    log_softmax(logits / temperature) are kept (Sirius, arXiv 2409.03856, section 4).
    """
    above = beams(level - 1, width, logits_BWV.shape[1])
    log_p = (logits_BWV.float() / temperature).log_softmax(-1)
    gains, tokens = _largest(log_p, width)
    scores, index = _largest((tree.scores[:, above, None] + gains).flatten(1), width)
    parents = above[index // width]
    return Level(tokens.flatten(1).gather(1, index), parents, scores)


def attach(tree: Tree, new: Level, level: Tensor) -> Tree:
    """`tree` with the nodes of `level` (int64 []) filled in."""
    width, N = new.tokens.shape[1], tree.tokens.shape[1]
    nodes = beams(level, width, width)
    above = tree.mask.gather(1, new.parents[:, :, None].expand(-1, -1, N))
    mask = torch.where(above >= 0, above + 1, -1)
    own = torch.arange(N, device=nodes.device) == nodes[:, None]
    return Tree(
        tokens=tree.tokens.index_copy(1, nodes, new.tokens),
        parents=tree.parents.index_copy(1, nodes, new.parents),
        scores=tree.scores.index_copy(1, nodes, new.scores),
        mask=tree.mask.index_copy(1, nodes, mask.masked_fill(own, 0)),
    )


def longest_path(tree: Tree, passes_BN: Tensor, deepest_B: Tensor, period: int) -> Path:
    """The longest path whose tokens all pass; ties go to the higher score.

    `passes_BN` bool; `deepest_B` int64: the greatest depth that counts; `period` K. The root always
    passes, and a node that is not drafted never does.
    """
    N = tree.tokens.shape[1]
    node_N = torch.arange(N, device=passes_BN.device)
    refused = passes_BN.logical_not() & (node_N > 0)
    reached = ((tree.mask >= 0) & refused[:, None, :]).sum(-1) == 0
    depth = torch.where(reached & (tree.depth <= deepest_B[:, None]), tree.depth, -1)
    longest = depth.amax(1)
    candidates = depth == longest[:, None]
    # A candidate's score may be -inf, if processors forbid its token.
    scores = tree.scores.clamp(min=torch.finfo(tree.scores.dtype).min)
    last = scores.masked_fill(candidates.logical_not(), float("-inf")).argmax(1)
    above = tree.mask.gather(1, last[:, None, None].expand(-1, 1, N))[:, 0]
    # Scatters the path's nodes to their depths; other nodes go to an extra last column.
    target = torch.where(above >= 0, longest[:, None] - above, period)
    empty = torch.zeros_like(last)[:, None].expand(-1, period + 1)
    nodes = empty.scatter(1, target, node_N.expand(target.shape))[:, :period]
    return Path(last, longest, nodes)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values along the last dimension, and their indices.

    For `count` 1 it is the first of equal values, as in the full path's `argmax`; `topk` does not
    specify which one it takes.
    """
    if count == 1:
        index = values.argmax(-1, keepdim=True)
        return values.gather(-1, index), index
    found = values.topk(count, -1)
    return found.values, found.indices
