"""Decide, correction and neuron choice, each against a loop that says what it means.

Chains here; trees of other widths are judged in `test_tree`, sampling in `test_sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.drafting import first_levels
from sirius_runtime.errors import ConfigError
from sirius_runtime.policy import (
    Decide,
    Draft,
    Verdict,
    judge,
    observed,
    select_neurons,
)
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import Sampling
from sirius_runtime.sizes import node_count
from sirius_runtime.tree import Level, Tree
from tests.support.drafts import RandomDraft, build, random_drafts
from tests.support.naive_tree import argmax, probability
from tests.support.rules import exactly, sampled, threshold_of

MANY = settings(max_examples=100)  # they are cheap
chains = random_drafts(widths=(1, 1), vocabulary=5)
Passes = Callable[[int, Sequence[float]], bool]


def chain(tokens: list[int]) -> Draft:
    """One row's root and drafted tokens."""
    levels = [
        Level(torch.tensor([[t]]), torch.tensor([[i]]), torch.tensor([[-1.0]]))
        for i, t in enumerate(tokens[1:])
    ]
    tree = build(torch.tensor(tokens[:1]), levels, len(tokens), 1)
    return Draft(tree, torch.tensor([len(levels)]), None)


def judge_all(given_: RandomDraft, acceptance: Decide) -> Verdict:
    most = torch.full((given_.rows,), given_.size)
    return judge(given_.draft, given_.logits, acceptance, most, given_.size)


def naive_judge(
    tokens: Sequence[int], logits: Sequence[Sequence[float]], passes: Passes
) -> list[int]:
    """What one row commits: SIRIUS' rule, a token at a time."""
    committed: list[int] = []
    for drafted, before in zip(tokens[1:], logits, strict=False):
        if not passes(drafted, before):
            break
        committed.append(drafted)
    return [*committed, argmax(logits[len(committed)])]


def check_judge(given_: RandomDraft, acceptance: Decide, passes: Passes) -> None:
    verdict = judge_all(given_, acceptance)
    for row in range(given_.rows):
        tokens = given_.draft.tree.tokens[row, : 1 + int(given_.draft.depth[row])].tolist()
        expected = naive_judge(tokens, given_.logits[row].tolist(), passes)
        assert verdict.advance[row] == len(expected)
        assert verdict.tokens[row, : len(expected)].tolist() == expected
        assert verdict.root[row] == expected[-1]
        assert verdict.nodes[row, : len(expected)].tolist() == list(range(len(expected)))


@MANY
@given(random_drafts(), st.floats(0.01, 0.99), st.floats(0.3, 2.0))
def test_threshold_passes_probabilities_from_it_up(
    given_: RandomDraft, threshold: float, temperature: float
) -> None:
    decision = threshold_of(threshold, temperature)(given_.draft, given_.logits)
    for row in range(given_.rows):
        naive, logits = given_.naive(row), given_.logits[row].tolist()
        for node in range(1, len(naive.tokens)):
            p = probability(logits[naive.parents[node]], naive.tokens[node], temperature)
            assume(abs(p - threshold) > 1e-6)
            assert decision.passes[row, node] == (p >= threshold)


@MANY
@given(random_drafts(), st.sampled_from([threshold_of(0.1, 0.6), exactly]))
def test_corrections_and_bonuses_are_the_full_path_s_choice(
    given_: RandomDraft, acceptance: Decide
) -> None:
    decision = acceptance(given_.draft, given_.logits)
    for row in range(given_.rows):
        choices = [argmax(logits) for logits in given_.logits[row].tolist()]
        assert decision.corrections[row].tolist() == choices
        assert decision.bonuses[row].tolist() == choices


@MANY
@given(chains, st.floats(0.01, 0.99), st.floats(0.3, 2.0))
def test_judge_by_threshold(given_: RandomDraft, threshold: float, temperature: float) -> None:
    def passes(token: int, logits: Sequence[float]) -> bool:
        p = probability(logits, token, temperature)
        assume(abs(p - threshold) > 1e-6)
        return p >= threshold

    check_judge(given_, threshold_of(threshold, temperature), passes)


@MANY
@given(chains)
def test_judge_in_exact_mode(given_: RandomDraft) -> None:
    check_judge(given_, exactly, lambda token, logits: token == argmax(logits))


def just_above(value: float) -> float:
    """The next float32, in which probabilities are compared."""
    return float(torch.tensor(value).nextafter(torch.tensor(math.inf)))


def test_probability_equal_to_the_threshold_passes() -> None:
    draft, even = chain([0, 3]), torch.zeros(1, 2, 4)  # each of four tokens has exactly 1/4
    assert threshold_of(0.25, 0.6)(draft, even).passes[0, 1]
    assert not threshold_of(just_above(0.25), 0.6)(draft, even).passes[0, 1]


@MANY
@given(random_drafts())
def test_threshold_zero_accepts_even_the_impossible(given_: RandomDraft) -> None:
    given_.logits[:, :, 0] = -1e30
    given_.draft.tree.tokens[:, 1:] = 0
    verdict = judge_all(given_, threshold_of(0.0, 0.6))
    assert verdict.advance.tolist() == (given_.draft.depth + 1).tolist()


@MANY
@given(random_drafts())
def test_threshold_above_one_refuses_even_the_certain(given_: RandomDraft) -> None:
    given_.logits[:, :, 0] = 1e30
    given_.draft.tree.tokens[:, 1:] = 0
    above = judge_all(given_, threshold_of(just_above(1.0), 0.6))
    assert above.advance.unique().tolist() == [1]
    at_one = judge_all(given_, threshold_of(1.0, 0.6))
    assert at_one.advance.tolist() == (given_.draft.depth + 1).tolist()


BEST = torch.nn.functional.one_hot(torch.tensor([[4, 3, 2, 1]]), 5).float()
"""The full path's choices after each token of a chain, as logits."""


def test_first_refused_token_is_replaced_and_the_rest_dropped() -> None:
    verdict = judge(chain([0, 4, 0, 2]), BEST, exactly, torch.tensor([4]), 4)
    assert verdict.advance.tolist() == [2]
    assert verdict.tokens[0, :2].tolist() == [4, 3]
    assert verdict.root.tolist() == [3]


def test_bonus_comes_after_the_last_drafted_token() -> None:
    verdict = judge(chain([0, 4, 3, 2]), BEST, exactly, torch.tensor([4]), 4)
    assert verdict.advance.tolist() == [4]
    assert verdict.tokens.tolist() == [[4, 3, 2, 1]]


@pytest.mark.parametrize("threshold", [-0.1, -math.inf, math.nan])
def test_bad_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold must be >= 0"):
        threshold_of(threshold, 0.6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"verify_temperature must be > 0"):
        threshold_of(0.1, temperature)


@MANY
@given(random_drafts(), st.floats(0.0, 1.0), st.floats(0.3, 2.0))
def test_settings_may_be_tensors(given_: RandomDraft, threshold: float, temperature: float) -> None:
    """As in a graph that takes them at run time."""
    numbers = threshold_of(threshold, temperature)
    tensors = threshold_of(torch.tensor(threshold), torch.tensor(temperature))
    for a, b in zip(judge_all(given_, numbers), judge_all(given_, tensors), strict=True):
        assert torch.equal(a, b)


# rows, and how much they may commit


@st.composite
def cases(draw: st.DrawFn) -> tuple[RandomDraft, list[Decide]]:
    """A draft, and an acceptance for each row's own noise: the same for all, or of its row alone.

    The first of the list is for all rows. Sampling comes with the distributions of a drawn chain,
    or with none.
    """
    given_ = draw(random_drafts())
    kind = draw(st.sampled_from(["threshold", "exact", "sample"]))
    if kind == "threshold":
        return given_, [threshold_of(0.1, 0.6)] * (1 + given_.rows)
    if kind == "exact":
        return given_, [exactly] * (1 + given_.rows)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = given_.rows, 2, given_.size
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    if given_.width == 1:
        shape = given_.rows, given_.size - 1, given_.logits.shape[-1]
        logits = torch.randn(shape, generator=generator)
        given_.draft = given_.draft._replace(distributions=logits.softmax(-1))
    rows = [slice(None), *(slice(row, row + 1) for row in range(given_.rows))]
    return given_, [sampled(Sampling(), Noise.unpack(noise[row])) for row in rows]


def row_of(draft: Draft, row: int) -> Draft:
    tree = Tree(*(value[row, None] for value in draft.tree))
    q = draft.distributions
    return Draft(tree, draft.depth[row, None], None if q is None else q[row, None])


def assert_same_row(verdict: Verdict, row: int, alone: Verdict) -> None:
    advance = int(alone.advance)
    assert verdict.advance[row] == advance
    assert torch.equal(verdict.tokens[row, :advance], alone.tokens[0, :advance])
    assert torch.equal(verdict.nodes[row, :advance], alone.nodes[0, :advance])
    assert verdict.root[row] == alone.root[0]


@MANY
@given(cases())
def test_rows_do_not_affect_each_other(case: tuple[RandomDraft, list[Decide]]) -> None:
    given_, (acceptance, *own) = case
    together = judge_all(given_, acceptance)
    most = torch.tensor([given_.size])
    for row in range(given_.rows):
        draft, logits = row_of(given_.draft, row), given_.logits[row, None]
        assert_same_row(together, row, judge(draft, logits, own[row], most, given_.size))


@MANY
@given(cases(), st.data())
def test_most_is_as_a_shorter_draft(
    case: tuple[RandomDraft, list[Decide]], data: st.DataObject
) -> None:
    given_, (acceptance, *own) = case
    rows, size = given_.rows, given_.size
    most = data.draw(st.lists(st.integers(1, size), min_size=rows, max_size=rows))
    verdict = judge(given_.draft, given_.logits, acceptance, torch.tensor(most), size)
    for row, limit in enumerate(most):
        draft = first_levels(row_of(given_.draft, row), limit - 1, given_.width)
        draft = draft._replace(depth=draft.depth.clamp(max=limit - 1))
        logits = given_.logits[row, None, : node_count(limit, given_.width)]
        alone = judge(draft, logits, own[row], torch.tensor([size]), size)
        assert alone.advance <= limit
        assert_same_row(verdict, row, alone)


# neurons


@MANY
@given(
    st.lists(
        st.lists(st.integers(0, 1000), min_size=6, max_size=6, unique=True), min_size=2, max_size=2
    ),
    st.integers(1, 6),
)
def test_neurons_of_largest_statistic_in_order(layers: list[list[int]], count: int) -> None:
    statistic = torch.tensor(layers, dtype=torch.float32)[:, None]
    expected = [
        [sorted(sorted(range(6), key=values.__getitem__, reverse=True)[:count])]
        for values in layers
    ]
    assert select_neurons(statistic, count).tolist() == expected


@MANY
@given(random_drafts(), st.integers(0, 2**32))
def test_observed_are_the_kept_nodes_that_were_run(given_: RandomDraft, seed: int) -> None:
    """The root and the kept drafted tokens: as many as the period advances. The token emitted last
    was not run.
    """
    layers, neurons, N = 2, 3, given_.draft.tree.tokens.shape[1]
    activity = torch.rand(
        layers, given_.rows, N, neurons, generator=torch.Generator().manual_seed(seed)
    )
    verdict = judge_all(given_, threshold_of(0.1, 0.6))
    statistic = observed(activity, verdict.nodes, verdict.advance)
    expected: Tensor = torch.zeros(layers, given_.rows, neurons)
    for row in range(given_.rows):
        for node in verdict.nodes[row, : int(verdict.advance[row])].tolist():
            expected[:, row] += activity[:, row, node]
    torch.testing.assert_close(statistic, expected)
