"""The guard of a default run: drafts while that pays, and decodes densely where it does not.

It chooses each period's length K, or a dense step, by what this generation showed: the share of
drafted levels that pass, faded so that a change of the text is followed, and the seconds of periods
and of dense steps as the host saw them, which every back end has.

    tokens(K)   (1 - p^K) / (1 - p), p the chance that a level passes
    seconds(K)  measured where K ran, else a dense step's and those of K - 1 levels, as measured

Drafting pays where some K brings more tokens a second than dense steps do. Until dense steps were
timed, seconds are reads: a level takes `density` of a dense step, and no sparse path is faster.
Where drafting does not pay, dense steps follow, and after `HOLD` of them one short draft, and
then after `BACKOFF` times as many each time that it fails. Seconds are low quantiles of the last
few, since what disturbs a clock only ever adds.

Pure Python without random numbers: the same observations give the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence

from sirius_runtime.controller import Samples
from sirius_runtime.decoder import Way
from sirius_runtime.stats import Fallback

# Simulated (tests/test_guard.py) for four machines, eight chances that a level passes: 200 tokens
# reach 97% of the dense speed on the mean, and 98% of the best fixed K's over all of them.
PRIOR, PRIOR_TRIALS = 0.85, 3.0
"""The chance that a level passes, before anything was seen, and what that is worth in trials."""
FADE = 0.95
"""What a period's counts are worth one period later."""
PAYS = 1.02
"""How many times the tokens a second of dense steps drafting must promise."""
HOLD, BACKOFF, LONGEST_HOLD = 16, 4, 1024
"""Dense steps before drafting is tried again, their growth, and the most of them."""
RETRY = 3
"""K of a draft that tries again."""
SURE = 5
"""Timed periods before seconds alone say that drafting does not pay: a clock may be disturbed."""
HOPED = 1.2
"""What drafting must promise by its reads, for seconds to be doubted."""
SETTLE, LOOK = 2, 64
"""Periods after which two dense steps are timed, and periods after which one is again."""
SAMPLES = 9
AGES = 0.01
"""What a K's seconds lose each period that it is not run: else a K that was timed in a bad moment
would never be tried again. Only where drafting promises HOPED.
"""


class Guard:
    """Chooses how one generation goes on; tell it how it went."""

    def __init__(self, period: int, density: float) -> None:
        """period: the longest K; density: of the sparse path, the share that a step reads."""
        self._longest, self._density = period, density
        self._passed, self._trials = PRIOR * PRIOR_TRIALS, PRIOR_TRIALS
        self._dense = Samples(SAMPLES)
        self._seconds: dict[int, Samples] = {}
        self._ran: dict[int, int] = {}  # of each K, the period that ran it last
        self._hold, self._left = HOLD, 0  # dense steps of the next fallback, and left of this one
        self._retrying = False
        self._periods = self._timed = 0  # periods, and those of them before the last dense step
        self._advance = self._cost = 0.0  # of drafts that did not pay, and how many
        self._failed = 0
        self._fell_back = 0

    def choose(self) -> tuple[Way, int]:
        """How to go on, and the period's K."""
        if self._longest == 1 or self._left > 0 or self._looks:
            return Way.DENSE, 1
        return Way.DRAFT, min(RETRY, self._longest) if self._retrying else self._best[0]

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
            self._dense.add(seconds)
            self._timed = self._periods
            if self._left > 0:
                self._left -= 1
                self._fell_back += len(rows)
                self._retrying = self._left == 0
            return
        if period == 1:  # the last token of all rows
            return
        self._periods += 1
        if self._periods > 1:  # the first one waits for weights that come from a file
            self._seconds.setdefault(period, Samples(SAMPLES)).add(seconds)
            self._ran[period] = self._periods
        accepted = sum(passed for _, passed in rows) / max(len(rows), 1)
        refused = sum(passed < drafted for drafted, passed in rows) / max(len(rows), 1)
        # What a retry shows outweighs what was refused before.
        fade = min(FADE, 1.0 / self._trials) if self._retrying else FADE
        self._passed = self._passed * fade + accepted
        self._trials = self._trials * fade + accepted + refused
        whole = refused == 0
        _, gain = self._best
        if gain >= PAYS and (whole or not self._retrying):
            if not self._retrying:
                self._hold = HOLD
            self._retrying = False
            return
        if not self._retrying and self._unsure:
            return
        self._failed += 1
        self._advance += accepted + 1
        dense = self._dense.typical
        self._cost += seconds / dense if dense else levels * self._density + 1
        self._left = self._hold
        self._hold = min(BACKOFF * self._hold, LONGEST_HOLD)
        self._retrying = False

    @property
    def fallback(self) -> Fallback | None:
        """What was decoded densely; None where nothing was."""
        if not self._fell_back:
            return None
        return Fallback(self._fell_back, self._advance / self._failed, self._cost / self._failed)

    @property
    def _looks(self) -> bool:
        """Whether a dense step is due, to be timed."""
        if self._dense.count < 2:
            return self._periods >= SETTLE
        return self._periods - self._timed >= LOOK

    @property
    def _best(self) -> tuple[int, float]:
        """The K of most tokens a second, and how many times those of dense steps that is."""
        best, most = min(2, self._longest), 0.0
        for period in range(2, self._longest + 1):
            gain = self._tokens(period) / self._dense_steps(period)
            if gain > most:
                best, most = period, gain
        return best, most

    @property
    def _unsure(self) -> bool:
        """Whether few periods were timed, and by what they read drafts would pay well."""
        timed = sum(samples.count for samples in self._seconds.values())
        return timed < SURE and self._hoped >= HOPED

    @property
    def _hoped(self) -> float:
        """How many times the speed of dense steps the best K has if it takes what it reads."""
        periods = range(2, self._longest + 1)
        return max(self._tokens(k) / (1 + (k - 1) * self._density) for k in periods)

    def _tokens(self, period: int) -> float:
        """What a period of K is expected to bring."""
        p = min(self._passed / self._trials, 0.999)
        return (1 - p**period) / (1 - p)

    def _dense_steps(self, period: int) -> float:
        """Dense steps that take as long as a period of K; no fewer than it reads."""
        known = self._seconds.get(period)
        if known is not None and known.count > 1 and self._dense.typical:
            return max(self._timed_steps(period), 1 + (period - 1) * self._density)
        level = self._density
        if self._dense.typical and self._seconds:
            levels = sorted((self._timed_steps(k) - 1) / (k - 1) for k in self._seconds)
            level = levels[len(levels) // 2]
        return 1 + (period - 1) * max(level, self._density)

    def _timed_steps(self, period: int) -> float:
        """Of a K that was timed, as dense steps were."""
        age = self._periods - self._ran[period] if self._hoped >= HOPED else 0
        return self._seconds[period].typical / self._dense.typical * (1 - AGES) ** age
