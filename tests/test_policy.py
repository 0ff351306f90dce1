"""Acceptance, correction, masks and neuron choice, each against a loop that says what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.errors import ConfigError
from sirius_runtime.policy import (
    Acceptance,
    ExactAcceptance,
    ThresholdAcceptance,
    chain_mask,
    judge,
    select_neurons,
)

MANY = settings(max_examples=100)  # they are cheap
CPU = torch.device("cpu")


@dataclass
class Chunk:
    """A chunk of random tokens and the full path's logits, as tensors and as lists."""

    tokens: Tensor
    logits: Tensor

    @property
    def rows(self) -> list[tuple[list[int], list[list[float]]]]:
        return list(zip(self.tokens.tolist(), self.logits.tolist(), strict=True))


@st.composite
def chunks(draw: st.DrawFn, vocabulary: int = 5) -> Chunk:
    """Few words, so that some drafted tokens are the likeliest ones."""
    B, K = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 2 * torch.randn(B, K, vocabulary, generator=generator)
    return Chunk(torch.randint(vocabulary, (B, K), generator=generator), logits)


def probability(logits: list[float], token: int, temperature: float) -> float:
    weights = [math.exp(value / temperature) for value in logits]
    return weights[token] / math.fsum(weights)


def argmax(logits: list[float]) -> int:
    return max(range(len(logits)), key=logits.__getitem__)


def naive_judge(
    tokens: list[int], logits: list[list[float]], passes: Callable[[int, list[float]], bool]
) -> list[int]:
    """What one row commits: SIRIUS' rule, a token at a time."""
    committed: list[int] = []
    for drafted, before in zip(tokens[1:], logits, strict=False):
        if not passes(drafted, before):
            break
        committed.append(drafted)
    return [*committed, argmax(logits[len(committed)])]


def check_judge(
    chunk: Chunk, acceptance: Acceptance, passes: Callable[[int, list[float]], bool]
) -> None:
    verdict = judge(chunk.tokens, chunk.logits, acceptance)
    for row, (tokens, logits) in enumerate(chunk.rows):
        expected = naive_judge(tokens, logits, passes)
        assert verdict.advance[row] == len(expected)
        assert verdict.tokens[row, : len(expected)].tolist() == expected
        assert verdict.root[row] == expected[-1]


@MANY
@given(chunks(), st.floats(0.01, 0.99), st.floats(0.3, 2.0))
def test_threshold_passes_probabilities_from_it_up(
    chunk: Chunk, threshold: float, temperature: float
) -> None:
    passes = ThresholdAcceptance(threshold, temperature).passes(
        chunk.logits[:, :-1], chunk.tokens[:, 1:]
    )
    for row, (tokens, logits) in enumerate(chunk.rows):
        for index, token in enumerate(tokens[1:]):
            p = probability(logits[index], token, temperature)
            assume(abs(p - threshold) > 1e-5)
            assert passes[row, index] == (p >= threshold)


@MANY
@given(chunks(), st.floats(0.01, 0.99), st.floats(0.3, 2.0))
def test_judge_by_threshold(chunk: Chunk, threshold: float, temperature: float) -> None:
    def passes(token: int, logits: list[float]) -> bool:
        p = probability(logits, token, temperature)
        assume(abs(p - threshold) > 1e-5)
        return p >= threshold

    check_judge(chunk, ThresholdAcceptance(threshold, temperature), passes)


@MANY
@given(chunks())
def test_judge_in_exact_mode(chunk: Chunk) -> None:
    check_judge(chunk, ExactAcceptance(), lambda token, logits: token == argmax(logits))


def just_above(value: float) -> float:
    """The next float32, in which probabilities are compared."""
    return float(torch.tensor(value).nextafter(torch.tensor(math.inf)))


def test_probability_equal_to_the_threshold_passes() -> None:
    even = torch.zeros(1, 2, 4)  # each of four tokens has exactly 1/4
    drafted = torch.tensor([[3]])
    assert ThresholdAcceptance(0.25, 0.6).passes(even[:, :1], drafted).item()
    assert not ThresholdAcceptance(just_above(0.25), 0.6).passes(even[:, :1], drafted).item()


@MANY
@given(chunks())
def test_threshold_zero_accepts_even_the_impossible(chunk: Chunk) -> None:
    chunk.logits[:, :, 0] = -1e30
    chunk.tokens[:, 1:] = 0
    verdict = judge(chunk.tokens, chunk.logits, ThresholdAcceptance(0.0, 0.6))
    assert verdict.advance.tolist() == [chunk.tokens.shape[1]] * len(chunk.tokens)


@MANY
@given(chunks())
def test_threshold_above_one_refuses_even_the_certain(chunk: Chunk) -> None:
    chunk.logits[:, :, 0] = 1e30
    chunk.tokens[:, 1:] = 0
    above = judge(chunk.tokens, chunk.logits, ThresholdAcceptance(just_above(1.0), 0.6))
    assert above.advance.unique().tolist() == [1]
    size = chunk.tokens.shape[1]
    at_one = judge(chunk.tokens, chunk.logits, ThresholdAcceptance(1.0, 0.6))
    assert at_one.advance.unique().tolist() == [size]


def test_first_refused_token_is_replaced_and_the_rest_dropped() -> None:
    best = torch.tensor([[4, 3, 2, 1]])  # the full path's choice after each token of the chunk
    logits = torch.nn.functional.one_hot(best, 5).float()
    verdict = judge(torch.tensor([[0, 4, 0, 2]]), logits, ExactAcceptance())
    assert verdict.advance.tolist() == [2]
    assert verdict.tokens[0, :2].tolist() == [4, 3]
    assert verdict.root.tolist() == [3]


def test_bonus_comes_after_the_last_drafted_token() -> None:
    best = torch.tensor([[4, 3, 2, 1]])
    logits = torch.nn.functional.one_hot(best, 5).float()
    verdict = judge(torch.tensor([[0, 4, 3, 2]]), logits, ExactAcceptance())
    assert verdict.advance.tolist() == [4]
    assert verdict.tokens.tolist() == [[4, 3, 2, 1]]


@pytest.mark.parametrize("threshold", [-0.1, -math.inf, math.nan])
def test_bad_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold must be >= 0"):
        ThresholdAcceptance(threshold, 0.6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"verify_temperature must be > 0"):
        ThresholdAcceptance(0.1, temperature)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_chain_mask_is_the_distance_back(size: int) -> None:
    expected = [[q - k if k <= q else -1 for k in range(size)] for q in range(size)]
    assert chain_mask(size, CPU).tolist() == [expected]


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
@given(chunks(), st.data())
def test_most_is_as_a_shorter_chunk(chunk: Chunk, data: st.DataObject) -> None:
    acceptance = ThresholdAcceptance(0.1, 0.6)
    rows, size = chunk.tokens.shape
    most = data.draw(st.lists(st.integers(1, size), min_size=rows, max_size=rows))
    verdict = judge(chunk.tokens, chunk.logits, acceptance, torch.tensor(most))
    for row, limit in enumerate(most):
        alone = judge(chunk.tokens[row, None, :limit], chunk.logits[row, None, :limit], acceptance)
        advance = int(alone.advance)
        assert verdict.advance[row] == advance
        assert torch.equal(verdict.tokens[row, :advance], alone.tokens[0, :advance])
        assert verdict.root[row] == alone.root[0]
