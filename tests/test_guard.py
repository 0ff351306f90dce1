"""The guard of a default run: never slower than dense steps by more than a little, whatever drafts
are worth; and the tokens that it leaves.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sirius_runtime import load
from sirius_runtime.cli import main as sirius
from sirius_runtime.decoder import Way
from sirius_runtime.guard import HOLD, Costs, Guard
from tests.support.fast import gate_but
from tests.support.models import TinyModels

TOKENS, LONGEST = 200, 16


@dataclass(frozen=True)
class Machine:
    """Dense steps that a sparse step takes, and what a verified token more does."""

    density: float
    sparse: float
    verify: float

    def period(self, size: int) -> float:
        return 1 + (size - 1) * (self.sparse + self.verify)

    def best(self, chance: float) -> float:
        """The best fixed period's tokens a dense step."""
        return max(
            sum(chance**level for level in range(size)) / self.period(size)
            for size in range(1, LONGEST + 1)
        )

    def run(self, chance: Callable[[int], float], seed: int) -> tuple[float, Guard]:
        """Dense steps' time over that of guarded tokens, with a clock that is up to 5% late."""
        numbers, guard = random.Random(seed), Guard(LONGEST, Costs(self.density))
        tokens, spent = 0, 0.0
        while tokens < TOKENS:
            way, size = guard.choose()
            size, accepted, took = min(size, TOKENS - tokens), 0, 1.0
            if way is Way.DRAFT:
                while accepted < size - 1 and numbers.random() < chance(tokens):
                    accepted += 1
                took = self.period(size)
            took *= 1 + 0.05 * numbers.random()
            guard.observe(way, size, size - 1, [(size - 1, accepted)], took)
            tokens, spent = tokens + accepted + 1, spent + took
        return TOKENS * 1.025 / spent, guard


MACHINES = (
    Machine(0.65, 0.65, 0.02),
    Machine(0.65, 0.8, 0.1),
    Machine(0.5, 0.55, 0.03),
    Machine(0.75, 0.9, 0.1),
)
CHANCES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)


@pytest.mark.parametrize("machine", gate_but(MACHINES, MACHINES[:1]), ids=str)
def test_it_loses_little_to_dense_steps_and_to_the_best_period(machine: Machine) -> None:
    shares = []
    for chance in CHANCES:
        speeds = sorted(machine.run(lambda _, c=chance: c, seed)[0] for seed in range(40))
        assert sum(speeds) / len(speeds) > 0.97
        assert speeds[2] > 0.95  # of twenty the worst
        shares.append(sum(speeds) / len(speeds) / machine.best(chance))
    assert sum(shares) / len(shares) > 0.96


def test_what_never_passes_is_tried_less_and_less() -> None:
    _, guard = MACHINES[0].run(lambda _: 0.0, 0)
    assert guard.fallback is not None
    assert guard.fallback.advance == 1.0
    assert guard.fallback.cost > 1.5
    assert guard.fallback.tokens > 0.97 * TOKENS


def test_what_always_passes_drafts_the_longest_period() -> None:
    speed, guard = MACHINES[0].run(lambda _: 1.0, 0)
    assert guard.fallback is None
    assert guard.choose() == (Way.DRAFT, LONGEST)
    assert speed > 1.35


@pytest.mark.parametrize("chance", [0.95, 1.0])
def test_a_clock_that_is_often_disturbed_does_not_end_drafts_that_pay(chance: float) -> None:
    """A third of all steps and periods take up to three times as long as they should."""
    shares = []
    for seed in range(20):
        numbers, guard = random.Random(seed), Guard(LONGEST, Costs(0.5))
        machine, drafted, tokens = Machine(0.5, 0.55, 0.03), 0, 0
        while tokens < TOKENS:
            way, size = guard.choose()
            accepted, took = 0, 1.0
            if way is Way.DRAFT:
                while accepted < size - 1 and numbers.random() < chance:
                    accepted += 1
                took = machine.period(size)
                drafted += accepted + 1
            if numbers.random() < 1 / 3:
                took *= 1 + 2 * numbers.random()
            guard.observe(way, size, size - 1, [(size - 1, accepted)], took)
            tokens += accepted + 1
        shares.append(drafted / tokens)
    assert sum(shares) / len(shares) > 0.9


def test_where_periods_take_longer_than_they_read_drafts_end() -> None:
    costs = Costs(0.5)
    guard = Guard(LONGEST, costs)
    for _ in range(20):
        way, size = guard.choose()
        guard.observe(way, size, size - 1, [(size - 1, size - 1)], 1.2 * size)
    assert guard.fallback is not None
    assert costs.steps(8) == pytest.approx(8, rel=0.1)


def test_what_one_answer_showed_is_known_to_the_next() -> None:
    machine, costs = Machine(0.65, 0.65, 0.02), Costs(0.65)
    for number in range(2):
        guard, dense = Guard(LONGEST, costs, 0.98), 0
        for _ in range(8):
            way, size = guard.choose()
            dense += way is Way.DENSE
            took = machine.period(size)
            guard.observe(way, size, size - 1, [(size - 1, size - 1)], took)
        assert dense == (0 if number else 2)
    assert costs.steps(LONGEST) == pytest.approx(machine.period(LONGEST), rel=0.02)


def test_it_begins_with_what_the_compiler_measured() -> None:
    assert (
        Guard(LONGEST, Costs(0.5), 0.99).choose()[1] > Guard(LONGEST, Costs(0.5), 0.8).choose()[1]
    )
    assert Guard(LONGEST, Costs(0.9), 0.8).choose()[1] == 2


def test_drafts_come_back_when_they_pay_again() -> None:
    speeds = [MACHINES[0].run(lambda at: float(at >= 50), seed)[0] for seed in range(20)]
    assert min(speeds) > 1.1  # three quarters of the tokens pass at 1.45 times the dense speed


def test_the_same_observations_give_the_same_choices() -> None:
    first, second = (MACHINES[1].run(lambda _: 0.85, 7)[0] for _ in range(2))
    assert first == second


def test_a_period_of_one_token_is_a_dense_step() -> None:
    assert Guard(1, Costs(0.5)).choose() == (Way.DENSE, 1)


# generations

PROMPTS = [[7, 8, 9], [50, 30, 11, 22]]
RUN: dict[str, Any] = {"max_new_tokens": 80, "eos_token_id": [], "fallback": True}


def drafts_never_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which periods take as long as they read, whatever passes."""

    def observe(self: Guard, way: Way, size: int, levels: int, rows: Any, seconds: float) -> None:
        one_refused = [(drafted, 0) for drafted, _ in rows]
        known(self, way, size, levels, one_refused, 1.0 + levels)

    known = Guard.observe
    monkeypatch.setattr(Guard, "observe", observe)


@pytest.mark.parametrize("mode", ["exact", "sirius"])
def test_what_falls_back_gives_the_dense_tokens(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    drafts_never_pay(monkeypatch)
    model = tiny(method="topk").model
    dense = model.generate(PROMPTS, mode="full", max_new_tokens=80, eos_token_id=[]).tokens
    # Above 1 no draft passes, so that `sirius` too is the full path's own.
    output = model.generate(PROMPTS, mode=mode, threshold=1.5, **RUN)
    assert output.tokens == dense
    stats = output.stats
    assert stats.fallback is not None
    assert HOLD * 2 <= stats.fallback.tokens <= stats.dense_tokens
    assert stats.dense_tokens + sum(a * n for a, n in stats.advances.items()) == 2 * 79
    assert stats.effective_density is not None
    assert stats.effective_density < 1.2


@pytest.mark.gate
@pytest.mark.parametrize("method", ["griffin", "teal"])
def test_exact_tokens_are_the_same_guarded_or_not(tiny: TinyModels, method: str) -> None:
    """By the machine's own clock, whatever it says."""
    model = tiny(method=method).model
    for options in ({}, {"refresh": 1} if method == "griffin" else {"tree_width": 3}):
        given = RUN | {"mode": "exact"} | options
        wanted = model.generate(PROMPTS, **given | {"fallback": False}).tokens
        assert model.generate(PROMPTS, **given).tokens == wanted


def test_by_default_what_says_how_to_draft_is_not_guarded(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts_never_pay(monkeypatch)
    monkeypatch.setattr("sirius_runtime.request.FALLBACK", True)
    model = tiny(method="topk").model
    run = {"max_new_tokens": 40, "eos_token_id": []}
    assert model.generate(PROMPTS, **run).stats.fallback is not None
    for options in ({"period": 4}, {"tree_width": 2}, {"fallback": False}, {"mode": "sample"}):
        assert model.generate(PROMPTS, **run, **options).stats.dense_tokens == 0


def test_the_last_line_says_so(
    tiny: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drafts_never_pay(monkeypatch)
    path = tiny(method="topk").compiled.save(tmp_path / "model.sirius")
    command = ["run", str(path), "-p", "w7 w8", "--max-new-tokens", "40", "--backend", "eager"]
    assert sirius([*command, "--fallback", "--mode", "exact"]) == 0
    (line,) = [n for n in capsys.readouterr().err.splitlines() if "tokens/s" in n]
    said = r"drafts did not pay \(1\.0 tokens in the time of \d\.\d dense steps\): decoded densely"
    assert re.search(said + r" for \d+ of \d+ tokens$", line), line
    assert sirius([*command, "--no-fallback"]) == 0
    assert "did not pay" not in capsys.readouterr().err
    assert load(path).generate([7], max_new_tokens=3).stats.fallback is None
