"""The draft tree against paths written out: how it grows, who sees whom, which path is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.policy import (
    Decide,
    Draft,
    judge,
)
from sirius_runtime.sizes import node_count
from sirius_runtime.tree import Level, Tree, attach, beams, longest_path, plant, propose
from tests.support import naive_tree
from tests.support.drafts import RandomDraft, build, random_drafts
from tests.support.naive import tree_mask
from tests.support.naive_tree import Path, argmax, beam_search, continuations, probability
from tests.support.rules import exactly, threshold_of

MANY = settings(max_examples=100)  # they are cheap
VOCABULARY = 10
widths, sizes = st.integers(1, 8), st.integers(1, 9)
temperatures = st.floats(0.3, 2.0)


@dataclass(frozen=True)
class RandomModel:
    """A table of logits by the last two tokens, one a row."""

    table: Tensor  # [B, V, V, V]

    @classmethod
    def of(cls, rows: int, seed: int) -> RandomModel:
        generator = torch.Generator().manual_seed(seed)
        shape = rows, VOCABULARY, VOCABULARY, VOCABULARY
        return cls(2 * torch.randn(shape, generator=generator))

    def row(self, row: int) -> Callable[[Path], list[float]]:
        return lambda path: self.table[row, ([0, *path])[-2], path[-1]].tolist()

    def logits(self, tree: Tree, nodes: Tensor) -> Tensor:
        """[B, W, V] after these nodes; what precedes the root is token 0."""
        before = tree.tokens.gather(1, tree.parents)
        before[:, 0] = 0
        rows = torch.arange(len(self.table))[:, None]
        return self.table[rows, before[:, nodes], tree.tokens[:, nodes]]


def grow(
    model: RandomModel, root: Tensor, levels: int, size: int, width: int, temperature: float
) -> Tree:
    tree = plant(root, size, width)
    for depth in range(1, levels + 1):
        level = torch.tensor(depth)
        above = beams(level - 1, width, 1 if depth == 1 else width)
        new = propose(tree, model.logits(tree, above), level, width, temperature)
        tree = attach(tree, new, level)
    return tree


# growing


@given(sizes, widths)
def test_a_level_s_nodes_follow_those_above_it(size: int, width: int) -> None:
    nodes = beams(torch.tensor(0), width, 1).tolist()
    for level in range(1, size):
        nodes += beams(torch.tensor(level), width, width).tolist()
    assert nodes == list(range(node_count(size, width)))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=3), sizes, widths)
def test_a_planted_tree_is_its_root(roots: list[int], size: int, width: int) -> None:
    tree = plant(torch.tensor(roots), size, width)
    N = node_count(size, width)
    assert tree.tokens[:, 0].tolist() == roots
    assert tree.depth.tolist() == [[0] + [-1] * (N - 1)] * len(roots)
    assert tree.scores[:, 0].tolist() == [0.0] * len(roots)
    alone = [[0 if j == i else -1 for j in range(N)] for i in range(N)]
    assert tree.mask.tolist() == [alone] * len(roots)


@MANY
@given(st.integers(0, 2**32), st.integers(1, 3), sizes, widths, temperatures, st.data())
def test_growth_is_a_beam_search(
    seed: int, rows: int, size: int, width: int, temperature: float, data: st.DataObject
) -> None:
    levels = data.draw(st.integers(0, size - 1))
    model = RandomModel.of(rows, seed)
    roots = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    tree = grow(model, torch.tensor(roots), levels, size, width, temperature)
    for row, root in enumerate(roots):
        found = beam_search(root, model.row(row), levels, width, temperature)
        for above in found[:-1]:  # float32 may order what is nearer than this otherwise
            ranked = continuations(above, model.row(row), temperature)[: width + 1]
            assume(all(a.score - b.score > 1e-4 for a, b in pairwise(ranked)))
        for depth, level in enumerate(found):
            nodes = beams(torch.tensor(depth), width, len(level))
            first_above = 0 if depth < 2 else (depth - 2) * width + 1
            assert tree.tokens[row, nodes].tolist() == [beam.path[-1] for beam in level]
            assert tree.scores[row, nodes].tolist() == pytest.approx(
                [beam.score for beam in level], abs=1e-4
            )
            if depth:
                expected = [first_above + beam.parent for beam in level]
                assert tree.parents[row, nodes].tolist() == expected


@MANY
@given(st.integers(0, 2**32), sizes, widths, temperatures)
def test_a_score_is_the_log_probability_of_its_path(
    seed: int, size: int, width: int, temperature: float
) -> None:
    model = RandomModel.of(1, seed)
    tree = grow(model, torch.tensor([3]), size - 1, size, width, temperature)
    parents = [-1, *tree.parents[0, 1:].tolist()]
    drafted = naive_tree.NaiveTree(tree.tokens[0].tolist(), parents, tree.scores[0].tolist())
    for node in range(len(parents)):
        path = [drafted.tokens[i] for i in drafted.path(node)]
        expected = math.fsum(
            naive_tree.log_probability(model.row(0)(tuple(path[:i])), path[i], temperature)
            for i in range(1, len(path))
        )
        assert drafted.scores[node] == pytest.approx(expected, abs=1e-4)


@given(st.integers(0, 2**32), sizes, widths)
def test_a_level_s_best_comes_first_and_no_path_twice(seed: int, size: int, width: int) -> None:
    tree = grow(RandomModel.of(1, seed), torch.tensor([0]), size - 1, size, width, 1.0)
    for depth in range(1, size):
        nodes = beams(torch.tensor(depth), width, width)
        scores = tree.scores[0, nodes].tolist()
        assert scores == sorted(scores, reverse=True)
        steps = zip(tree.parents[0, nodes].tolist(), tree.tokens[0, nodes].tolist(), strict=True)
        assert len(set(steps)) == width


@pytest.mark.parametrize("vocabulary", [10, 50, 1000])
def test_of_tokens_equally_likely_a_chain_takes_the_full_path_s_choice(vocabulary: int) -> None:
    """The first of them, as argmax does: else exact mode would refuse what is the same."""
    logits = torch.zeros(1, 1, vocabulary)
    logits[..., 3::2] = 1.0
    new = propose(plant(torch.tensor([0]), 2, 1), logits, torch.tensor(1), 1, 1.0)
    assert new.tokens.item() == 3


# who sees whom


@MANY
@given(random_drafts())
def test_a_node_sees_its_ancestors_and_a_node_not_drafted_itself(given_: RandomDraft) -> None:
    tree = given_.draft.tree
    N = tree.tokens.shape[1]
    for row in range(given_.rows):
        parents = given_.naive(row).parents
        expected = torch.eye(N, dtype=torch.int64) - 1
        expected[: len(parents), : len(parents)] = tree_mask(parents)
        assert torch.equal(tree.mask[row], expected)
        depths = tree_mask(parents)[:, 0].tolist()
        assert tree.depth[row].tolist() == depths + [-1] * (N - len(parents))


@MANY
@given(random_drafts())
def test_attaching_a_level_leaves_all_others_as_they_are(given_: RandomDraft) -> None:
    drafted = len(given_.levels)
    assume(drafted)
    root = given_.draft.tree.tokens[:, 0]
    before = build(root, given_.levels[:-1], given_.size, given_.width)
    nodes = set(beams(torch.tensor(drafted), given_.width, given_.width).tolist())
    others = [node for node in range(before.tokens.shape[1]) if node not in nodes]
    for old, new in zip(before, given_.draft.tree, strict=True):
        assert torch.equal(old[:, others], new[:, others])


@given(st.integers(1, 9), st.integers(0, 2**32))
def test_a_tree_of_width_one_has_the_chain_s_mask(size: int, seed: int) -> None:
    tree = grow(RandomModel.of(2, seed), torch.tensor([1, 2]), size - 1, size, 1, 1.0)
    chain = [[i - j if j <= i else -1 for j in range(size)] for i in range(size)]
    assert tree.mask.tolist() == [chain, chain]


# which path is kept


@MANY
@given(random_drafts(), st.floats(0.0, 1.0), st.data())
def test_longest_path(given_: RandomDraft, share: float, data: st.DataObject) -> None:
    tree, size = given_.draft.tree, given_.size
    seed = data.draw(st.integers(0, 2**32))
    passes = torch.rand(tree.tokens.shape, generator=torch.Generator().manual_seed(seed)) < share
    deepest = data.draw(st.lists(st.integers(0, size), min_size=given_.rows, max_size=given_.rows))
    path = longest_path(tree, passes, torch.tensor(deepest), size)
    for row, limit in enumerate(deepest):
        expected = naive_tree.longest_path(given_.naive(row), passes[row].tolist(), limit)
        assert path.last[row] == expected[-1]
        assert path.depth[row] == len(expected) - 1
        assert path.nodes[row].tolist() == expected + [0] * (size - len(expected))


def check_judge(
    given_: RandomDraft, acceptance: Decide, passes: Callable[[int, Sequence[float]], bool]
) -> None:
    most = torch.full((given_.rows,), given_.size)
    verdict = judge(given_.draft, given_.logits, acceptance, most, given_.size)
    for row in range(given_.rows):
        expected = naive_tree.judge(
            given_.naive(row), given_.logits[row].tolist(), passes, int(given_.draft.depth[row])
        )
        advance = len(expected.tokens)
        assert verdict.advance[row] == advance
        assert verdict.tokens[row, :advance].tolist() == expected.tokens
        assert verdict.root[row] == expected.tokens[-1]
        assert verdict.nodes[row].tolist() == expected.nodes + [0] * (given_.size - advance)


@MANY
@given(random_drafts())
def test_judge_in_exact_mode(given_: RandomDraft) -> None:
    check_judge(given_, exactly, lambda token, logits: token == argmax(logits))


@MANY
@given(random_drafts(), st.floats(0.01, 0.99), temperatures)
def test_judge_by_threshold(given_: RandomDraft, threshold: float, temperature: float) -> None:
    def passes(token: int, logits: Sequence[float]) -> bool:
        p = probability(logits, token, temperature)
        assume(abs(p - threshold) > 1e-6)
        return p >= threshold

    check_judge(given_, threshold_of(threshold, temperature), passes)


@MANY
@given(random_drafts())
def test_threshold_zero_keeps_a_likeliest_path_of_the_levels_that_count(
    given_: RandomDraft,
) -> None:
    check_judge(given_, threshold_of(0.0, 0.6), lambda token, logits: True)


def best(*tokens: int) -> Tensor:
    """Logits [1, N, V] whose argmax after each node is the token given."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), VOCABULARY).float()


def level(tokens: list[int], parents: list[int], scores: list[float]) -> Level:
    return Level(torch.tensor([tokens]), torch.tensor([parents]), torch.tensor([scores]))


TWO_LEVELS = [level([1, 2], [0, 0], [-1.0, -2.0]), level([3, 4], [1, 2], [-3.0, -4.0])]


def test_the_correction_comes_from_the_last_kept_node_of_that_path() -> None:
    """Kept: root, node 2, node 4, two tokens. The logits of flat row 2, which the reference code
    reads there, are those after the first of them, and say 4 again.
    """
    tree = build(torch.tensor([0]), TWO_LEVELS, 3, 2)
    logits = best(2, 5, 4, 6, 7)
    verdict = judge(Draft(tree, torch.tensor([2]), None), logits, exactly, torch.tensor([3]), 3)
    assert verdict.nodes.tolist() == [[0, 2, 4]]
    assert verdict.tokens.tolist() == [[2, 4, 7]]
    assert logits[0, int(verdict.advance) - 1].argmax() == 4
    assert verdict.root.tolist() == [7]


def test_where_no_token_is_kept_the_correction_comes_from_the_root() -> None:
    tree = build(torch.tensor([0]), TWO_LEVELS, 3, 2)
    draft = Draft(tree, torch.tensor([2]), None)
    verdict = judge(draft, best(9, 3, 4, 5, 6), exactly, torch.tensor([3]), 3)
    assert verdict.advance.tolist() == [1]
    assert verdict.root.tolist() == [9]


@pytest.mark.parametrize(("scores", "kept"), [([-1.0, -2.0], 1), ([-2.0, -1.0], 2)])
def test_of_paths_equally_long_the_likelier_is_kept(scores: list[float], kept: int) -> None:
    tree = build(torch.tensor([0]), [level([1, 2], [0, 0], scores)], 2, 2)
    path = longest_path(tree, torch.ones(1, 3).bool(), torch.tensor([1]), 2)
    assert path.nodes.tolist() == [[0, kept]]


def test_a_longer_path_is_kept_before_a_likelier_one() -> None:
    tree = build(torch.tensor([0]), TWO_LEVELS, 3, 2)
    passes = torch.tensor([[True, True, True, False, True]])
    assert longest_path(tree, passes, torch.tensor([2]), 3).nodes.tolist() == [[0, 2, 4]]


def test_a_path_that_the_sparse_path_holds_impossible_may_be_kept() -> None:
    """Of a vocabulary that is masked but for one token, the second beam has no probability."""
    tree = build(torch.tensor([0]), [level([1, 2], [0, 0], [-1.0, -math.inf])], 2, 2)
    path = longest_path(tree, torch.tensor([[True, False, True]]), torch.tensor([1]), 2)
    assert path.last.tolist() == [2]
    assert path.nodes.tolist() == [[0, 2]]


def test_a_node_below_a_refused_one_is_not_kept() -> None:
    tree = build(torch.tensor([0]), TWO_LEVELS, 3, 2)
    passes = torch.tensor([[True, True, False, False, True]])
    assert longest_path(tree, passes, torch.tensor([2]), 3).nodes.tolist() == [[0, 1, 0]]


@MANY
@given(random_drafts())
def test_levels_that_are_not_drafted_are_not_kept(given_: RandomDraft) -> None:
    tree, size = given_.draft.tree, given_.size
    every = torch.ones_like(tree.tokens, dtype=torch.bool)
    path = longest_path(tree, every, torch.full((given_.rows,), size), size)
    assert path.depth.tolist() == [len(given_.levels)] * given_.rows
