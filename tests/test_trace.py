"""Traces: what they say of each period is what happened, what they name is there, and a planted
fault of the caches is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_compile.product import Compiled
from sirius_runtime.by_entries import ByEntries
from sirius_runtime.decoder import Way
from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.guard import Costs, Guard
from sirius_runtime.kv_check import TOLERANCES, CacheCheck
from sirius_runtime.model import GenerationOutput, SiriusModel, Trace, Tracing
from sirius_runtime.tensor_state import TensorState
from sirius_runtime.trace import Fate, Kind, Step
from tests.support.fast import gate_but
from tests.support.models import Tiny, TinyModels

PROMPT = [7, 9, 33, 12, 50]
NEW = 40
TEMPERATURE = 0.6
RUNS: dict[str, dict[str, Any]] = {
    "chain": {"period": 6, "threshold": 0.2},
    "tree": {"period": 5, "tree_width": 3, "threshold": 0.2},
    "exact": {"mode": "exact", "period": 6},
    "exact tree": {"mode": "exact", "period": 6, "tree_width": 2},
    "sample": {"mode": "sample", "period": 6, "seed": 3, "temperature": 1.3, "top_k": 40},
    "sample tree": {"mode": "sample", "period": 4, "tree_width": 3, "seed": 3},
    "confidence": {"period": 8, "confidence": 0.3},
    "penalty": {"mode": "exact", "period": 6, "repetition_penalty": 1.3},
    "period 1": {"period": 1},
    "auto": {"mode": "exact", "period": "auto"},
}


@pytest.fixture(scope="module", params=gate_but(("griffin", "topk"), {"griffin"}))
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param, keep=0.25)


def run(model: SiriusModel, **options: Any) -> tuple[GenerationOutput, Trace]:
    asked = {"max_new_tokens": NEW, "trace": True} | options
    output = model.generate(input_ids=[PROMPT], **asked)
    assert output.trace is not None
    return output, output.trace


def dense(tiny: Tiny, tokens: list[int]) -> Tensor:
    """transformers' logits [T, V]."""
    with torch.no_grad():
        return tiny.reference(torch.tensor([tokens])).logits[0]


def paths(trace: Trace) -> Iterator[tuple[Step, list[int]]]:
    """The steps, each with the tokens before it; the last of them is its root."""
    before = [*PROMPT, trace.first.token]
    for step in trace.steps:
        yield step, before
        before = [*before, *step.tokens]


def history(step: Step, node: int, before: list[int]) -> list[int]:
    """The tokens up to a node."""
    nodes = {one.node: one for one in step.draft}
    path: list[int] = []
    while node:
        path.insert(0, nodes[node].token)
        node = nodes[node].parent
    return [*before, *path]


@pytest.mark.parametrize(
    "name", gate_but(RUNS, RUNS.keys() - {"exact tree", "sample tree", "period 1", "auto"})
)
def test_it_adds_up_to_the_answer_and_changes_nothing(subject: Tiny, name: str) -> None:
    output, trace = run(subject.model, **RUNS[name])
    plain = subject.model.generate(input_ids=[PROMPT], max_new_tokens=NEW, **RUNS[name])
    assert plain.trace is None
    assert trace.tokens == output.tokens[0] == plain.tokens[0]
    place = 1
    for step in trace.steps:
        assert step.position == place
        place += len(step.tokens)
        *kept, last = step.tokens
        if step.advance == len(step.tokens):
            assert last == step.emitted.token
            assert kept == [one.token for one in step.kept]
        assert step.advance == len(step.kept) + 1
    assert [step.advance for step in trace.steps] == [p.advance for p in output.steps[0].periods]
    records = [json.loads(json.dumps(record, allow_nan=False)) for record in trace.records()]
    assert [token for record in records[1:-1] for token in record["tokens"]] == [*trace.tokens]
    assert records[0]["type"] == "header"
    assert records[-1]["tokens"] == len(trace.tokens)


@pytest.mark.parametrize("name", ["chain", "tree", "exact"])
def test_probabilities_are_those_of_transformers(subject: Tiny, name: str) -> None:
    _, trace = run(subject.model, **RUNS[name])
    assert trace.steps
    for step, before in paths(trace):
        for one in step.draft:
            logits = dense(subject, history(step, one.parent, before))[-1]
            assert one.full == pytest.approx(_softmax(logits)[one.token], abs=2e-4)
            assert one.likeliest == (int(logits.argmax()) == one.token)
            assert one.sparse is not None
            assert 0 <= one.sparse <= 1
        kept = history(step, step.kept[-1].node if step.kept else 0, before)
        logits = dense(subject, kept)[-1]
        assert step.emitted.token == int(logits.argmax())
        assert step.emitted.full == pytest.approx(_softmax(logits)[step.emitted.token], abs=2e-4)


def _softmax(logits: Tensor) -> list[float]:
    values: list[float] = (logits / TEMPERATURE).softmax(-1).tolist()
    return values


def test_the_sparse_paths_own_probabilities(tiny: TinyModels) -> None:
    """Without a sparse method both paths are one."""
    for name in ("chain", "tree", "sample"):
        _, trace = run(tiny(method="none").model, **RUNS[name])
        for one in (one for step in trace.steps for one in step.draft):
            assert one.sparse == pytest.approx(one.full, abs=2e-4)


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_fates_follow_the_rule(subject: Tiny, name: str) -> None:
    _, trace = run(subject.model, **RUNS[name])
    fates = set()
    for step in trace.steps:
        last = step.kept[-1].node if step.kept else 0
        for one in step.draft:
            fates.add(one.fate)
            assert one.full is not None
            assert (one.fate is Fate.REFUSED) == (one.parent == last and one.fate != Fate.KEPT)
            if one.fate is Fate.KEPT:
                assert one.full >= RUNS[name]["threshold"] - 1e-6
            if one.fate is Fate.REFUSED:
                assert one.full < RUNS[name]["threshold"] + 1e-6
        assert step.corrects == any(one.fate is Fate.REFUSED for one in step.draft)
    assert fates == set(Fate)


def test_under_corrections_are_where_dense_decoding_would_go_another_way(subject: Tiny) -> None:
    _, trace = run(subject.model, period=6, threshold=0.0)
    answer = list(trace.tokens)
    greedy = dense(subject, [*PROMPT, *answer])[len(PROMPT) - 1 :].argmax(-1).tolist()
    places = [place for place, token in enumerate(answer) if token != greedy[place]]
    assert places
    found = trace.findings
    assert [finding.position for finding in found] == places
    assert {finding.kind for finding in found} == {Kind.UNDER_CORRECTION}
    assert [finding.instead.token for finding in found] == [greedy[place] for place in places]
    assert [finding.departs for finding in found] == [True] + [False] * (len(found) - 1)
    # Up to there the answer is the dense one, and there it is not.
    alone = subject.greedy(PROMPT, NEW)
    assert alone[: places[0]] == trace.tokens[: places[0]]
    assert alone[places[0]] == found[0].instead.token != trace.tokens[places[0]]


def test_over_corrections_put_the_same_token_in_place(subject: Tiny) -> None:
    _, trace = run(subject.model, period=6, threshold=1.1)  # accepts nothing
    drafted = [(step, step.draft[0]) for step in trace.steps if step.draft]
    same = [step for step, one in drafted if one.token == step.emitted.token]
    assert same
    assert [f.position for f in trace.findings] == [step.position for step in same]
    assert {finding.kind for finding in trace.findings} == {Kind.OVER_CORRECTION}
    assert all(f.token == f.instead.token and not f.departs for f in trace.findings)
    assert trace.count(Kind.OVER_CORRECTION) == len(same)


@pytest.mark.parametrize("name", ["exact", "exact tree", "sample", "sample tree"])
def test_nothing_is_found_where_the_law_is_kept(subject: Tiny, name: str) -> None:
    assert run(subject.model, **RUNS[name])[1].findings == ()


def test_dense_steps_have_their_reason(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = iter([Way.DRAFT, Way.DENSE, Way.DENSE, Way.DRAFT])
    monkeypatch.setattr(Guard, "choose", lambda _: (next(ways, Way.DENSE), 4))
    monkeypatch.setattr(Guard, "reason", property(lambda _: "the clock says so"))
    subject = tiny(keep=0.25)
    _, trace = run(subject.model, mode="exact", fallback=True)
    kinds = [record["type"] for record in trace.records()][2:-1]
    assert kinds == ["period", "dense", "dense", "period"] + ["dense"] * (len(kinds) - 4)
    for step, before in paths(trace):
        if step.way is Way.DENSE:
            logits = dense(subject, before)[-1]
            assert step.tokens == (int(logits.argmax()),)
            assert step.emitted.full == pytest.approx(max(_softmax(logits)), abs=2e-4)
        assert step.reason == ("the clock says so" if step.way is Way.DENSE else None)
    assert trace.tokens == subject.greedy(PROMPT, NEW)


def test_the_guard_says_why() -> None:
    assert Guard(1, Costs(0.5)).reason.startswith("the period is 1")
    guard = Guard(16, Costs(0.5))
    while guard.choose()[0] is Way.DRAFT:
        _, size = guard.choose()
        guard.observe(Way.DRAFT, size, size - 1, [(size - 1, 0)], 1.0)
    assert guard.reason.startswith("drafts did not pay (1.0 tokens in the time of ")
    assert guard.reason.endswith("a draft is tried again in 16 steps")


def test_the_listener_has_each_step_once_its_tokens_are_streamed(tiny: TinyModels) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer, seen, counts = Streamer(), [], []

    def listen(step: Step) -> None:
        seen.append(step)
        counts.append(len(streamer.tokens) - len(PROMPT))

    tracing = Tracing(listener=listen)
    _, trace = run(tiny(keep=0.25).model, period=4, streamer=streamer, trace=tracing)
    assert tuple(seen) == trace.steps
    assert counts == [step.position + len(step.tokens) for step in trace.steps]


def test_what_cannot_be_traced_is_refused_by_name(tiny: TinyModels) -> None:
    model = tiny(keep=0.25).model
    for mode in ("full", "sparse"):
        with pytest.raises(ConfigError, match=f"mode {mode} makes none: use mode sirius, exact"):
            run(model, mode=mode)
    with pytest.raises(GenerationError, match="one row, the batch has 2"):
        model.generate(input_ids=[PROMPT, PROMPT], max_new_tokens=2, trace=True)


def test_other_back_ends_are_refused_by_name(whole: Compiled) -> None:
    model = whole.to_runtime(backend="period")
    with pytest.raises(ConfigError, match=r"PeriodBackend does not return .* backend='eager'"):
        run(model)


# The caches


def checked(model: SiriusModel, **options: Any) -> CacheCheck:
    _, trace = run(model, trace=Tracing(check_kv=True), **options)
    assert trace.cache is not None
    return trace.cache


@pytest.mark.parametrize("name", ["chain", "tree", "sample", "auto", "period 1"])
def test_sound_caches_are_found_sound(subject: Tiny, name: str) -> None:
    _, trace = run(subject.model, trace=Tracing(check_kv=True), **RUNS[name])
    cache = trace.cache
    assert cache is not None
    assert (cache.layers, cache.tolerance) == (2, TOLERANCES[torch.float32])
    committed = 1 + sum(step.advance for step in trace.steps)
    assert cache.slots == len(PROMPT) + committed - 1
    assert cache.inconsistent == 0
    assert cache.differences == ()
    assert cache.largest.size < 1e-5  # law 4
    assert trace.count(Kind.CACHE_INCONSISTENCY) == 0


@pytest.mark.parametrize(("tensor", "layer", "slot"), [("k", 1, 3), ("v", 0, 9)])
def test_a_planted_fault_is_found_where_it_is(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, tensor: str, layer: int, slot: int
) -> None:
    real = TensorState.commit

    def commit(state: TensorState, advance: Tensor, root_B: Tensor) -> None:
        real(state, advance, root_B)
        if int(state.length[0]) > slot:
            getattr(state, f"{tensor}_cache")[layer, 0, :, slot] *= 1.5

    monkeypatch.setattr(TensorState, "commit", commit)
    cache = checked(tiny(keep=0.25).model, period=40)  # the draft itself reads no fault
    worst = cache.differences[0]
    assert (worst.tensor, worst.layer, worst.slot) == (tensor, layer, slot)
    assert worst == cache.largest
    assert worst.size > 0.1 > cache.tolerance
    assert cache.inconsistent >= 1


def test_a_cache_that_keeps_the_sparse_paths_kv_is_found(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What KV rewriting is for: without it, the draft's K/V stays."""
    real = ByEntries.verify

    def verify(self: ByEntries, state: TensorState, plan: Any, draft: Any) -> dict[str, Tensor]:
        begin, size = int(state.length[0]) + 1, draft.tree.tokens.shape[1]
        drafted = slice(begin, begin + size - 2)  # the last one's was never computed
        before = [c[..., drafted, :].clone() for c in (state.k_cache, state.v_cache)]
        result = real(self, state, plan, draft)
        for cache, value in zip((state.k_cache, state.v_cache), before, strict=True):
            cache[..., drafted, :] = value
        return result

    monkeypatch.setattr(ByEntries, "verify", verify)
    cache = checked(tiny(keep=0.25).model, period=6, threshold=0.0)
    assert cache.inconsistent > 5
    assert cache.differences[0].layer == 1  # the first layer's K/V comes before any MLP
    assert all(one.layer == 1 for one in cache.differences)


def test_a_tree_that_is_not_compacted_is_found(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorState, "compact", lambda *_: None)
    cache = checked(tiny(keep=0.25).model, period=5, tree_width=3, threshold=0.0)
    assert cache.inconsistent > len(cache.differences) > 0
