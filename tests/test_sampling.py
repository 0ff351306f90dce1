"""Distributions, draws and the acceptance of samples, against loops and transformers' own warpers.

That what is committed has the full path's distribution: `test_lossless`.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sirius_runtime.errors import ConfigError
from sirius_runtime.policy import draw
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import Sampling
from tests.support import naive_sampling as naive
from tests.support.drafts import RandomDraft, random_drafts
from tests.support.rules import sampled
from tests.support.statistics import LEVEL, p_value

MANY = settings(max_examples=100)  # they are cheap
temperatures = st.floats(0.3, 2.0)
top_ks, top_ps = st.integers(0, 12), st.floats(0.05, 1.0)
NEARLY_ONE = 1 - 2**-53  # the largest uniform number


@st.composite
def logits_without_ties(draw_: st.DrawFn) -> Tensor:
    """[2, V]: no two of a row nearer than 0.01."""
    size = draw_(st.integers(1, 10))
    values = st.lists(st.integers(-500, 500), min_size=size, max_size=size, unique=True)
    return torch.tensor([draw_(values), draw_(values)]) / 100


def assume_clear_cut(logits: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    """No likeliest tokens whose probabilities sum to `top_p` but for rounding."""
    for row in naive_distributions(logits, temperature, top_k, 1.0):
        sums = torch.tensor(sorted(row, reverse=True)).cumsum(0)
        assume(((sums - top_p).abs() > 1e-5).all())


def naive_distributions(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> list[list[float]]:
    return [naive.distribution(row, temperature, top_k, top_p) for row in logits.tolist()]


# distributions


@MANY
@given(logits_without_ties(), temperatures, top_ks, top_ps)
def test_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    assume_clear_cut(logits, temperature, top_k, top_p)
    expected = naive_distributions(logits, temperature, top_k, top_p)
    p = Sampling(temperature, top_k, top_p).distribution(logits)
    assert p.dtype is torch.float32
    torch.testing.assert_close(p, torch.tensor(expected))
    assert p.count_nonzero() == torch.tensor(expected).count_nonzero()


@MANY
@given(logits_without_ties(), temperatures, top_ks, top_ps)
def test_distribution_is_what_transformers_samples_from(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    assume_clear_cut(logits, temperature, top_k, top_p)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)]
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    p = Sampling(temperature, top_k, top_p).distribution(logits)
    torch.testing.assert_close(p, scores.softmax(-1))


@MANY
@given(logits_without_ties(), temperatures, top_ks, top_ps)
def test_settings_may_be_tensors(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    """As in a graph that takes them at run time."""
    numbers = Sampling(temperature, top_k, top_p).distribution(logits)
    tensors = Sampling(torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p))
    torch.testing.assert_close(tensors.distribution(logits), numbers)


@pytest.mark.parametrize("top_k", [0, 4, torch.tensor(0), torch.tensor(4)], ids=str)
@pytest.mark.parametrize("top_p", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_a_top_p_of_one_cuts_nothing(top_k: Tensor | int, top_p: Tensor | float) -> None:
    """The first token's probability rounds to 1 in float32; the others have theirs all the same."""
    p = Sampling(1.0, top_k, top_p).distribution(torch.tensor([20.0, 1.0, 0.0, -1.0]))
    assert p.count_nonzero() == 4


def test_the_likeliest_token_stays() -> None:
    p = Sampling(1.0, 0, 1e-9).distribution(torch.tensor([0.5, 3.0, -2.0]))
    assert p.tolist() == [0.0, 1.0, 0.0]


def test_of_equal_logits_top_k_keeps_the_first() -> None:
    assert Sampling(1.0, 2, 1.0).distribution(torch.zeros(4)).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_a_low_temperature_is_greedy() -> None:
    p = Sampling(1e-6).distribution(torch.tensor([1.0, 1.1, -5.0]))
    assert p.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature must be > 0"):
        Sampling(temperature)


def test_a_negative_top_k_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k must be >= 0"):
        Sampling(1.0, -1)


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.5, math.nan])
def test_bad_top_ps_are_refused(top_p: float) -> None:
    with pytest.raises(ConfigError, match=r"top_p must be in \(0, 1\]"):
        Sampling(1.0, 0, top_p)


# draws

weights = st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any)
uniform = st.floats(0.0, NEARLY_ONE)


@MANY
@given(st.lists(st.tuples(weights, uniform), min_size=1, max_size=3), st.floats(0.1, 3.0))
def test_draw(rows: list[tuple[list[int], float]], scale: float) -> None:
    """Weights need not sum to one. Multiples of one number, so that their sums are exact."""
    size = max(len(row) for row, _ in rows)
    padded = torch.tensor([row + [0] * (size - len(row)) for row, _ in rows]) * scale
    drawn = draw(padded, torch.tensor([u for _, u in rows], dtype=torch.float64))
    for index, row, (_, u) in zip(drawn.tolist(), padded.tolist(), rows, strict=True):
        sums = torch.tensor(row, dtype=torch.float64).cumsum(0)
        assume(((sums / sums[-1] - u).abs() > 1e-9).all() or u == 0.0)
        assert index == naive.draw(row, u)


@MANY
@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=8).filter(any), uniform)
def test_no_token_without_weight_is_drawn(weights: list[float], u: float) -> None:
    index = draw(torch.tensor(weights), torch.tensor(u, dtype=torch.float64))
    assert weights[int(index)] > 0


@pytest.mark.parametrize(("u", "index"), [(0.0, 2), (NEARLY_ONE, 4)])
def test_the_ends_are_the_first_and_the_last_with_weight(u: float, index: int) -> None:
    weights = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.7, 0.0])
    assert draw(weights, torch.tensor(u, dtype=torch.float64)) == index


def test_where_no_token_has_weight_the_last_is_drawn() -> None:
    assert draw(torch.zeros(3), torch.tensor(0.0, dtype=torch.float64)) == 2


def test_a_long_tail_keeps_its_probability() -> None:
    """A float32 sum would stop at 1: each of the others is less than its rounding there."""
    weights = torch.full((2**18 + 1,), 2.0**-25)
    weights[0] = 1.0
    share = 2.0**18 / 2**25 / (1 + 2.0**18 / 2**25)
    middle = draw(weights, torch.tensor(1 - share / 2, dtype=torch.float64))
    assert abs(int(middle) - 2**17) <= 1


def test_draws_have_the_distribution_of_the_weights() -> None:
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.02, 5.0])
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(100_000, generator=generator, dtype=torch.float64)
    counts = draw(weights.expand(len(u), -1), u).bincount(minlength=6)
    assert p_value(counts, weights) > LEVEL
    assert p_value(counts, weights + 0.02) < LEVEL


# acceptance


def test_a_period_s_noise_is_one_tensor() -> None:
    draft, verify, last = Noise.unpack(torch.arange(8.0).view(1, 2, 4))
    assert draft.tolist() == [[1.0, 2.0, 3.0]]
    assert verify.tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert last.tolist() == [0.0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_shorter_period_uses_the_same_numbers(size: int) -> None:
    uniform = torch.arange(16.0).view(2, 2, 4)
    longer, shorter = Noise.unpack(uniform), Noise.unpack(uniform[:, :, :size])
    assert torch.equal(shorter.draft, longer.draft[:, : size - 1])
    assert torch.equal(shorter.verify, longer.verify[:, :size])
    assert torch.equal(shorter.last, longer.last)


def noise_for(given_: RandomDraft, generator: torch.Generator) -> Noise:
    shape = given_.rows, 2, given_.size
    return Noise.unpack(torch.rand(shape, generator=generator, dtype=torch.float64))


samplings = st.sampled_from([Sampling(), Sampling(0.7, 3, 0.9)])


@MANY
@given(random_drafts(widths=(1, 1), vocabulary=5), samplings, st.integers(0, 2**32))
def test_a_drawn_token_passes_by_what_both_paths_give_it(
    given_: RandomDraft, sampling: Sampling, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, size = noise_for(given_, generator), given_.size
    q = torch.randn(given_.rows, size - 1, 5, generator=generator).softmax(-1)
    draft = given_.draft._replace(distributions=q)
    decision = sampled(sampling, noise)(draft, given_.logits)
    p = sampling.distribution(given_.logits).tolist()
    for row in range(given_.rows):
        last = noise.last[row].item()
        assert decision.bonuses[row].tolist() == [naive.draw(p_node, last) for p_node in p[row]]
        for node in range(1, size):
            token, p_node, q_node = int(draft.tree.tokens[row, node]), p[row][node - 1], q[row]
            q_token, u = q_node[node - 1, token].item(), noise.verify[row, node - 1].item()
            assert decision.passes[row, node] == (u < min(1.0, p_node[token] / q_token))
            residual = naive.residual(p_node, q_node[node - 1].tolist())
            if any(residual):
                assert decision.corrections[row, node - 1] == naive.draw(residual, last)
        assert decision.corrections[row, -1] == decision.bonuses[row, -1]


@MANY
@given(random_drafts(vocabulary=5), samplings, st.integers(0, 2**32))
def test_a_candidate_passes_where_it_is_what_the_full_path_draws(
    given_: RandomDraft, sampling: Sampling, seed: int
) -> None:
    noise = noise_for(given_, torch.Generator().manual_seed(seed))
    decision = sampled(sampling, noise)(given_.draft, given_.logits)
    p = sampling.distribution(given_.logits).tolist()
    for row in range(given_.rows):
        naive_tree = given_.naive(row)
        u = noise.verify[row].tolist()
        choices = [
            naive.draw(p[row][node], u[len(naive_tree.path(node)) - 1])
            for node in range(len(naive_tree.tokens))
        ]
        assert decision.corrections[row, : len(choices)].tolist() == choices
        assert decision.bonuses[row, : len(choices)].tolist() == choices
        for node in range(1, len(choices)):
            passes = naive_tree.tokens[node] == choices[naive_tree.parents[node]]
            assert decision.passes[row, node] == passes
