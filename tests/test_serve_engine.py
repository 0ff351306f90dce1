"""Continuous batching: what an answer's tokens are does not depend on who else is there."""

from __future__ import annotations

import copy
import itertools
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.decoder import Way
from sirius_runtime.guard import Guard
from sirius_runtime.loading import load
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.model import SiriusModel
from sirius_runtime.request import Options
from sirius_runtime.rules import OPTIONS
from sirius_runtime.serve.answers import Answer, News
from sirius_runtime.serve.engine import Capacity, Engine
from sirius_runtime.serve.metrics import Metrics
from sirius_runtime.serve.pool import Order
from sirius_runtime.serve.prefixes import Block, PrefixCache, digests
from tests.support.fast import gate_but
from tests.support.golden_artifacts import NESTED_VERSION, unpack
from tests.support.models import TinyModels
from tests.support.tiered import tiered

CAPACITY = Capacity(rows=4, queue=64, context=96, period=16, block=8, prefix_bytes=2**20)


@dataclass
class Listener:
    """Collects what is told of an answer."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: News | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, news: News) -> None:
        assert self.last is None
        self.tokens += news.tokens
        self.logprobs += news.logprobs
        self.begun.set()
        if news.last:
            self.last = news
            self.ended.set()

    def wait(self) -> News:
        assert self.ended.wait(60)
        assert self.last is not None
        return self.last


@contextmanager
def running(model: SiriusModel, capacity: Capacity = CAPACITY) -> Iterator[Engine]:
    engine = Engine(model, capacity, Metrics("tiny"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert not engine.alive


def answer_of(
    model: SiriusModel,
    prompt: Sequence[int],
    listener: Listener,
    new_tokens: int = 20,
    seconds: float = 60,
    stop: str | None = None,
    **options: object,
) -> Answer:
    rule = {name: options.pop(name) for name in OPTIONS if name in options}
    options = {"fallback": False, "rule": rule, **options}
    request = model.request(Options(**options), [len(prompt)], new_tokens, stop=stop)  # type: ignore[arg-type]
    return Answer(
        prompt=tuple(prompt),
        request=request,
        seed=None if request.seeds is None else request.seeds[0],
        deadline=time.monotonic() + seconds,
        listen=listener,
        tokenizer=model.tokenizer,
    )


ASKED: list[dict[str, object]] = [
    {"mode": "exact"},
    {"mode": "exact", "period": 3},
    {"mode": "sirius", "period": 8},
    {"mode": "sirius", "threshold": 0.5},
    {"mode": "sample", "seed": 7, "temperature": 0.8},
    {"mode": "sample", "seed": 8, "top_p": 0.9, "period": 5},
    {"mode": "sample", "seed": 9, "top_k": 5},
    {"mode": "full"},
    {"mode": "full", "temperature": 1.2, "seed": 3},
    {"mode": "sparse"},
    {"mode": "exact", "logprobs": 2},
    {"mode": "exact", "lookup": 1},
    {"mode": "sample", "seed": 10, "lookup": 1, "period": 6},
]


Case = tuple[list[int], int, dict[str, object]]


def arrivals(model: SiriusModel, cases: Sequence[Case], chance: random.Random) -> list[Listener]:
    """Submits answers one after another, at random times; some others are given up on the way.

    However slow the machine is, the queue holds all of them: overload is another test's.
    """
    listeners = [Listener() for _ in cases]
    with running(model, replace(CAPACITY, queue=2 * len(cases))) as engine:
        for number, ((prompt, new, options), listener) in enumerate(
            zip(cases, listeners, strict=True)
        ):
            engine.submit([answer_of(model, prompt, listener, new, **options)])
            if number % 5 == 0:
                left = answer_of(model, prompt, Listener(), 40, mode="exact")
                engine.submit([left])
                engine.cancel([left])
            time.sleep(chance.random() * 0.02)
        for listener in listeners:
            assert listener.wait().error is None
        assert engine.running == engine.waiting == 0
        assert 0 < engine.prefixes.nbytes <= CAPACITY.prefix_bytes
    return listeners


def random_cases(asked: Sequence[dict[str, object]], chance: random.Random) -> list[Case]:
    """More answers than rows, in a random order; their prompts share beginnings."""
    common = [chance.randrange(6, 101) for _ in range(17)]
    cases = []
    for options in asked:
        own = [chance.randrange(6, 101) for _ in range(chance.randrange(1, 30))]
        cases.append((common[: chance.randrange(18)] + own, chance.randrange(1, 30), options))
    chance.shuffle(cases)
    return cases


def check_alone(model: SiriusModel, case: Case, listener: Listener) -> None:
    """What was told is what a run of its own gives."""
    prompt, new, options = case
    alone = model.generate(
        input_ids=prompt,
        max_new_tokens=new,
        fallback=False,
        **options,  # type: ignore[arg-type]
    )
    assert tuple(listener.tokens) == alone.tokens[0], options
    assert listener.last is not None
    assert listener.last.reason == alone.finish_reasons[0]
    if alone.logprobs is None:
        return
    assert [entry.token for entry in listener.logprobs] == listener.tokens
    for ours, theirs in zip(listener.logprobs, alone.logprobs[0], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.parametrize("method", gate_but(("griffin", "topk"), {"griffin"}))
def test_tokens_are_those_of_a_run_alone(tiny: TinyModels, method: str) -> None:
    model, chance = tiny("llama", method).model, random.Random(method)
    cases = random_cases(ASKED + ASKED[:5], chance)
    for case, listener in zip(cases, arrivals(model, cases, chance), strict=True):
        check_alone(model, case, listener)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["griffin", "cats", "teal", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_tokens_of_many_answers(tiny: TinyModels, family: str, method: str) -> None:
    model, chance = tiny(family, method).model, random.Random(family + method)
    cases = random_cases(ASKED * 8, chance)
    for case, listener in zip(cases, arrivals(model, cases, chance), strict=True):
        check_alone(model, case, listener)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["dtype", "int8"])
def test_tokens_of_the_shipped_model(weights: str) -> None:
    config = CompileConfig(sparsity="griffin", graphs="entries", weights=weights, dtype="float32")
    model = compile_model("tally-3m", config).to_runtime()
    chance = random.Random(0)
    asked = ASKED * 6
    questions = itertools.islice(problems(Task.REASONING, "test", seed=5), len(asked))
    prompts = model.encode([problem.prompt for problem in questions])
    cases = [(list(p), 60, options) for p, options in zip(prompts, asked, strict=True)]
    capacity = Capacity(rows=6, queue=200, context=256, period=16, block=32)
    listeners = [Listener() for _ in cases]
    with running(model, capacity) as engine:
        for (prompt, new, options), listener in zip(cases, listeners, strict=True):
            engine.submit([answer_of(model, prompt, listener, new, **options)])
            time.sleep(chance.random() * 0.05)
        for listener in listeners:
            listener.wait()
    for case, listener in zip(cases, listeners, strict=True):
        check_alone(model, case, listener)


@pytest.mark.parametrize("method", ["griffin", "topk"])
def test_guarded_answers_are_the_dense_ones(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Dense steps and drafts of changing lengths, while answers come and go."""
    ways = itertools.cycle([(Way.DRAFT, 4), (Way.DENSE, 1), (Way.DENSE, 1), (Way.DRAFT, 16)])
    seen: list[tuple[Way, int]] = []

    def observe(self: Guard, way: Way, size: int, levels: int, rows: Any, seconds: float) -> None:
        seen.append((way, len(rows)))
        assert all(0 <= accepted <= drafted < max(size, 1) for drafted, accepted in rows)
        known(self, way, size, levels, rows, seconds)

    known = Guard.observe
    monkeypatch.setattr(Guard, "choose", lambda self: next(ways))
    monkeypatch.setattr(Guard, "observe", observe)
    model, chance = tiny("llama", method).model, random.Random(method)
    asked = [{"mode": mode, "fallback": True} for mode in ("exact", "exact", "full", "exact")] * 3
    for (prompt, new, _), listener in zip(
        cases := random_cases(asked, chance), arrivals(model, cases, chance), strict=True
    ):
        dense = model.generate(input_ids=prompt, max_new_tokens=new, mode="full")
        assert tuple(listener.tokens) == dense.tokens[0]
    assert {way for way, _ in seen} == {Way.DRAFT, Way.DENSE}
    assert max(rows for _, rows in seen) > 1


def test_drafts_that_do_not_pay_are_left_out(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; a request that says how to draft is left alone."""
    monkeypatch.setattr("sirius_runtime.request.FALLBACK", True)
    monkeypatch.setattr(Guard, "choose", lambda self: (Way.DENSE, 1))
    model = tiny("llama", "topk").model
    told = {
        "guarded": {"lookup": 0},
        "period": {"period": 4},
        "drawn": {"mode": "sample", "seed": 1},
    }
    answers = {
        name: answer_of(model, [7, 8, 9], Listener(), fallback=None, **options)
        for name, options in told.items()
    }
    with running(model) as engine:
        engine.submit(list(answers.values()))
        for answer in answers.values():
            assert answer.listen.wait().error is None  # type: ignore[attr-defined]
        assert not engine._guards
    assert answers["guarded"].drafted == 0
    assert min(answers[name].drafted for name in ("period", "drawn")) > 0


@pytest.mark.slow
def test_griffin_s_neurons_are_refreshed_by_a_row_s_own_periods(tiny: TinyModels) -> None:
    """Rows that begin at different times, so that they are due at different times."""
    made, chance = tiny("llama", "griffin", 0.3).model, random.Random(1)
    backend = copy.copy(made.backend)
    period = replace(backend.program.period, refresh=2)
    backend.program = replace(backend.program, period=period)
    model = SiriusModel(backend, made.tokenizer)
    cases = random_cases(
        [{"mode": "exact", "period": 4}, {"mode": "sirius", "period": 3}] * 4, chance
    )
    for case, listener in zip(cases, arrivals(model, cases, chance), strict=True):
        check_alone(model, case, listener)
    (prompt, _, options), *_ = cases
    plain = made.generate(input_ids=prompt, max_new_tokens=40, fallback=False, **options)  # type: ignore[arg-type]
    fresh = model.generate(input_ids=prompt, max_new_tokens=40, fallback=False, **options)  # type: ignore[arg-type]
    assert plain.steps != fresh.steps  # refreshing matters here


class Recording:
    """A back end that notes what it runs, and may hold it up."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.runs: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, entry: str, inputs: Mapping[str, Any]) -> Any:
        self.runs.append((entry, tuple(inputs["input_ids"].shape)))
        return self._backend.run(entry, inputs)


@pytest.fixture
def recording(tiny: TinyModels) -> tuple[SiriusModel, Recording]:
    made = tiny("llama", "griffin").model
    own: Any = Recording(made.backend)
    return SiriusModel(own, made.tokenizer), own


def test_a_long_prompt_holds_nobody_up(recording: tuple[SiriusModel, Recording]) -> None:
    """Between two of its blocks, the answer that was there before goes on by a period."""
    model, runs = recording
    before, late = Listener(), Listener()
    with running(model) as engine:
        engine.submit([answer_of(model, [7, 8, 9], before, 80, mode="exact", period=2)])
        before.begun.wait(60)
        engine.submit([answer_of(model, list(range(6, 76)), late, 1)])
        late.wait()
        before.wait()
    entries = [entry for entry, _ in runs.runs]
    blocks = [place for place, entry in enumerate(entries) if entry == "prefill"]
    assert all(size <= CAPACITY.block for entry, (_, size) in runs.runs if entry == "prefill")
    assert len(blocks) == 1 + 9
    for one, next_one in itertools.pairwise(blocks[1:]):
        assert "full" in entries[one:next_one]


def test_a_shared_beginning_is_computed_once(recording: tuple[SiriusModel, Recording]) -> None:
    """Also by prompts that run at the same time."""
    model, runs = recording
    common = list(range(10, 50))
    cases: list[Case] = [([*common, 60 + index], 6, {"mode": "sirius"}) for index in range(4)]
    listeners = [Listener() for _ in cases]
    with running(model) as engine:
        answers = [
            answer_of(model, prompt, listener, new, **options)
            for (prompt, new, options), listener in zip(cases, listeners, strict=True)
        ]
        engine.submit(answers)
        for listener in listeners:
            listener.wait()
    ran = sum(size for entry, (_, size) in runs.runs if entry == "prefill")
    assert ran == 40 + 4
    assert sum(answer.cached for answer in answers) == 3 * 40
    for case, listener in zip(cases, listeners, strict=True):
        check_alone(model, case, listener)


def test_the_same_tokens_after_others_are_not_taken(tiny: TinyModels) -> None:
    model = tiny("llama", "griffin").model
    later = list(range(30, 50))
    cases: list[Case] = [([first] * 8 + later, 12, {"mode": "exact"}) for first in (7, 8)]
    with running(model) as engine:
        for case in cases:
            prompt, new, options = case
            answer = answer_of(model, prompt, listener := Listener(), new, **options)
            engine.submit([answer])
            listener.wait()
            assert answer.cached == 0
            check_alone(model, case, listener)


def test_without_a_prefix_cache(recording: tuple[SiriusModel, Recording]) -> None:
    model, runs = recording
    with running(model, replace(CAPACITY, prefix_bytes=0)) as engine:
        for _ in range(2):
            listener = Listener()
            engine.submit([answer_of(model, list(range(10, 50)), listener, 1)])
            listener.wait()
        assert engine.prefixes.nbytes == 0
    assert sum(size for entry, (_, size) in runs.runs if entry == "prefill") == 80


def block(numbers: int) -> Block:
    return Block(torch.zeros(numbers), torch.zeros(numbers), None)


def test_prefixes_leave_least_recently_used_first() -> None:
    cache = PrefixCache(3 * block(10).nbytes)
    for name in (b"a", b"ab", b"x"):
        cache.put(name, block(10))
    cache.used([b"a", b"ab"])
    cache.put(b"y", block(10))
    assert [cache.get(name) is not None for name in (b"a", b"ab", b"x", b"y")] == [
        *(True, True),
        *(False, True),
    ]
    cache.used([b"y"])
    cache.put(b"z", block(10))
    assert cache.get(b"ab") is None  # the later part of a beginning leaves before its start
    assert cache.get(b"a") is not None
    cache.put(b"large", block(31))
    assert cache.get(b"large") is None
    assert cache.nbytes == cache.bound


def test_digests_stand_for_all_tokens_before() -> None:
    one, other = digests([1, 2, 3, 4, 5], 2), digests([9, 2, 3, 4], 2)
    assert len(one) == len(other) == 2
    assert not set(one) & set(other)
    assert digests([1, 2, 3, 4, 7, 8], 2)[:2] == one


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 9)), max_size=40))
def test_groups_stay_side_by_side(steps: list[tuple[bool, int, int]]) -> None:
    """What lies in a place goes where its item goes."""
    order: Order[int] = Order()
    rows: list[int | None] = [None] * 8
    held: dict[int, int] = {}
    for number, (comes, key, which) in enumerate(steps):
        if comes and len(held) < len(rows):
            order.add(key, number)
            held[number] = key
        elif held and not comes:
            item = list(held)[which % len(held)]
            order.remove(held.pop(item), item)
        moves = order.settle(len(rows))
        if moves is not None:
            assert sorted(set(moves)) == sorted(moves)
            rows[: len(moves)] = [rows[old] for old in moves]
        for item, place in order.place.items():
            rows[place] = item if rows[place] is None or item == number else rows[place]
            assert rows[place] == item
        keys = [held[item] for item, _ in sorted(order.place.items(), key=lambda p: p[1])]
        assert len([k for k, _ in itertools.groupby(keys)]) == len(set(keys))
        assert sorted(order.place.values()) == list(range(len(held)))


def test_weights_that_stream(tmp_path: Path) -> None:
    """Of a model of which a part stays in memory: the same answers, side by side."""
    path = unpack(f"{NESTED_VERSION}/llama-griffin-nested", tmp_path)
    plain, (part, _) = load(path), tiered(path)
    prompts = [[7, 50, 11], [60, 7], [11, 11, 11, 50]]
    capacity = Capacity(rows=2, queue=8, context=48, period=4, block=8, prefix_bytes=2**20)
    found = []
    for model in (plain, part):
        listeners = [Listener() for _ in prompts]
        with running(model, capacity) as engine:
            for prompt, listener in zip(prompts, listeners, strict=True):
                engine.submit([answer_of(model, prompt, listener, 8, mode="exact", period=4)])
            for listener in listeners:
                listener.wait()
        found.append([listener.tokens for listener in listeners])
    assert found[0] == found[1]
