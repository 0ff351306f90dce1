"""Prompt look-up: which tokens are drafted, that the laws hold whatever they are, and what it
counts as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sirius_compile.product import Compiled
from sirius_runtime.by_entries import ByEntries
from sirius_runtime.decoder import Way
from sirius_runtime.drafting import with_given
from sirius_runtime.entries import SPARSE
from sirius_runtime.errors import ConfigError
from sirius_runtime.generation import Generation
from sirius_runtime.guard import Guard
from sirius_runtime.lookup import LONGEST, Lookup
from sirius_runtime.model import GenerationOutput, Mode, SiriusModel
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, judge
from sirius_runtime.request import LOOKUP, Options
from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.stats import Phase
from sirius_runtime.tensor_state import TensorState
from sirius_runtime.tree import plant
from tests.support.fast import slow_but
from tests.support.models import METHODS, Tiny, TinyModels
from tests.support.statistics import LEVEL, p_value

WORDS = [7, 8, 9, 7, 8, 30, 41, 7, 8, 9, 52, 30, 41]
BATCH = [WORDS, [33], [12, 80, 12, 80, 12], list(range(10, 70))]


@pytest.fixture(scope="module", params=slow_but(METHODS, {"griffin"}, {"none", "teal"}))
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


def run(model: SiriusModel, inputs: Any, **options: Any) -> GenerationOutput:
    options = {"max_new_tokens": 24, "eos_token_id": [], "period": 6, **options}
    return model.generate(inputs, **options)


# which tokens


def naive(tokens: Sequence[int], n: int, most: int) -> list[int]:
    """What `Lookup.continuation` says it returns, searched for anew."""
    key = list(tokens[-n:])
    ends = [end for end in range(n, len(tokens)) if list(tokens[end - n : end]) == key]
    if len(tokens) < n or not ends:
        return []
    place, match = ends[-1], n
    while match < place and tokens[place - 1 - match] == tokens[-1 - match]:
        match += 1
    endless = list(tokens)
    for at in range(place, place + most):
        endless.append(endless[at])
    return endless[len(tokens) :][: min(match, most)]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.integers(0, 9))
def test_the_last_match_goes_on(tokens: list[int], n: int, most: int) -> None:
    at_once, by_one = Lookup(n, tokens), Lookup(n)
    for token in tokens:
        by_one.take([token])
    expected = naive(tokens, n, most)
    assert list(at_once.continuation(most)) == list(by_one.continuation(most)) == expected


def test_a_draft_is_no_longer_than_its_match() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert Lookup(2, [*text, 2, 3]).continuation(9) == [4, 5]
    assert Lookup(2, [*text, 1, 2, 3, 4]).continuation(9) == [5, 6, 7, 8]
    assert Lookup(2, [*text, 1, 2, 3, 4]).continuation(3) == [5, 6, 7]
    assert Lookup(2, [4, 4, 4]).continuation(9) == [4, 4]  # a repetition goes on


# laws


def copies(output: GenerationOutput) -> int:
    return output.stats.looked_up


@pytest.mark.parametrize("n", [1, 2])
def test_exact_gives_the_dense_tokens(subject: Tiny, n: int) -> None:
    dense = run(subject.model, BATCH, mode=Mode.FULL)
    found = run(subject.model, BATCH, mode=Mode.EXACT, lookup=n)
    assert found.tokens == dense.tokens
    assert copies(found) > 0
    whole = run(subject.model, BATCH, mode=Mode.EXACT, lookup=n, repetition_penalty=1.2)
    assert whole.tokens == run(subject.model, BATCH, mode="full", repetition_penalty=1.2).tokens


@given(
    st.lists(st.lists(st.integers(6, 12), min_size=1, max_size=12), min_size=2, max_size=4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([("exact", 0.0), ("sirius", 0.0), ("sirius", 0.4), ("sample", 0.4)]),
)
def test_rows_of_a_batch_are_their_own_runs(
    model: SiriusModel, batch: list[list[int]], n: int, period: int, how: tuple[str, float]
) -> None:
    """Whoever of them looks something up in a period."""
    mode, confidence = how
    options: dict[str, Any] = {"mode": mode, "lookup": n, "period": period}
    options |= {"confidence": confidence, "max_new_tokens": 12}
    seeds = list(range(len(batch))) if mode == "sample" else None
    found = run(model, batch, seed=seeds, **options)
    alone = [
        run(model, row, seed=None if seeds is None else seeds[index], **options)
        for index, row in enumerate(batch)
    ]
    assert found.tokens == tuple(one.tokens[0] for one in alone)
    assert [row.periods for row in found.steps] == [one.steps[0].periods for one in alone]


def test_the_rules_judge_what_is_looked_up(model: SiriusModel) -> None:
    """All of it is kept at a threshold of 0, none above 1: then the tokens are the dense ones."""
    every = run(model, WORDS, lookup=1, threshold=0.0)
    assert every.stats.looked_up == every.stats.looked_up_kept > 0
    none = run(model, WORDS, lookup=1, threshold=1.1)
    assert none.stats.looked_up > none.stats.looked_up_kept == 0
    assert none.tokens == run(model, WORDS, mode="full").tokens


def test_a_proposal_is_kept_with_its_probability_and_else_left_out() -> None:
    """The first token of a period has the full path's distribution, whatever is looked up."""
    torch.manual_seed(0)
    rows, V, period = 40_000, 5, 3
    logits = torch.randn(1, period, V).expand(rows, -1, -1)
    draft = Draft(
        plant(torch.zeros(rows, dtype=torch.int64), period, 1),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, period - 1, V),
    )
    given = torch.tensor([[2, 4]]).expand(rows, -1)
    noise = torch.rand(rows, 2, period, dtype=torch.float64)
    plan = Plan(period=period, rule="sample", noise=noise)
    most = torch.full((rows,), period)
    verdict = judge(with_given(draft, given), logits, plan.decide, most, period)
    p = logits[0].softmax(-1)
    first = verdict.tokens[:, 0].bincount(minlength=V)
    assert p_value(first, p[0]) > LEVEL
    kept = verdict.tokens[verdict.advance > 1]
    assert (kept[:, 0] == 2).all()
    assert p_value(kept[:, 1].bincount(minlength=V), p[1]) > LEVEL
    assert verdict.advance.unique().tolist() == [1, 2, 3]


def test_sampled_tokens_have_the_distribution_of_the_full_path(model: SiriusModel) -> None:
    """Of whole answers: what follows the first token, which is in the prompt and looked up."""
    rows, options = 300, {"temperature": 0.15, "max_new_tokens": 3, "period": 2}
    batch = [list(range(6, 101))] * rows
    drawn = [
        run(model, batch, seed=list(range(offset, offset + rows)), **options, **more)
        for offset, more in ((0, {"mode": "sample", "lookup": 1}), (9999, {"mode": "full"}))
    ]
    assert copies(drawn[0]) > 0.5 * rows
    cells = torch.tensor([[sum(row[:2]) % 8 for row in output.tokens] for output in drawn])
    counts = torch.stack([own.bincount(minlength=8) for own in cells])
    alike = counts.sum(1, keepdim=True) * counts.sum(0)
    assert p_value(counts, alike) > LEVEL


# what it costs


def test_what_is_looked_up_takes_no_sparse_step(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, nodes = 0, TensorState.nodes

    def counted(state: TensorState, entry: str, *args: Any) -> Any:
        nonlocal steps
        steps += entry == SPARSE
        return nodes(state, entry, *args)

    monkeypatch.setattr(TensorState, "nodes", counted)
    output = run(model, WORDS, mode="exact", lookup=1)
    stats, periods = output.stats, output.steps[0].periods
    assert {period.looked_up for period in periods} == {True, False}
    assert steps == sum(period.size - 1 for period in periods if not period.looked_up)
    assert stats.bytes_read[Phase.DRAFT] == steps * stats.density * stats.weight_bytes
    assert stats.looked_up == sum(period.size - 1 for period in periods if period.looked_up)
    counted_ones = periods[:-1]
    reads = sum(
        1.0 if period.looked_up else 1.0 + (period.size - 1) * stats.density
        for period in counted_ones
    )
    advance = sum(period.advance for period in counted_ones)
    assert stats.effective_density == pytest.approx(reads / advance)
    assert stats.aal == advance / len(counted_ones)


def test_a_batch_takes_sparse_steps_for_the_others_alone(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the longest of their drafts."""
    sizes: list[tuple[int, list[int]]] = []
    draft = ByEntries.draft

    def spied(own: ByEntries, state: Any, plan: Plan, most_B: Any) -> Any:
        done = draft(own, state, plan, most_B)
        looks = [False] * len(most_B) if plan.given is None else (plan.given[:, 0] >= 0).tolist()
        others = [n - 1 for n, copied in zip(most_B.tolist(), looks, strict=True) if not copied]
        sizes.append((done[1], others))
        return done

    monkeypatch.setattr(ByEntries, "draft", spied)
    run(model, [WORDS, [33]], mode="exact", lookup=1)
    assert all(levels == max(others, default=0) for levels, others in sizes)
    assert {levels for levels, _ in sizes} >= {0, 5}


def test_the_guard_sees_what_the_sparse_path_drafted(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A period that was looked up says nothing of what drafts cost and bring."""
    seen: list[tuple[Way, int]] = []

    def observe(guard: Guard, way: Way, period: int, levels: int, *more: Any) -> None:
        seen.append((way, levels))

    monkeypatch.setattr(Guard, "observe", observe)
    output = run(model, WORDS, mode="exact", lookup=1, fallback=True)
    assert copies(output) > 0
    own = [period for period in output.steps[0].periods if not period.looked_up]
    assert len(seen) == len(own) + output.steps[0].dense
    assert [levels for way, levels in seen if way is Way.DRAFT] == [one.size - 1 for one in own]


def test_a_trace_knows_what_was_looked_up(model: SiriusModel) -> None:
    output = run(model, WORDS, mode="exact", lookup=1, trace=True)
    assert output.trace is not None
    assert output.trace.tokens == output.tokens[0]
    looked_up = [step.looked_up for step in output.trace.steps]
    assert looked_up == [period.looked_up for period in output.steps[0].periods]
    for step in output.trace.steps:
        assert all((one.sparse is None) is step.looked_up for one in step.draft)


# options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lookup": -1}, f"lookup must be in 0..{LONGEST} tokens (0: none), got -1"),
        ({"lookup": LONGEST + 1}, f"got {LONGEST + 1}"),
        ({"lookup": 10**30}, f"got {10**30}"),
        ({"lookup": 2, "tree_width": 3}, "lookup drafts chains, and tree_width is up to 3"),
        ({"lookup": 2, "period": "auto"}, "tree_width is up to 8: pass tree_width=1"),
    ],
)
def test_wrong_options_are_refused(model: SiriusModel, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        model.generate(WORDS, **options)
    assert says in str(refused.value)


@pytest.mark.gate
def test_back_ends_of_whole_periods_refuse_it(whole: Compiled) -> None:
    period = whole.to_runtime(backend="period")
    with pytest.raises(ConfigError, match="use backend eager or inductor, or leave lookup out"):
        period.generate(WORDS, lookup=2)
    assert period.generate(WORDS, lookup=0, max_new_tokens=3).stats.looked_up == 0


def test_zero_looks_nothing_up(model: SiriusModel) -> None:
    assert copies(run(model, WORDS, lookup=0)) == 0
    assert run(model, WORDS, lookup=0).tokens == run(model, WORDS).tokens


def test_the_default_is_that_of_a_guarded_run(
    model: SiriusModel, whole: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose tokens depend on the clock anyway; a run that says how it drafts is left alone."""
    monkeypatch.setattr("sirius_runtime.request.FALLBACK", True)

    def of(subject: SiriusModel = model, **options: Any) -> int:
        return subject.request(Options(**options), [3]).lookup

    assert of() == of(mode="exact") == of(fallback=True) == LOOKUP
    assert of(mode="sample", seed=1) == of(period=4) == of(tree_width=1) == of(fallback=False) == 0
    assert of(mode="full", lookup=2) == of(mode="sparse") == of(period="auto") == 0
    assert of(whole.to_runtime(backend="period")) == 0


def test_a_row_that_has_ended_looks_nothing_up(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []
    period = Generation._period

    def spied(own: Generation) -> None:
        asked.extend((len(row.looked_up(9)), row.reason is None) for row in own._rows)
        period(own)

    monkeypatch.setattr(Generation, "_period", spied)
    tokens = run(model, BATCH, mode="exact").tokens
    run(model, BATCH, mode="exact", lookup=1, eos_token_id=[tokens[0][3]])
    assert any(count for count, going in asked if going)
    assert not any(count for count, going in asked if not going)
    assert NO_TOKEN < 0  # what fills `Plan.given` is no token
