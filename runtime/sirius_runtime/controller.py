"""The online controller of `generate(period="auto")`: which period K and tree width w come next.

It maximises committed tokens per second, E[advance] / seconds of a period, as estimated from the
generation's own periods. All rows share (K, w), so their number cancels out.

    E[advance]  1 + sum over d < K of a_w(1) .. a_w(d)
    seconds     (K - 1) draft_w + verify(N) + rest,  N = (K - 1) w + 1

What is measured:

- a_w(d), the probability that level d passes, given that the levels above it passed. A row tries
  each level up to the first refused one. If none was refused, nothing is known of the level after
  its last (a censored observation). Counts decay every period, so that a change of the text is
  followed. A level with few trials is shrunk towards the levels just above it, and these towards
  the width's pooled rate; a level that was never tried continues the trend. With the pooled rate
  alone, a chain whose levels pass more often with depth would not be lengthened.
- Drafts may stop early (`confidence`, the end of a row), so K is a cap. The probability that a row
  drafts on scales the advance; the probability that any row of the batch does scales the levels
  that cost time.
- Seconds are low quantiles of the last few samples, because only slow outliers are common.
  The first period of each K and w may include setup for new shapes: if it is the only sample, it
  counts only where it is fast. verify(N) comes from N's own samples where two of them agree
  (kernels change at some N), else from a robust line (Theil-Sen) through the other N.
- A width that never ran is estimated optimistically: refusals fall as 1 / w and its steps cost no
  more. A step of a width that hardly ran costs at most what its nodes would cost in narrower steps.

Exploration is bounded. The opening is short: a long and a dense period, repeated until their times
agree, then each width once at its best K, and again if it was slow. Later a width's best K is
searched up to twice the longest K that it ran. Every `PROBE_EVERY` periods there is a probe: in
turn a longer period, a dense one, another width. A probe is predicted to lose some seconds against
the best choice; all probes together may lose `PROBE_SHARE` of the time. A probe that wins is
repeated, so that improvements are found soon. A choice is kept until another is better by
`HYSTERESIS`, and K comes from a ladder, because a new K or w may need new allocations or
compilation.

Where a verification streams weights from a slower tier, the time of the stream is known in advance:
it is the first estimate of verify(N) for every N. The opening then is a long period. Dense steps,
which stream as much for one token, are left to probes.

Pure Python without random numbers: the same observations give the same choices.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

from sirius_runtime.errors import ConfigError

# Simulated rates hardly depend on these: halving or doubling one moves their mean by 1% at most.
OPENING_PERIOD = 5
"""The greatest K of the opening: long enough to observe some levels, and cheap where most drafts
are refused.
"""
STREAMED_PERIOD = 16
"""As `OPENING_PERIOD`, where a verification streams weights: a short period saves little compared
with the stream's time.
"""
OPENING_ROUNDS, AGREE = 3, 1.5
"""The most rounds of the opening. The rounds end sooner if the two shortest times agree, within
this factor.
"""
FORGET = 0.96
"""The factor by which counts decay each period: a memory of 25 periods."""
LEAST_TRIALS = 6.0
"""Number of trials below which the counts of a width that is not in use do not decay. Its estimate
is kept, but new periods soon outweigh it.
"""
RATE, RATE_TRIALS = 0.8, 8.0
"""Prior of the narrowest width's pooled rate, and the weight of any width's prior, in trials."""
NEAR, NEAR_TRIALS, LEVEL_TRIALS = 0.75, 16.0, 8.0
"""How a level's rate is shrunk: the trials of a level above are weighted by `NEAR` for each level
of distance; the pooled rate counts as `NEAR_TRIALS` of those, and that estimate as `LEVEL_TRIALS`
of the level's own.
"""
STOP_TRIALS = 8.0
"""Weight, in trials, of the prior that no draft stops early."""
SAMPLES, SURE_SAMPLES = 9, 2
"""Samples kept of the step time and of the rest's; and how many make a width's step time reliable.
"""
VERIFY_SAMPLES, VERIFY_POINTS, ONE_NODE = 5, 6, 1.0
"""Samples kept of each N; the most different N; and the weight of N = 1 in the line's fit. Other N
weigh as much as their number of samples. N = 1 weighs less because it often runs a faster kernel.
"""
PROBE_EVERY, PROBE_SHARE, PROBE_WINS = 24, 0.02, 1.2
"""Periods between probes; the share of the time that probes may lose; and the multiple of the best
choice's tokens per second that a probe must reach to be repeated.
"""
HYSTERESIS = 0.01
"""The relative gain in tokens per second from which another choice replaces the current one."""
LEAST_SECONDS, LONGEST_SECONDS = 1e-9, 1e9
"""Least seconds of a period, and most seconds of a sample: rates stay finite for any clock values.
"""


@dataclass(frozen=True)
class Observation:
    """One period as it ran.

    `period` K, `width` w and `nodes` N of its tree; `levels`: sparse steps that ran. `rows`:
    (drafted, accepted) levels of each live row; accepted < drafted means that the token after the
    accepted ones was refused. `draft_seconds`: of all sparse steps together; `verify_seconds`: of
    the verify pass; `rest_seconds`: of the rest of the period.
    """

    period: int
    width: int
    levels: int
    nodes: int
    draft_seconds: float
    verify_seconds: float
    rest_seconds: float
    rows: tuple[tuple[int, int], ...]


class Controller:
    """Chooses each next period of one generation; `observe` must be called after every period.

    most_period: the greatest K it may choose, at least 1 (1: always dense). widths: the tree widths
    it may choose. A dense period (K = 1) has no tree; its width is the narrowest one. streaming:
    seconds that a verification takes to stream weights, 0 where all weights are held.
    """

    def __init__(
        self, most_period: int, widths: Sequence[int] = (1,), streaming: float = 0.0
    ) -> None:
        if most_period < 1:
            raise ConfigError(f"the longest period is {most_period}; it must be at least 1")
        if not widths or any(width < 1 for width in widths):
            raise ConfigError(f"tree widths are {tuple(widths)}; give at least one, each 1 or more")
        self._ladder = tuple(_ladder(most_period))
        self._widths = [_Width(width, most_period) for width in sorted(set(widths))]
        self._streams = streaming > 0.0
        self._verify = _VerifyCost(streaming)
        self._rest = Samples(SAMPLES)
        self._shapes: set[tuple[int, int]] = set()  # those that ran
        self._periods = 0
        self._best = self._forecast(self._widths[0], 1)
        self._probed: _Forecast | None = None  # the current choice, if it is a probe
        self._winner: _Forecast | None = None  # the last period, where it was a probe that won
        self._turn = self._last_probe = 0
        self._credit = 0.0  # seconds that probes may lose
        self._opening = self._openings()
        self._choice = next(self._opening)

    def choose(self) -> tuple[int, int]:
        """The next period's K and w; the same until the next observation."""
        return self._choice

    def observe(self, observation: Observation) -> None:
        """Learns from a period that ran; it need not be the chosen one."""
        self._periods += 1
        self._winner, self._probed = self._won(observation), None
        shape = observation.period, observation.width
        first = shape not in self._shapes
        self._shapes.add(shape)
        self._verify.add(observation.nodes, observation.verify_seconds, first)
        self._rest.add(observation.rest_seconds)
        for model in self._widths:
            if model.width == observation.width and observation.levels > 0:
                model.observe(observation, self._periods, first)
        narrower = None
        for model in self._widths:
            model.assume(narrower)
            narrower = model
        self._choice = next(self._opening, None) or self._next()

    def _openings(self) -> Iterator[tuple[int, int]]:
        """The choices of the opening; each is computed when it is asked for."""
        longest = STREAMED_PERIOD if self._streams else OPENING_PERIOD
        narrowest, most = self._widths[0], min(longest, self._ladder[-1])
        yield most, narrowest.width
        # Where many drafts are refused, a shorter period gives as much information.
        period = min(most, round(2.0 * narrowest.advance[most]))
        nodes = (period - 1) * narrowest.width + 1
        for _ in range(OPENING_ROUNDS):
            if not self._streams and not self._verify.settled(1):
                yield 1, narrowest.width
            if period > 1 and not (self._verify.settled(nodes) and narrowest.steps.count):
                yield period, narrowest.width
        if most > 1:
            for narrower, model in pairwise(self._widths):
                choice = self._best_of(model).choice
                yield choice
                if model.step > AGREE * narrower.step:
                    yield choice

    def _next(self) -> tuple[int, int]:
        """The best choice, or a probe."""
        drafting = self._widths if self._ladder[-1] > 1 else []
        of_width = [self._best_of(model) for model in drafting]
        best = max([self._forecast(self._widths[0], 1), *of_width], key=_rate)
        kept = self._forecast(self._best.model, self._best.period)
        self._best = best if best.rate > kept.rate * (1.0 + HYSTERESIS) else kept
        self._credit += PROBE_SHARE * self._best.seconds
        if self._winner is not None:
            self._probed = self._affordable(self._winner.model, (self._winner.period,))
        elif self._periods - self._last_probe >= PROBE_EVERY:
            self._probed = self._probe([one for one in of_width if one.model != self._best.model])
        return (self._probed or self._best).choice

    def _probe(self, others: list[_Forecast]) -> _Forecast | None:
        """The next probe in turn that the credit covers; `others`: the best of the other widths."""
        period = self._best.period
        longer = self._ladder[min(self._ladder.index(period) + 2, len(self._ladder) - 1)]
        # Another width is first probed with a K as long as the one in use: the most informative.
        turns: list[tuple[_Width, tuple[int, ...]]] = [
            (self._best.model, (longer, 2)),
            (self._widths[0], (1,)),
            *((one.model, (max(period, one.period), one.period, 2)) for one in others),
        ]
        for turn in range(self._turn, self._turn + len(turns)):
            probe = self._affordable(*turns[turn % len(turns)])
            if probe is not None:
                self._turn, self._last_probe = turn + 1, self._periods
                return probe
        return None

    def _affordable(self, model: _Width, periods: Sequence[int]) -> _Forecast | None:
        """The first of these periods that is not the best choice and whose predicted loss the
        credit covers; subtracts the loss from the credit.
        """
        for period in periods:
            probe = self._forecast(model, min(period, self._ladder[-1]))
            loss = max(0.0, probe.seconds - probe.advance / self._best.rate)
            if probe.choice != self._best.choice and loss <= self._credit:
                self._credit -= loss
                return probe
        return None

    def _won(self, observation: Observation) -> _Forecast | None:
        """The probe, if this period was the probe and was `PROBE_WINS` times as fast as the
        prediction for the best choice; else None.
        """
        probe, rows = self._probed, observation.rows
        if probe is None or not rows or (observation.period, observation.width) != probe.choice:
            return None
        advance = 1.0 + sum(accepted for _, accepted in rows) / len(rows)
        return probe if advance > PROBE_WINS * self._best.rate * probe.seconds else None

    def _best_of(self, model: _Width) -> _Forecast:
        """The best choice with K > 1 for a width."""
        end = bisect_right(self._ladder, 2 * model.longest or OPENING_PERIOD)
        best, best_rate = 2, 0.0
        advance, seconds = model.advance, self._seconds
        for period in self._ladder[1 : max(2, end)]:
            rate = advance[period] / seconds(model, period)
            if rate > best_rate:
                best, best_rate = period, rate
        return self._forecast(model, best)

    def _forecast(self, model: _Width, period: int) -> _Forecast:
        return _Forecast(model, period, model.advance[period], self._seconds(model, period))

    def _seconds(self, model: _Width, period: int) -> float:
        levels = model.levels[period]
        verify = self._verify.seconds(levels * model.width + 1.0)
        return levels * model.step + verify + self._rest.typical + LEAST_SECONDS


class _Forecast(NamedTuple):
    """The prediction for a period of this width and K: tokens that a row commits, and seconds."""

    model: _Width
    period: int
    advance: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.advance / self.seconds

    @property
    def choice(self) -> tuple[int, int]:
        return self.period, self.model.width


def _rate(forecast: _Forecast) -> float:
    return forecast.rate


def _ladder(most: int) -> Iterator[int]:
    """The K to choose from: 1 to 6, then each a third greater than the one before, then `most`."""
    period = 1
    while period < most:
        yield period
        period += max(1, period // 3)
    yield most


class Samples:
    """The lower tertile of the last `most` samples, in seconds; of up to three, the least."""

    __slots__ = ("_last", "_sure", "settled", "typical")

    def __init__(self, most: int) -> None:
        self._last: deque[float] = deque(maxlen=most)
        self.typical = 0.0
        self._sure = False
        # Whether the two least samples agree, and at least one sample is not of a first period.
        self.settled = False

    @property
    def count(self) -> int:
        return len(self._last)

    def add(self, seconds: float, first: bool = False) -> None:
        self._sure = self._sure or not first
        if seconds >= 0.0:  # nan is not
            self._last.append(min(seconds, LONGEST_SECONDS))
            ranked = sorted(self._last)
            self.typical = ranked[(len(ranked) - 1) // 3]
            self.settled = self._sure and len(ranked) > 1 and ranked[1] <= AGREE * ranked[0]


class _VerifyCost:
    """Seconds of a verify pass as a function of its nodes N. `least`: the estimate for all N before
    anything was measured.
    """

    def __init__(self, least: float = 0.0) -> None:
        self._points: dict[int, Samples] = {}  # the latest last
        self._known: dict[float, float] = {}
        self._base, self._slope = least, 0.0

    def seconds(self, nodes: float) -> float:
        known = self._known.get(nodes)
        return self._base + self._slope * nodes if known is None else known

    def settled(self, nodes: int) -> bool:
        """Whether samples of this N agree."""
        return nodes in self._points and self._points[nodes].settled

    def add(self, nodes: int, seconds: float, first: bool) -> None:
        """Adds a pass of N nodes. `first`: whether its period was the first of its K and w."""
        point = self._points.pop(nodes, None) or Samples(VERIFY_SAMPLES)
        point.add(seconds, first)
        if not point.count:
            return
        if len(self._points) == VERIFY_POINTS:
            doubtful = [n for n, one in self._points.items() if not one.settled]
            del self._points[next(iter(doubtful or self._points))]
        self._points[nodes] = point
        self._fit()
        self._known = {
            float(n): one.typical if one.settled else min(one.typical, self._base + self._slope * n)
            for n, one in self._points.items()
        }

    def _fit(self) -> None:
        """Weighted medians of the slopes between points, then of the residuals."""
        settled = {n: one for n, one in self._points.items() if one.settled}
        points = [
            (float(n), one.typical, one.count if n > 1 else ONE_NODE)
            for n, one in (settled if len(settled) > 1 else self._points).items()
        ]
        slopes = [
            ((t - s) / (n - m), i * j * abs(n - m))
            for (m, s, i), (n, t, j) in combinations(points, 2)
        ]
        self._slope = max(0.0, _weighted_median(slopes))
        self._base = _weighted_median([(t - self._slope * n, i) for n, t, i in points])
        if self._base < 0.0:
            self._base = 0.0
            self._slope = _weighted_median([(t / max(n, 1.0), i) for n, t, i in points])


class _Width:
    """The model of a tree width: tables by K (index 0 is unused) and the cost of a step.

    `advance`: expected tokens that a row commits; `levels`: expected sparse steps; `step`: seconds
    of one step; `rate`: pooled probability that a level passes; `longest`: the longest K that ran.
    """

    def __init__(self, width: int, most_period: int) -> None:
        self.width = width
        self.longest = 0
        self.steps = Samples(SAMPLES)
        self._first_steps = Samples(SAMPLES)  # of the first period of each K
        self.step = 0.0
        self._seen, self._passed = [0.0] * most_period, [0.0] * most_period  # trials by level
        self._row, self._batch = _DraftsOn(), _DraftsOn()
        self._last = 0  # the period that was observed last
        self._prior = RATE
        self._tabulate()

    def assume(self, narrower: _Width | None) -> None:
        """Estimates the step time and the rate of a width with few or no periods from the next
        narrower width.
        """
        samples = [some.typical for some in (self.steps, self._first_steps) if some.count]
        if self.steps.count >= SURE_SAMPLES:
            samples = samples[:1]
        elif narrower is not None:
            samples.append(narrower.step * (self.width / narrower.width if samples else 1.0))
        self.step = min(samples, default=0.0)
        if narrower is not None and not self.longest:
            self._prior = 1.0 - (1.0 - narrower.rate) * narrower.width / self.width
            self._tabulate()

    def observe(self, observation: Observation, now: int, first: bool) -> None:
        """Adds a period with at least one level. `now`: its number; `first`: whether it is the
        first of its K.
        """
        period, levels, deepest = observation.period, observation.levels, len(self._seen) - 1
        self.longest = max(self.longest, period)
        steps = self._first_steps if first else self.steps
        steps.add(observation.draft_seconds / levels)
        fade = FORGET ** (now - self._last)
        if now > self._last + 1:
            fade = max(fade, min(FORGET, LEAST_TRIALS / max(sum(self._seen), 1.0)))
        self._last = now
        ends, refusals = [0] * (deepest + 1), [0] * (deepest + 1)  # by accepted levels
        for drafted, accepted in observation.rows:
            accepted = min(max(accepted, 0), deepest)
            ends[accepted] += 1
            refusals[accepted] += accepted < drafted
        through = 0
        for level in range(deepest, 0, -1):
            through += ends[level]
            self._passed[level] = self._passed[level] * fade + through
            self._seen[level] = self._seen[level] * fade + through + refusals[level - 1]
        drafts = [drafted for drafted, _ in observation.rows if drafted > 0]
        self._row.add(sum(drafts) - len(drafts), sum(d < period - 1 for d in drafts), fade)
        self._batch.add(levels - 1, int(levels < period - 1), fade)
        self._tabulate()

    def _tabulate(self) -> None:
        total = sum(self._seen) + RATE_TRIALS
        self.rate = pooled = (sum(self._passed) + RATE_TRIALS * self._prior) / total
        row_drafts_on, batch_drafts_on = self._row.rate, self._batch.rate
        near_seen, near_passed = NEAR_TRIALS, NEAR_TRIALS * pooled
        prior_seen, prior_passed = (1.0 - NEAR) * near_seen, (1.0 - NEAR) * near_passed
        commits = runs = 1.0  # probabilities that the level is committed, and that it is drafted
        advance, levels = [0.0, 1.0], [0.0, 0.0]
        for seen, passed in zip(self._seen[1:], self._passed[1:], strict=True):
            near = near_passed / near_seen
            commits *= (passed + LEVEL_TRIALS * near) / (seen + LEVEL_TRIALS)
            near_seen = NEAR * near_seen + seen + prior_seen
            near_passed = NEAR * near_passed + passed + prior_passed
            advance.append(advance[-1] + commits)
            levels.append(levels[-1] + runs)
            commits *= row_drafts_on
            runs *= batch_drafts_on
        self.advance, self.levels = advance, levels


class _DraftsOn:
    """The probability that a draft goes on after a level: 1 until a draft has stopped early."""

    __slots__ = ("_stopped", "_went_on")

    def __init__(self) -> None:
        self._went_on = self._stopped = 0.0

    def add(self, went_on: int, stopped: int, fade: float) -> None:
        self._went_on = self._went_on * fade + went_on
        self._stopped = self._stopped * fade + stopped

    @property
    def rate(self) -> float:
        went_on = self._went_on + STOP_TRIALS
        return went_on / (went_on + self._stopped)


def _weighted_median(pairs: list[tuple[float, float]]) -> float:
    """The lower weighted median of (value, weight) pairs; 0 if there are none."""
    pairs.sort()
    half, total = sum(weight for _, weight in pairs) / 2.0, 0.0
    for value, weight in pairs:
        total += weight
        if total >= half:
            return value
    return 0.0
