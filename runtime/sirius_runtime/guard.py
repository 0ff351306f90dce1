"""The guard of a default run: drafts while that pays, and decodes densely where it does not.

It chooses each period's length K, or a dense step, by expected tokens per second:

    tokens(K)   (1 - p^K) / (1 - p), p the chance that a level passes: the share of this answer's,
                faded so that a change of the text is followed. It begins with what the compiler
                measured on held-out text.
    seconds(K)  by `Costs`: what periods of this model took on this machine.

Drafting pays where some K brings more tokens a second than dense steps do. Where it does not pay,
dense steps follow, and after `HOLD` of them drafts are on trial: they are short until they saved
`EARN` dense steps. Each trial that fails is followed by `BACKOFF` times as many dense steps.

Pure Python without random numbers: the same observations give the same choices.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from sirius_runtime.decoder import Way
from sirius_runtime.stats import Fallback

# Simulated (tests/test_guard.py) for four machines, eight chances that a level passes: 200 tokens
# reach 97% of the dense speed on the mean, and 98% of the best fixed K's over all of them.
PRIOR = 0.85
"""The chance that a level passes, where the compiler measured none."""
PRIOR_TRIALS = 4.0
"""What the chance before anything was seen is worth in trials."""
FADE = 0.95
"""What a period's counts are worth one period later."""
PAYS = 1.02
"""How many times the tokens a second of dense steps drafting must promise."""
HOLD, BACKOFF, LONGEST_HOLD = 16, 4, 1024
"""Dense steps before drafting is tried again, their growth, and the most of them."""
RETRY, EARN = 3, 2.0
"""K of drafts on trial, and the dense steps that they have to save."""
SETTLE, LOOK = 2, 16
"""Periods after which two dense steps are timed, and periods after which one is again."""


class Costs:
    """What periods of a model take on this machine, in dense steps. A loaded model keeps one for
    each number of rows: what an answer showed is known to the next.

        steps(K) = 1 + fixed + (K - 1) level

    Both are fitted to the last `PERIODS` periods by least squares, weighted so that long periods
    are no noisier than short ones, around a prior: before anything was timed a level takes what it
    reads, and `VERIFIED` for its share of the verification. A clock may be disturbed, which only
    ever adds: what lies far above the line is taken for as much as `DISTURBED` deviations.
    """

    PERIODS, DENSE = 32, 7
    """How many of the last periods and dense steps count."""
    FIXED, FIXED_DEVIATION = 0.1, 0.05
    VERIFIED, LEVEL_DEVIATION = 0.1, 0.4
    NOISE, DISTURBED = 0.05, 2.0
    """Of a period's time, relative; and the deviations beyond which it is taken for disturbed."""

    def __init__(self, density: float) -> None:
        """density: of the sparse path, the share that a step reads."""
        self.density = density
        self.periods = 0  # that were seen
        self.looked = 0  # of them, before the last dense step
        self._dense: deque[float] = deque(maxlen=self.DENSE)
        self._periods: deque[tuple[int, float]] = deque(maxlen=self.PERIODS)
        self._line: tuple[float, float] | None = None

    def dense(self, seconds: float) -> None:
        """A dense step took so long."""
        self._dense.append(seconds)
        self._line, self.looked = None, self.periods

    def period(self, levels: int, seconds: float) -> None:
        """A period of so many sparse steps took so long."""
        self.periods += 1
        if self.periods > 1:  # the first one waits for weights that come from a file
            self._periods.append((levels, seconds))
            self._line = None

    @property
    def looks(self) -> bool:
        """Whether a dense step should be timed."""
        if len(self._dense) < 2:
            return self.periods >= SETTLE
        return self.periods - self.looked >= LOOK

    def in_steps(self, seconds: float) -> float | None:
        """Dense steps that take as long; None before one was timed."""
        return seconds / statistics.median(self._dense) if self._dense else None

    def steps(self, period: int) -> float:
        """Dense steps that take as long as a period of K; no fewer than it reads."""
        if self._line is None:
            self._line = self._fit()
        fixed, level = self._line
        return 1 + max(fixed + (period - 1) * level, (period - 1) * self.density)

    def _fit(self) -> tuple[float, float]:
        """The line's `fixed` and `level`."""
        prior = (self.FIXED, self.density + self.VERIFIED)
        line = prior
        if not self._dense:
            return line
        step = statistics.median(self._dense)
        for _ in range(3):  # what is disturbed depends on the line
            a, b, c = self.FIXED_DEVIATION**-2, 0.0, self.LEVEL_DEVIATION**-2
            d, e = a * prior[0], c * prior[1]
            for levels, seconds in self._periods:
                guess = 1 + line[0] + levels * line[1]
                most = guess * (1 + self.DISTURBED * self.NOISE)
                over = min(seconds / step, most) - 1
                weight = (self.NOISE * max(guess, 1.0)) ** -2
                a, b, c = a + weight, b + weight * levels, c + weight * levels**2
                d, e = d + weight * over, e + weight * levels * over
            det = a * c - b * b
            line = (c * d - b * e) / det, (a * e - b * d) / det
        return line


class Guard:
    """Chooses how one generation goes on; tell it how it went."""

    def __init__(self, period: int, costs: Costs, passes: float | None = None) -> None:
        """period: the longest K; costs: of the model, which this generation adds to (others may
        take their place, where the number of rows changes). passes: the chance that a drafted level
        passes, as measured before; None where it was not.
        """
        self._longest, self.costs = period, costs
        self._passed = (PRIOR if passes is None else passes) * PRIOR_TRIALS
        self._trials = PRIOR_TRIALS
        self._hold, self._left = HOLD, 0  # dense steps of the next fallback, and left of this one
        self._owed: float | None = None  # dense steps that drafts on trial have yet to save
        self._advance = self._cost = 0.0  # of drafts that did not pay, and how many
        self._failed = 0
        self._fell_back = 0

    def choose(self) -> tuple[Way, int]:
        """How to go on, and the period's K."""
        if self._longest == 1 or self._left > 0 or self.costs.looks:
            return Way.DENSE, 1
        if self._owed is not None:
            return Way.DRAFT, min(RETRY, self._longest)
        return Way.DRAFT, self._best[0]

    @property
    def reason(self) -> str:
        """Why the dense step that is due is one."""
        if self._longest == 1:
            return "the period is 1: there is no draft"
        if self._left == 0:
            return "a dense step is timed, to know what drafts have to beat"
        return (
            f"drafts did not pay ({self._advance / self._failed:.1f} tokens in the time of "
            f"{self._cost / self._failed:.1f} dense steps): another is tried in {self._left} steps"
        )

    def observe(
        self, way: Way, period: int, levels: int, rows: Sequence[tuple[int, int]], seconds: float
    ) -> None:
        """Learns from a period or step that ran `levels` sparse steps; `rows`: (drafted, accepted)
        levels of each live row.
        """
        if way is Way.DENSE:
            self.costs.dense(seconds)
            if self._left > 0:
                self._left -= 1
                self._fell_back += len(rows)
                self._owed = EARN if self._left == 0 else None
            return
        if period == 1:  # the last token of all rows
            return
        self.costs.period(levels, seconds)
        accepted = sum(passed for _, passed in rows) / max(len(rows), 1)
        refused = sum(passed < drafted for drafted, passed in rows) / max(len(rows), 1)
        # What a trial's first draft shows outweighs what was refused before.
        fade = min(FADE, 1.0 / self._trials) if self._owed == EARN else FADE
        self._passed = self._passed * fade + accepted
        self._trials = self._trials * fade + accepted + refused
        begun = self._owed != EARN
        if self._owed is not None:
            self._owed -= accepted + 1 - self.costs.steps(levels + 1)
            if self._owed <= 0:
                self._owed, self._hold = None, HOLD
        if self._best[1] >= PAYS and (begun or refused == 0):
            return
        self._failed += 1
        self._advance += accepted + 1
        self._cost += self.costs.in_steps(seconds) or levels * self.costs.density + 1
        self._left = self._hold
        self._hold = min(BACKOFF * self._hold, LONGEST_HOLD)
        self._owed = None

    @property
    def fallback(self) -> Fallback | None:
        """What was decoded densely; None where nothing was."""
        if not self._fell_back:
            return None
        return Fallback(self._fell_back, self._advance / self._failed, self._cost / self._failed)

    @property
    def _best(self) -> tuple[int, float]:
        """The K of most tokens a second, and how many times those of dense steps that is."""
        best, most = min(2, self._longest), 0.0
        p = min(self._passed / self._trials, 0.999)
        for period in range(2, self._longest + 1):
            gain = (1 - p**period) / (1 - p) / self.costs.steps(period)
            if gain > most:
                best, most = period, gain
        return best, most
