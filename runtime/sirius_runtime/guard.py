"""The guard of a default run: it drafts while drafting is faster than dense decoding, else decodes
densely.

It chooses each period's length K, or a dense step, by expected tokens per second:

    tokens(K)   (1 - p^K) / (1 - p), where p is the probability that a level passes: the share of
                this answer's levels that passed, decayed so that a change of the text is followed.
                Its first value is the rate that the compiler measured on held-out text.
    seconds(K)  from `Costs`: the time that periods of this model took on this machine.

Drafting pays where some K gives more tokens per second than dense steps. Where it does not pay,
`HOLD` dense steps follow. Then drafts are on trial: they are short until they have saved `EARN`
dense steps. After each failed trial, `BACKOFF` times as many dense steps follow.

Pure Python without random numbers: the same observations give the same choices.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from sirius_runtime.decoder import Way
from sirius_runtime.stats import Fallback

# Simulated (tests/test_guard.py) for four machines and eight probabilities that a level passes,
# over 200 tokens: the mean speed of each case is at least 97% of the dense speed, and the mean over
# all cases is 98% of the speed of the best fixed K.
PRIOR = 0.85
"""The probability that a level passes, where the compiler measured none."""
PRIOR_TRIALS = 4.0
"""Weight of the first value of that probability, in trials."""
FADE = 0.95
"""The factor by which counts decay each period."""
PAYS = 1.02
"""Drafting pays if it promises this many times the tokens per second of dense steps."""
HOLD, BACKOFF, LONGEST_HOLD = 16, 4, 1024
"""Dense steps before drafting is tried again; the factor of their growth; and the most of them."""
RETRY, EARN = 3, 2.0
"""K of drafts on trial; and the dense steps that they have to save."""
SETTLE, LOOK = 2, 16
"""Periods before the first two dense steps are timed; and periods between later timed steps."""


class Costs:
    """The time of a model's periods on this machine, in units of a dense step. A loaded model keeps
    one for each number of rows, so that later answers use the measurements of earlier ones.

        steps(K) = 1 + fixed + (K - 1) level

    `fixed` and `level` are fitted to the last `PERIODS` periods by least squares with a prior. The
    noise is taken to be proportional to a period's time, and is weighted accordingly. The prior of
    `level` is the density (the share of bytes that a sparse step reads) plus `VERIFIED`, for its
    share of the verification. Disturbances only ever add time, so a time far above the line is
    lowered to `DISTURBED` deviations above it.
    """

    PERIODS, DENSE = 32, 7
    """The number of last periods and of last dense steps that are used."""
    FIXED, FIXED_DEVIATION = 0.1, 0.05
    VERIFIED, LEVEL_DEVIATION = 0.1, 0.4
    NOISE, DISTURBED = 0.05, 2.0
    """Relative deviation of a period's time; and the deviations above the line to which a time is
    lowered.
    """

    def __init__(self, density: float) -> None:
        """density: the sparse path's, i.e. the share of the weights' bytes that its step reads."""
        self.density = density
        self.periods = 0  # number of periods so far
        self.looked = 0  # value of `periods` at the last dense step
        self._dense: deque[float] = deque(maxlen=self.DENSE)
        self._periods: deque[tuple[int, float]] = deque(maxlen=self.PERIODS)
        self._line: tuple[float, float] | None = None

    def dense(self, seconds: float) -> None:
        """Adds the time of a dense step."""
        self._dense.append(seconds)
        self._line, self.looked = None, self.periods

    def period(self, levels: int, seconds: float) -> None:
        """Adds the time of a period with `levels` sparse steps."""
        self.periods += 1
        if self.periods > 1:  # the first one may wait for weights to be read from the file
            self._periods.append((levels, seconds))
            self._line = None

    @property
    def looks(self) -> bool:
        """Whether a dense step should be timed."""
        if len(self._dense) < 2:
            return self.periods >= SETTLE
        return self.periods - self.looked >= LOOK

    def in_steps(self, seconds: float) -> float | None:
        """`seconds` in units of a dense step; None before one was timed."""
        return seconds / statistics.median(self._dense) if self._dense else None

    def steps(self, period: int) -> float:
        """The time of a period of K tokens in units of a dense step; at least in proportion to the
        bytes that it reads.
        """
        if self._line is None:
            self._line = self._fit()
        fixed, level = self._line
        return 1 + max(fixed + (period - 1) * level, (period - 1) * self.density)

    def _fit(self) -> tuple[float, float]:
        """`fixed` and `level`."""
        prior = (self.FIXED, self.density + self.VERIFIED)
        line = prior
        if not self._dense:
            return line
        step = statistics.median(self._dense)
        for _ in range(3):  # iterates, because which times are lowered depends on the line
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
    """Chooses each next period or dense step of one generation; `observe` must follow each."""

    def __init__(self, period: int, costs: Costs, passes: float | None = None) -> None:
        """period: the longest K. costs: the model's, which this generation adds to; the attribute
        may be replaced where the number of rows changes. passes: the probability that a drafted
        level passes, as the compiler measured it; None where it did not.
        """
        self._longest, self.costs = period, costs
        self._passed = (PRIOR if passes is None else passes) * PRIOR_TRIALS
        self._trials = PRIOR_TRIALS
        self._hold, self._left = HOLD, 0  # dense steps of the next fallback, and left of this one
        self._owed: float | None = None  # dense steps that drafts on trial have yet to save
        # Sums over the drafts that did not pay: tokens, and time in dense steps; and their number.
        self._advance = self._cost = 0.0
        self._failed = 0
        self._fell_back = 0  # tokens decoded densely

    def choose(self) -> tuple[Way, int]:
        """What runs next, and the period's K (1 for a dense step)."""
        if self._longest == 1 or self._left > 0 or self.costs.looks:
            return Way.DENSE, 1
        if self._owed is not None:
            return Way.DRAFT, min(RETRY, self._longest)
        return Way.DRAFT, self._best[0]

    @property
    def reason(self) -> str:
        """Why the next step is a dense one."""
        if self._longest == 1:
            return "the period is 1: there is no draft"
        if self._left == 0:
            return "a dense step is timed, for comparison with drafts"
        return (
            f"drafts did not pay ({self._advance / self._failed:.1f} tokens in the time of "
            f"{self._cost / self._failed:.1f} dense steps): a draft is tried again in "
            f"{self._left} steps"
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
        # The first draft of a trial outweighs all earlier counts.
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
        """Statistics of the dense steps that replaced drafts; None where there were none."""
        if not self._fell_back:
            return None
        return Fallback(self._fell_back, self._advance / self._failed, self._cost / self._failed)

    @property
    def _best(self) -> tuple[int, float]:
        """The K with the most tokens per second, and its speed relative to dense steps."""
        best, most = min(2, self._longest), 0.0
        p = min(self._passed / self._trials, 0.999)
        for period in range(2, self._longest + 1):
            gain = (1 - p**period) / (1 - p) / self.costs.steps(period)
            if gain > most:
                best, most = period, gain
        return best, most
