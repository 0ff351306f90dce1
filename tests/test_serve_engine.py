"""Continuous batching: what an answer's tokens are does not depend on who else is there."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sirius_runtime.loading import load
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.model import SiriusModel
from sirius_runtime.request import Options
from sirius_runtime.rules import OPTIONS
from sirius_runtime.serve.answers import Answer, News
from sirius_runtime.serve.engine import Capacity, Engine
from sirius_runtime.serve.metrics import Metrics
from tests.support.golden_artifacts import unpack
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
]


@pytest.mark.parametrize("method", ["griffin", "topk"])
def test_tokens_are_those_of_a_run_alone(tiny: TinyModels, method: str) -> None:
    """Random arrivals: more answers than rows, prompts that share beginnings, some given up."""
    model, chance = tiny("llama", method).model, random.Random(0)
    common = [chance.randrange(6, 101) for _ in range(17)]
    cases = []
    for index in range(3 * len(ASKED)):
        own = [chance.randrange(6, 101) for _ in range(chance.randrange(1, 30))]
        prompt = common[: chance.randrange(18)] + own
        cases.append((prompt, chance.randrange(1, 30), ASKED[index % len(ASKED)]))
    chance.shuffle(cases)
    listeners = [Listener() for _ in cases]
    with running(model) as engine:
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
    for (prompt, new, options), listener in zip(cases, listeners, strict=True):
        alone = model.generate(input_ids=prompt, max_new_tokens=new, fallback=False, **options)  # type: ignore[arg-type]
        assert tuple(listener.tokens) == alone.tokens[0], options
        assert listener.last is not None
        assert listener.last.reason == alone.finish_reasons[0]
        if alone.logprobs is not None:
            told = [entry.token for entry in listener.logprobs]
            assert told == listener.tokens
            for ours, theirs in zip(listener.logprobs, alone.logprobs[0], strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_weights_that_stream(tmp_path: Path) -> None:
    """Of a model of which a part stays in memory: the same answers, side by side."""
    path = unpack("2.0/llama-griffin-nested", tmp_path)
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
