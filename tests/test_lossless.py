"""Sampling is lossless: what is committed has the full path's distribution, whatever was drafted.

By counting here: thousands of rows of a toy model, against the full model's own joint distribution
of the first tokens. Enumerated, in `test_lossless_exactly`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sirius_runtime.policy import Decide, Decision, Draft, draw
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import Sampling
from tests.support import naive_sampling as naive
from tests.support.fast import gate_but, slow_but
from tests.support.statistics import LEVEL, p_value
from tests.support.toy import Loop, Toy, generate

VOCABULARY, SIZE, ROWS = 6, 4, 12_000
TOY = Toy.random(VOCABULARY, seed=1)


def next_token(toy: Toy, sampling: Sampling) -> Tensor:
    """The full model's own distribution [V, V, V] of the next token by the last two."""
    settings = sampling.temperature, sampling.top_k, sampling.top_p
    rows = [naive.distribution(row, *settings) for row in toy.full.flatten(0, 1).tolist()]
    return torch.tensor(rows).view(toy.full.shape)


def fit(tokens: Tensor, sampling: Sampling, toy: Toy = TOY) -> float:
    """How well the first three tokens after 0 and 1 fit the full model's joint distribution."""
    table = next_token(toy, sampling)
    joint = table[0, 1][:, None, None] * table[1][:, :, None] * table
    code = (tokens[:, 0] * VOCABULARY + tokens[:, 1]) * VOCABULARY + tokens[:, 2]
    return p_value(code.bincount(minlength=VOCABULARY**3), joint)


LOOPS: dict[str, Callable[[Sampling], Loop]] = {
    "drawn chain": lambda sampling: Loop.drawn_chain(SIZE, sampling),
    "greedy chain": lambda sampling: Loop.tree(SIZE, 1, sampling),
    "tree of 2": lambda sampling: Loop.tree(SIZE, 2, sampling),
    "tree of 4": lambda sampling: Loop.tree(SIZE, 4, sampling),
}
SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(0.6),
    "hot": Sampling(1.5),
    "top_k": Sampling(1.0, 3),
    "top_p": Sampling(1.0, 0, 0.8),
    "all": Sampling(0.8, 4, 0.9),
}
every_loop = pytest.mark.parametrize(
    "loop", gate_but(LOOPS.values(), [LOOPS["drawn chain"], LOOPS["tree of 2"]]), ids=LOOPS.keys()
)
every_sampling = pytest.mark.parametrize(
    "sampling",
    slow_but(SAMPLINGS.values(), [SAMPLINGS["plain"], SAMPLINGS["all"]], [SAMPLINGS["hot"]]),
    ids=SAMPLINGS.keys(),
)


@every_loop
@every_sampling
def test_the_first_tokens_are_the_full_model_s(
    loop: Callable[[Sampling], Loop], sampling: Sampling
) -> None:
    tokens, advances = generate(TOY, loop(sampling), ROWS, 3)
    assert fit(tokens, sampling) > LEVEL
    assert advances.unique().tolist() == [1, 2, 3, 4]  # some of all was kept, and none


@every_loop
@pytest.mark.parametrize("confidence", slow_but((0.2, 0.5, 0.9), {0.5}))
def test_where_a_row_stops_drafting_does_not_matter(
    loop: Callable[[Sampling], Loop], confidence: float
) -> None:
    sampling = SAMPLINGS["all"]
    tokens, _ = generate(TOY, replace(loop(sampling), confidence=confidence), ROWS, 3)
    assert fit(tokens, sampling) > LEVEL


@every_loop
@pytest.mark.parametrize("confidence", slow_but((0.0, 0.5), {0.5}))
def test_how_much_a_row_may_commit_does_not_matter(
    loop: Callable[[Sampling], Loop], confidence: float
) -> None:
    sampling = SAMPLINGS["all"]
    most = torch.arange(ROWS) % SIZE + 1
    loop_ = replace(loop(sampling), confidence=confidence)
    tokens, advances = generate(TOY, loop_, ROWS, 3, most_B=most)
    assert (advances <= most[:, None]).all()
    for limit in range(1, SIZE + 1):
        assert fit(tokens[most == limit], sampling) > LEVEL


def test_a_drawn_token_passes_as_often_as_the_paths_agree() -> None:
    """sum(min(p, q)): arXiv 2211.17192, corollary 3.6."""
    sampling = Sampling()
    _, advances = generate(TOY, LOOPS["drawn chain"](sampling), ROWS, 1)
    p, q = (next_token(toy, sampling)[0, 1] for toy in (TOY, replace(TOY, full=TOY.sparse)))
    agreement = p.minimum(q).sum()
    passed = (advances > 1).sum()
    counts = torch.stack([passed, ROWS - passed])
    assert p_value(counts, torch.stack([agreement, 1 - agreement])) > LEVEL


def test_where_the_paths_are_one_every_drawn_token_passes() -> None:
    toy = replace(TOY, sparse=TOY.full)
    sampling = SAMPLINGS["all"]
    tokens, advances = generate(toy, LOOPS["drawn chain"](sampling), ROWS, 3)
    assert advances.unique().tolist() == [SIZE]
    assert fit(tokens, sampling) > LEVEL


# What is wrong must show: else the tests above would see nothing.


@dataclass(frozen=True)
class AcceptAll:
    """Whatever was drafted."""

    right: Decide

    def __call__(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        decision = self.right(draft, logits_BNV)
        return decision._replace(passes=torch.ones_like(decision.passes))


@dataclass(frozen=True)
class CorrectAnew:
    """Corrections from the whole of p, by numbers of their own: as if nothing had been refused."""

    right: Decide
    sampling: Sampling
    noise: Noise

    def __call__(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        p = self.sampling.distribution(logits_BNV)
        anew = draw(p, self.noise.draft[:, :1].expand(p.shape[:-1]))
        return self.right(draft, logits_BNV)._replace(corrections=anew)


def without_the_unlikely_level(draft: Draft) -> Draft:
    """Leaves out the level at which a row stopped."""
    return draft._replace(depth=draft.depth - (draft.depth < SIZE - 1).long())


@every_loop
def test_accepting_all_shows(loop: Callable[[Sampling], Loop]) -> None:
    right = loop(Sampling())
    wrong = replace(right, decide=lambda noise: AcceptAll(right.decide(noise)))
    tokens, _ = generate(TOY, wrong, ROWS, 3)
    assert fit(tokens, Sampling()) < LEVEL


@pytest.mark.parametrize("name", ["greedy chain", "tree of 2", "tree of 4"])
def test_a_correction_drawn_anew_shows(name: str) -> None:
    right = LOOPS[name](Sampling())
    wrong = replace(right, decide=lambda noise: CorrectAnew(right.decide(noise), Sampling(), noise))
    tokens, _ = generate(TOY, wrong, ROWS, 3)
    assert fit(tokens, Sampling()) < LEVEL


@dataclass(frozen=True)
class CorrectFromP:
    """Corrections from p in place of the residual."""

    right: Decide

    def __call__(self, draft: Draft, logits_BNV: Tensor) -> Decision:
        decision = self.right(draft, logits_BNV)
        return decision._replace(corrections=decision.bonuses)


def test_a_drawn_chain_s_correction_from_p_shows() -> None:
    right = LOOPS["drawn chain"](Sampling())
    wrong = replace(right, decide=lambda noise: CorrectFromP(right.decide(noise)))
    tokens, _ = generate(TOY, wrong, ROWS, 3)
    assert fit(tokens, Sampling()) < LEVEL


def test_a_level_left_out_for_what_it_holds_shows() -> None:
    right = replace(LOOPS["drawn chain"](Sampling()), confidence=0.3)
    wrong = replace(right, revise=without_the_unlikely_level)
    assert fit(generate(TOY, right, ROWS, 3)[0], Sampling()) > LEVEL
    assert fit(generate(TOY, wrong, ROWS, 3)[0], Sampling()) < LEVEL
