"""Random drafts of any shape, as the runtime holds them and as `tests.support.naive_tree` does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.policy import Draft
from sirius_runtime.sizes import node_count
from sirius_runtime.tree import Level, Tree, attach, beams, plant
from tests.support.naive_tree import NaiveTree


def build(root_B: Tensor, levels: list[Level], size: int, width: int) -> Tree:
    """The roots with these levels below them."""
    tree = plant(root_B, size, width)
    for depth, level in enumerate(levels, start=1):
        tree = attach(tree, level, torch.tensor(depth))
    return tree


@dataclass
class RandomDraft:
    """A tree whose nodes have any parents in the level above, and the full path's logits.

    The last levels may not be drafted, and of those that are a row may have the first ones only.
    Few words, so that some drafted tokens are the likeliest ones.
    """

    size: int
    width: int
    levels: list[Level]
    draft: Draft
    logits: Tensor

    @property
    def rows(self) -> int:
        return self.draft.depth.shape[0]

    def naive(self, row: int) -> NaiveTree:
        """The drafted nodes of one row, those included that do not count for it."""
        tokens = [int(self.draft.tree.tokens[row, 0])]
        parents, scores = [-1], [0.0]
        for level in self.levels:
            tokens += level.tokens[row].tolist()
            parents += level.parents[row].tolist()
            scores += level.scores[row].tolist()
        return NaiveTree(tokens, parents, scores)


@st.composite
def random_drafts(
    draw: st.DrawFn, widths: tuple[int, int] = (1, 8), vocabulary: int = 4
) -> RandomDraft:
    """Drafts of 1 to 3 rows, of sizes 1 to 9 and of these widths."""
    B, width, size = draw(st.integers(1, 3)), draw(st.integers(*widths)), draw(st.integers(1, 9))
    drafted = draw(st.integers(0, size - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    levels = []
    for depth in range(1, drafted + 1):
        above = beams(torch.tensor(depth - 1), width, 1 if depth == 1 else width)
        levels.append(
            Level(
                tokens=random(vocabulary, B, width),
                parents=above[random(len(above), B, width)],
                scores=-torch.rand(B, width, generator=generator) - depth,
            )
        )
    tree = build(random(vocabulary, B), levels, size, width)
    logits = 2 * torch.randn(B, node_count(size, width), vocabulary, generator=generator)
    return RandomDraft(
        size, width, levels, Draft(tree, random(drafted + 1, B), distributions=None), logits
    )
