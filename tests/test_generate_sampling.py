"""Sampling through `generate`: seeds, and tokens that have the full model's own distribution.

What the distributions must be is computed from transformers' model, path by path.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.model import Mode, SiriusModel
from tests.support.fast import gate_but, slow_but
from tests.support.models import EVERY_METHOD, Tiny, TinyModels
from tests.support.statistics import LEVEL, p_value

PROMPT = [7, 8, 9]
BATCH = [[7, 8, 9], [50, 30, 11], [33]]
DRAWS: dict[str, dict[str, Any]] = {
    "sample": {"mode": "sample"},
    "sample, a tree": {"mode": "sample", "tree_width": 3},
    "sample, confident": {"mode": "sample", "confidence": 0.5},
    "full": {"mode": "full"},
    "sparse": {"mode": "sparse"},
}


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


def draw(model: SiriusModel, inputs: Any = PROMPT, **options: Any) -> tuple[tuple[int, ...], ...]:
    """Tokens drawn at a temperature at which the tiny models are unsure, ended by no EOS."""
    options = {"temperature": 3.0, "period": 5, "max_new_tokens": 12, "eos_token_id": []} | options
    return model.generate(inputs, **options).tokens


# seeds


@pytest.mark.parametrize("run", DRAWS)
def test_a_seed_gives_the_same_tokens_and_another_others(model: SiriusModel, run: str) -> None:
    first = draw(model, seed=1, **DRAWS[run])
    assert draw(model, seed=1, **DRAWS[run]) == first
    assert len({draw(model, seed=seed, **DRAWS[run]) for seed in range(5)}) == 5


@pytest.mark.parametrize("run", DRAWS)
def test_a_run_without_a_seed_says_which_it_took(model: SiriusModel, run: str) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 12, **DRAWS[run]}
    first, second = (model.generate(BATCH, **options) for _ in range(2))
    assert first.seeds is not None
    assert second.seeds is not None
    assert len(first.seeds) == 3
    assert not set(first.seeds) & set(second.seeds)
    assert first.tokens != second.tokens
    again = model.generate(BATCH, seed=first.seeds, **options)
    assert (again.tokens, again.seeds) == (first.tokens, first.seeds)
    one = model.generate(BATCH[1], seed=first.seeds[1], **options)
    assert one.tokens == first.tokens[1:2]


@pytest.mark.parametrize("mode", ["sirius", "exact", "full", "sparse"])
def test_what_draws_nothing_has_no_seeds(model: SiriusModel, mode: str) -> None:
    assert model.generate(BATCH, mode=mode, max_new_tokens=4).seeds is None


@pytest.mark.parametrize("run", DRAWS)
def test_one_seed_counts_up_over_the_rows(model: SiriusModel, run: str) -> None:
    batch = draw(model, BATCH, seed=40, **DRAWS[run])
    assert batch == draw(model, BATCH, seed=[40, 41, 42], **DRAWS[run])
    alone = [draw(model, row, seed=40 + i, **DRAWS[run])[0] for i, row in enumerate(BATCH)]
    assert batch == tuple(alone)


@pytest.mark.parametrize("run", DRAWS)
def test_rows_of_one_seed_and_prompt_are_one(model: SiriusModel, run: str) -> None:
    tokens = draw(model, [PROMPT] * 3, seed=[5, 6, 5], **DRAWS[run])
    assert tokens[0] == tokens[2] != tokens[1]


def test_torch_s_own_generator_has_no_part(model: SiriusModel) -> None:
    torch.manual_seed(1)
    first, state = draw(model, mode="sample", seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    assert draw(model, mode="sample", seed=3) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # and is left as it was


# where there is nothing to draw


@pytest.mark.parametrize(
    "sure",
    gate_but([{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-9}], [{"top_k": 1}]),
    ids=lambda sure: next(iter(sure)),
)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_one_choice_is_greedy(tiny: TinyModels, method: str, sure: dict[str, Any]) -> None:
    model = tiny(method=method).model
    for draws, greedy in ((Mode.SAMPLE, Mode.EXACT), (Mode.FULL, Mode.FULL), (Mode.SPARSE,) * 2):
        expected = model.generate(BATCH, mode=greedy, max_new_tokens=20).tokens
        for width in (1, 3):
            options = {"period": 6, "tree_width": width, "max_new_tokens": 20, **sure}
            assert model.generate(BATCH, mode=draws, seed=8, **options).tokens == expected


def test_tokens_outside_of_top_k_are_never_drawn(tiny: TinyModels) -> None:
    """Not by the first token, nor by a draft, a correction or a bonus."""
    subject = tiny(method="griffin")
    for width in (1, 2):
        (tokens,) = draw(
            subject.model, mode="sample", seed=0, top_k=3, tree_width=width, max_new_tokens=100
        )
        ids = torch.tensor([PROMPT + list(tokens)])
        with torch.no_grad():
            logits = subject.reference(ids).logits[0, len(PROMPT) - 1 : -1]
        rank = (logits > logits.gather(1, ids[0, len(PROMPT) :, None])).sum(1)
        assert int(rank.max()) == 2


# distributions


VOCABULARY = 6
START = [3, 4, 1]
ROWS, CALLS, COUNT, TEMPERATURE = 512, 8, 5, 4.0


@pytest.fixture(scope="module", params=slow_but(("griffin", "topk"), {"griffin"}))
def small(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    """So few words that every path can be counted; so few neurons that the paths disagree."""
    return tiny(method=request.param, keep=0.1, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def full_model(tiny: TinyModels) -> Tensor:
    """Logits [V, …, V] of the reference after every path of fewer than `COUNT` tokens."""
    reference = tiny(method="griffin", keep=0.1, vocab_size=VOCABULARY).reference
    paths = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=COUNT - 1)))
    ids = torch.cat([torch.tensor(START).expand(len(paths), -1), paths], 1)
    with torch.no_grad():
        logits = reference(ids).logits[:, len(START) - 1 :]
    return logits.unflatten(0, (VOCABULARY,) * (COUNT - 1))


def joint(logits: Tensor, top_k: int = VOCABULARY, top_p: float = 1.0) -> Tensor:
    """Probabilities [V] * COUNT of the first tokens, each cut to the likeliest."""
    scaled = (logits / TEMPERATURE).double()
    least = scaled.topk(top_k).values[..., -1:]
    p = scaled.masked_fill(scaled < least, float("-inf")).softmax(-1)
    # A token stays where those that are likelier have less than top_p together.
    likelier = (p[..., None, :] * (p[..., None, :] > p[..., :, None])).sum(-1)
    p = p.masked_fill(likelier >= top_p, 0.0)
    p = p / p.sum(-1, keepdim=True)
    result = torch.ones(())
    for depth in range(COUNT):
        # Whatever follows, the distribution at a depth is that after the path up to it.
        here = p[..., depth, :]
        here = here[(slice(None),) * depth + (0,) * (COUNT - 1 - depth)]
        result = result[..., None] * here
    return result


def histogram(tokens: Tensor) -> Tensor:
    """How often each path [rows, n] of tokens came: [V] * n."""
    count = tokens.shape[1]
    index = (tokens * VOCABULARY ** torch.arange(count - 1, -1, -1)).sum(1)
    return torch.bincount(index, minlength=VOCABULARY**count).unflatten(0, (VOCABULARY,) * count)


def sampled(model: SiriusModel, first: int = 0, **options: Any) -> Tensor:
    """Tokens [ROWS * CALLS, COUNT] by as many seeds from `first` on."""
    calls = [
        draw(
            model,
            [START] * ROWS,
            seed=first + ROWS * call,
            temperature=TEMPERATURE,
            max_new_tokens=COUNT,
            **options,
        )
        for call in range(CALLS)
    ]
    return torch.tensor(calls).flatten(0, 1)


def least_p_value(tokens: Tensor, expected: Tensor) -> float:
    """Of the first three tokens, and of the last three, on which whole periods have had a part."""
    first, last = histogram(tokens[:, :3]), histogram(tokens[:, -3:])
    return min(p_value(first, expected.sum((3, 4))), p_value(last, expected.sum((0, 1))))


def two_sample_p_value(one: Tensor, other: Tensor) -> float:
    """Whether two histograms of as many counts are of one distribution.

    Given how often a cell came in both, it should have come half as often in each.
    """
    pooled = torch.stack([one, other])
    assert one.sum() == other.sum()
    kept = pooled[:, pooled.sum(0) >= 10]
    both = kept.sum(0).double()
    statistic = ((kept[0] - kept[1]).double() ** 2 / both).sum()
    freedom = torch.tensor(kept.shape[1] - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


LOSSLESS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "chain": {"mode": "sample", "period": 5},
    "chain of two": {"mode": "sample", "period": 2},
    "no draft": {"mode": "sample", "period": 1},
    "tree": {"mode": "sample", "period": 4, "tree_width": 2},
    "wide tree": {"mode": "sample", "period": 3, "tree_width": VOCABULARY},
    "chain that stops": {"mode": "sample", "confidence": 0.2},
    "tree that stops": {"mode": "sample", "tree_width": 2, "confidence": 0.1},
    "chain, top_k": {"mode": "sample", "top_k": 4},
    "tree, top_p": {"mode": "sample", "tree_width": 2, "top_p": 0.8},
}


# Every loop, of a toy: `test_lossless`, and enumerated, `test_lossless_exactly`.
@pytest.mark.parametrize(
    "run", slow_but(LOSSLESS, {"chain"}, {"full", "tree that stops", "tree, top_p"})
)
def test_tokens_have_the_full_model_s_distribution(
    small: Tiny, full_model: Tensor, run: str
) -> None:
    options = LOSSLESS[run]
    cuts = {name: options[name] for name in ("top_k", "top_p") if name in options}
    assert least_p_value(sampled(small.model, **options), joint(full_model, **cuts)) > LEVEL


@pytest.mark.parametrize(
    "run", slow_but(("chain", "tree", "chain that stops", "tree that stops"), (), {"tree"})
)
def test_tokens_are_distributed_as_those_of_the_full_path_alone(small: Tiny, run: str) -> None:
    """One path of this program against the other: no reference has a part."""
    # Of other seeds: in both modes one seed draws one first token, and samples must not agree so.
    full = sampled(small.model, first=ROWS * CALLS, mode="full")
    tokens = sampled(small.model, **LOSSLESS[run])
    for part in (slice(1, 3), slice(3, 5)):
        assert two_sample_p_value(histogram(full[:, part]), histogram(tokens[:, part])) > LEVEL


def test_chosen_anew_neurons_change_no_distribution(tiny: TinyModels, full_model: Tensor) -> None:
    model = tiny(method="griffin", keep=0.1, vocab_size=VOCABULARY).model
    tokens = sampled(model, mode="sample", period=2, refresh=1)
    assert least_p_value(tokens, joint(full_model)) > LEVEL


@pytest.mark.gate
def test_the_sparse_path_s_own_distribution_is_another(small: Tiny, full_model: Tensor) -> None:
    """What the laws above are worth."""
    tokens = sampled(small.model, mode="sparse")
    assert least_p_value(tokens, joint(full_model)) < 1e-12
    full = sampled(small.model, first=ROWS * CALLS, mode="full")
    assert two_sample_p_value(histogram(full[:, 3:]), histogram(tokens[:, 3:])) < 1e-12


@pytest.mark.parametrize("width", [1, 2])
def test_drafts_have_a_part_in_what_is_drawn(small: Tiny, width: int) -> None:
    """What the laws above are worth: many drafted tokens are kept, and many are refused."""
    stats = small.model.generate(
        [START] * ROWS,
        mode="sample",
        seed=0,
        temperature=TEMPERATURE,
        tree_width=width,
        period=4,
        max_new_tokens=9,
        eos_token_id=[],
    ).stats
    assert stats.acceptance_rate is not None
    assert 0.2 < stats.acceptance_rate < 0.9
    assert stats.corrections > ROWS
