"""Summaries of results by mode: accuracy with a confidence interval, AAL, density and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sirius_runtime.evaluation.results import Result
from sirius_runtime.request import Mode

RESAMPLES = 10_000
_AT_ONCE = 2**22  # indices drawn at once, to bound memory


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """A summary of a mode. Values that were not measured are None.

    strict: accuracy by the task's strict rule. difference: accuracy minus that of mode full, on the
    same problems. unanswered: texts without an answer. cut: texts that reached the length limit.
    corrections: periods in which a token was refused, per 100 tokens.
    effective_density: weight reads per committed token, without each sequence's last period, as in
    `GenerationStats`. speed: tokens/s relative to mode full.
    """

    mode: str
    problems: int
    accuracy: Interval
    strict: float | None
    difference: Interval | None
    unanswered: int
    cut: int
    tokens: int
    aal: float | None
    corrections: float | None
    density: float
    effective_density: float
    seconds: float
    tokens_per_second: float | None
    speed: float | None


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of per-problem values with its 95% percentile bootstrap interval over problems.

    For the difference of two modes pass each problem's difference, which is a paired bootstrap.
    """
    sample = np.asarray(values, np.float64)
    generator, means = np.random.default_rng(seed), []
    step = max(1, _AT_ONCE // len(sample))
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        means.append(sample[generator.integers(0, len(sample), (count, len(sample)))].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high))


def summarise(by_mode: Mapping[str, Sequence[Result]], seed: int = 0) -> list[Summary]:
    """The summaries of the modes that have results, in the order of `by_mode`."""
    full = {result.problem: result for result in by_mode.get(Mode.FULL, ())}
    dense = _tokens_per_second(list(full.values()))
    return [
        _summary(mode, results, full, dense, seed) for mode, results in by_mode.items() if results
    ]


def _summary(
    mode: str,
    results: Sequence[Result],
    full: Mapping[str, Result],
    dense: float | None,
    seed: int,
) -> Summary:
    pairs = [
        float(result.correct) - float(full[result.problem].correct)
        for result in results
        if result.problem in full
    ]
    stricts = [result.strict for result in results if result.strict is not None]
    speed = _tokens_per_second(results)
    tokens = sum(result.tokens for result in results)
    density = sum(r.density * r.tokens for r in results) / tokens
    aal, effective = _advance(mode, results, density)
    return Summary(
        mode=mode,
        problems=len(results),
        accuracy=bootstrap([float(result.correct) for result in results], seed),
        strict=sum(stricts) / len(stricts) if stricts else None,
        difference=bootstrap(pairs, seed) if pairs and mode != Mode.FULL else None,
        unanswered=sum(result.answer is None for result in results),
        cut=sum(result.finish == "length" for result in results),
        tokens=tokens,
        aal=aal,
        corrections=None if aal is None else _corrections(results),
        density=1.0 if mode == Mode.FULL else density,
        effective_density=effective,
        seconds=sum(result.seconds for result in results),
        tokens_per_second=speed,
        speed=None if speed is None or dense is None else speed / dense,
    )


def _advance(mode: str, results: Sequence[Result], density: float) -> tuple[float | None, float]:
    """AAL (None without periods) and effective density, with the last periods left out."""
    every = [(period, r.density) for r in results for period in r.periods]
    counted = [(period, r.density) for r in results for period in r.periods[:-1]] or every
    if not counted:
        return None, 1.0 if mode == Mode.FULL else density
    advance = sum(period.advance for period, _ in counted)
    reads = sum(period.reads(density) for period, density in counted)
    dense = sum(result.dense for result in results)
    return advance / len(counted), (reads + dense) / (advance + dense)


def _corrections(results: Sequence[Result]) -> float:
    refused = sum(period.advance < period.size for r in results for period in r.periods)
    return 100 * refused / sum(result.tokens for result in results)


def _tokens_per_second(results: Sequence[Result]) -> float | None:
    seconds = sum(result.seconds for result in results)
    decoded = sum(result.tokens - 1 for result in results)  # prefill makes the first token
    return decoded / seconds if seconds else None
