"""How a draft goes on and when a row stops, against a loop over its levels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.drafting import (
    DraftState,
    Propose,
    begin,
    extend,
    first_levels,
)
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import Sampling
from tests.support import naive_sampling as naive
from tests.support.naive_tree import argmax, log_probability
from tests.support.rules import best as best_of
from tests.support.rules import drawn as drawn_by

MANY = settings(max_examples=100)  # they are cheap
VOCABULARY, TEMPERATURE = 9, 0.6


@dataclass(frozen=True)
class Case:
    """A draft to make: the sparse logits [levels, B, w, V], what rows may commit, and the noise.

    `sampling`: the tokens of a chain are drawn; None: the likeliest are taken.
    """

    size: int
    width: int
    root: Tensor
    active: Tensor
    most: Tensor
    logits: Tensor
    noise: Noise
    sampling: Sampling | None

    @property
    def rows(self) -> range:
        return range(len(self.root))

    @property
    def propose(self) -> Propose:
        if self.sampling is None:
            return best_of(self.width, TEMPERATURE)
        return drawn_by(self.sampling, self.noise, TEMPERATURE)

    def row(self, row: int) -> Case:
        part = slice(row, row + 1)
        return replace(
            self,
            root=self.root[part],
            active=self.active[part],
            most=self.most[part],
            logits=self.logits[:, part],
            noise=Noise(*(value[part] for value in self.noise)),
        )

    def run(self, confidence: float = 0.0, levels: int | None = None) -> DraftState:
        """So many levels; all of them, where no number is given."""
        state = begin(
            self.root,
            self.active,
            self.most,
            period=self.size,
            width=self.width,
            sampled_from=None if self.sampling is None else self.logits.shape[-1],
        )
        for depth, logits in enumerate(self.logits[:levels], start=1):
            above = logits[:, : 1 if depth == 1 else self.width]
            level, enough = torch.tensor(depth), torch.tensor(confidence)
            state = extend(state, above, level, self.propose, self.most, enough)
        return state


@st.composite
def cases(draw: st.DrawFn, samplings: tuple[Sampling | None, ...]) -> Case:
    B, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    sampling = draw(st.sampled_from(samplings))
    width = draw(st.integers(1, 4)) if sampling is None else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    uniform = torch.rand(B, 2, size, generator=generator, dtype=torch.float64)
    return Case(
        size,
        width,
        root=torch.randint(VOCABULARY, (B,), generator=generator),
        active=torch.tensor(draw(st.lists(st.booleans(), min_size=B, max_size=B))),
        most=torch.tensor(draw(st.lists(st.integers(1, size), min_size=B, max_size=B))),
        logits=3 * torch.randn(size - 1, B, width, VOCABULARY, generator=generator),
        noise=Noise.unpack(uniform),
        sampling=sampling,
    )


DRAWN = Sampling(), Sampling(0.7, 4, 0.9)
any_case, taken, drawn = cases((None, *DRAWN)), cases((None,)), cases(DRAWN)
confidences = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])


def assert_same(state: DraftState, row: int, alone: DraftState) -> None:
    part = slice(row, row + 1)
    for a, b in zip(state.tree, alone.tree, strict=True):
        assert torch.equal(a[part], b)
    assert torch.equal(state.depth[part], alone.depth)
    assert torch.equal(state.live[part], alone.live)
    if state.distributions is not None:
        assert alone.distributions is not None
        assert torch.equal(state.distributions[part], alone.distributions)


# when a row stops


@given(any_case)
def test_rows_begin_that_are_active_and_may_commit_more_than_a_token(case: Case) -> None:
    state = case.run(levels=0)
    for row in case.rows:
        assert state.live[row] == (bool(case.active[row]) and case.most[row] > 1)
    assert state.depth.tolist() == [0] * len(case.rows)


def naive_depth(active: bool, most: int, best: list[float], confidence: float) -> tuple[int, bool]:
    """Levels that count for one row, by the probability of each level's best path; whether it would
    draft on.
    """
    depth, live = 0, active and most > 1
    for p in best:
        if not live:
            break
        assume(abs(p - confidence) > 1e-6)
        depth += 1
        live = p >= confidence and depth < most - 1
    return depth, live


@MANY
@given(any_case, confidences)
def test_each_row_stops_on_its_own(case: Case, confidence: float) -> None:
    state = case.run(confidence)
    for row in case.rows:
        firsts = state.tree.scores[row, 1 :: case.width].tolist()
        active, most = bool(case.active[row]), int(case.most[row])
        expected = naive_depth(active, most, [math.exp(s) for s in firsts], confidence)
        assert (state.depth[row], state.live[row]) == expected


@MANY
@given(any_case, confidences)
def test_rows_do_not_affect_each_other(case: Case, confidence: float) -> None:
    state = case.run(confidence)
    for row in case.rows:
        assert_same(state, row, case.row(row).run(confidence))


@MANY
@given(any_case)
def test_confidence_zero_never_stops(case: Case) -> None:
    expected = torch.where(case.active, case.most - 1, 0)
    assert case.run(0.0).depth.tolist() == expected.tolist()


def one_row(*likelier: float) -> Case:
    """A draft of levels that give the first of two tokens these probabilities."""
    p = torch.tensor(likelier)
    logits = torch.stack([p, 1 - p], 1).log() * TEMPERATURE
    size = len(likelier) + 1
    highest = torch.full((1, 2, size), 1 - 2**-53, dtype=torch.float64)
    return Case(
        size,
        1,
        root=torch.tensor([0]),
        active=torch.tensor([True]),
        most=torch.tensor([size]),
        logits=logits[:, None, None],
        noise=Noise.unpack(highest),
        sampling=None,
    )


def test_confidence_zero_goes_on_after_what_has_no_probability_in_floating_point() -> None:
    """The highest number draws the last token, here one of log probability -1e6 / 0.6."""
    case = one_row(0.5, 0.5, 0.5)
    logits = torch.tensor([0.0, -1e6]).expand(case.logits.shape)
    state = replace(case, logits=logits, sampling=Sampling(1e7)).run(0.0)
    assert state.tree.tokens.tolist() == [[0, 1, 1, 1]]
    assert state.tree.scores.exp().tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert state.depth.tolist() == [3]


@pytest.mark.parametrize(
    ("confidence", "depth"), [(0.85, 1), (0.75, 2), (0.6, 2), (0.5, 3), (0.1, 3)]
)
def test_the_level_that_falls_below_still_counts(confidence: float, depth: int) -> None:
    """Paths of probability 0.8, 0.8 · 0.7 = 0.56, and 0.56 · 0.6."""
    assert one_row(0.8, 0.7, 0.6).run(confidence).depth.tolist() == [depth]


def test_a_probability_equal_to_the_confidence_is_enough() -> None:
    case = one_row(0.5, 0.5)
    assert case.run(0.5).depth.tolist() == [2]
    just_above = float(torch.tensor(0.5).nextafter(torch.tensor(1.0)))
    assert case.run(just_above).depth.tolist() == [1]


def test_most_counts_the_row_s_next_root() -> None:
    case = one_row(0.9, 0.9, 0.9)
    for most in range(1, 5):
        assert replace(case, most=torch.tensor([most])).run().depth.tolist() == [most - 1]


# what is proposed


@MANY
@given(taken)
def test_a_chain_that_is_not_drawn_takes_the_likeliest_tokens(case: Case) -> None:
    assume(case.width == 1)
    state = case.run()
    assert state.distributions is None
    for row in case.rows:
        expected = [argmax(level) for level in case.logits[:, row, 0].tolist()]
        assert state.tree.tokens[row, 1:].tolist() == expected


@MANY
@given(drawn)
def test_a_drawn_chain_keeps_the_distribution_of_each_token(case: Case) -> None:
    assert case.sampling is not None
    state = case.run()
    sampling = case.sampling.temperature, case.sampling.top_k, case.sampling.top_p
    assert state.distributions is not None
    for row in case.rows:
        for level, logits in enumerate(case.logits[:, row, 0].tolist()):
            q = state.distributions[row, level]
            torch.testing.assert_close(q, torch.tensor(naive.distribution(logits, *sampling)))
            token = naive.draw(q.tolist(), float(case.noise.draft[row, level]))
            assert state.tree.tokens[row, level + 1] == token


@MANY
@given(drawn)
def test_a_drawn_chain_s_scores_are_at_the_temperature_of_scores(case: Case) -> None:
    """Not at that of sampling: so that a row stops where its greedy draft would."""
    tree = case.run().tree
    for row in case.rows:
        score = 0.0
        for level, logits in enumerate(case.logits[:, row, 0].tolist(), start=1):
            score += log_probability(logits, int(tree.tokens[row, level]), TEMPERATURE)
            assert float(tree.scores[row, level]) == pytest.approx(score, rel=1e-5, abs=1e-5)


@MANY
@given(drawn, st.data())
def test_a_drawn_token_depends_on_its_own_noise_only(case: Case, data: st.DataObject) -> None:
    """Not on that of other rows, other levels, or of verification."""
    assume(case.size > 1)
    row = data.draw(st.sampled_from(case.rows))
    level = data.draw(st.integers(1, case.size - 1))
    other = Noise(*(1 - value - 2**-53 for value in case.noise))
    other.draft[row, level - 1] = case.noise.draft[row, level - 1]
    again = replace(case, noise=other).run().tree.tokens
    assert again[row, level] == case.run().tree.tokens[row, level]


def test_levels_that_are_not_drafted_have_no_distribution() -> None:
    state = begin(
        torch.tensor([1]),
        torch.tensor([True]),
        torch.tensor([3]),
        period=3,
        width=1,
        sampled_from=4,
    )
    assert state.distributions is not None
    assert state.distributions.tolist() == [[[0.0] * 4] * 2]


@MANY
@given(any_case, confidences, st.data())
def test_the_first_levels_are_a_smaller_draft(
    case: Case, confidence: float, data: st.DataObject
) -> None:
    levels = data.draw(st.integers(0, case.size - 1))
    draft = first_levels(case.run(confidence, levels).draft, levels, case.width)
    smaller = replace(case, size=levels + 1).run(confidence, levels).draft
    assert torch.equal(draft.depth, smaller.depth)
    for a, b in zip(draft.tree, smaller.tree, strict=True):
        assert torch.equal(a, b)
    if case.sampling is not None:
        assert torch.equal(draft.distributions, smaller.distributions)
