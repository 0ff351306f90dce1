"""The decoder: a batch's state, and the strategies that run a period over it.

`Generation` keeps rows, finish reasons, streamers and statistics in plain Python numbers: no tensor
passes between it and a `Decoder`. A `Strategy` runs one period: entry by entry (`by_entries`), as
one graph (`one_graph`), replayed from a recording (`recorded`), or as one step of one path
(`Steps`). It returns an `Outcome`. All strategies share the state, so any may follow any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sirius_runtime.entries import FULL, OBSERVE, SPARSE
from sirius_runtime.plan import Limits, Plan
from sirius_runtime.prefix import Prefix
from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.state import State
from sirius_runtime.stats import Phase, PhaseClock

if TYPE_CHECKING:
    from sirius_runtime.logits_options import TokenLogprobs
    from sirius_runtime.policy import Draft, Verdict
    from sirius_runtime.request import Request
    from sirius_runtime.scorer import Scorer


class Way(StrEnum):
    """How the next tokens are decoded."""

    DRAFT = "draft"
    """A period: the sparse path drafts, the full path verifies."""
    DENSE = "dense"
    """A step of the full path."""
    SPARSE = "sparse"
    """A step of the sparse path that is never verified."""


@dataclass(frozen=True)
class Evidence:
    """What a period's result follows from, for traces: the draft, the full path's logits after each
    node [B, N, V], and the verdict. A step has only logits, [B, 1, V], before any processing.
    """

    draft: Draft | None
    logits: Any
    verdict: Verdict | None


@dataclass(frozen=True)
class Outcome:
    """The result of a period, in arrays of the state's kind.

    packed [B, K + 2] int64: K tokens, of which the first `advance` are committed; `advance`; and
    the number of levels drafted for the row. It is one array so that the host reads it in one copy.
    levels: sparse steps that ran; drafts that were looked up take none. full_passes: forward passes
    of the full path.
    """

    packed: Any
    levels: int
    full_passes: int = 1
    evidence: Evidence | None = None


@dataclass(frozen=True)
class RowPeriod:
    """A period's result for one row: the committed tokens, and the levels drafted for it."""

    tokens: list[int]
    drafted: int


@dataclass(frozen=True)
class Period:
    """A period's result: for each row, and the passes that ran (as in `Outcome`)."""

    rows: list[RowPeriod]
    levels: int
    full_passes: int
    evidence: Evidence | None


Choose = Callable[[Any, Any, Any], Any]
"""Chooses each row's next token [B] from its logits [B, V], the number of tokens before it [B], and
a uniform random number [B]. Without that (None), it chooses the likeliest token.
"""


class Strategy(Protocol):
    """Runs a period over a state, and commits its tokens to the state."""

    def period(self, state: Any, plan: Plan, most_B: Any, clock: PhaseClock) -> Outcome:
        """Row i commits 1 to `most_B[i]` tokens. Times are added to the clock's phases."""
        ...


@dataclass(frozen=True)
class Steps:
    """A step of one path over the root alone, as a period of one token without a draft."""

    way: Way
    choose: Choose

    def period(self, state: State, plan: Plan, most_B: Any, clock: PhaseClock) -> Outcome:
        dense, xp = self.way is Way.DENSE, state.xp
        entry = SPARSE if not dense else OBSERVE if plan.observes else FULL
        with clock(Phase.VERIFY if dense else Phase.DRAFT):
            result = state.step(entry)
        token = self.choose(result["logits"][:, 0], state.length + 1, plan.first_number)
        state.commit(1, token)
        if plan.observes:
            state.observe(result["activity"][:, :, 0])
        if plan.refreshes:
            state.choose_neurons()
        one = xp.ones_like(token)
        packed = xp.stack([state.root, one, one - 1], 1)
        evidence = Evidence(None, result["logits"], None)
        return Outcome(packed, int(not dense), int(dense), evidence)


def steps(choose: Choose) -> dict[Way, Strategy]:
    """The strategies that every back end has: single steps of either path."""
    return {way: Steps(way, choose) for way in (Way.DENSE, Way.SPARSE)}


class Backend(Protocol):
    """A loaded program: runs its entries, and opens decoders.

    Arrays are PyTorch's or NumPy's. With PyTorch, an entry writes to the caches among its inputs in
    place.
    """

    program: ProgramSpec
    dtype: Any
    explains: bool
    """Whether its periods return their `Evidence`."""
    looks_up: bool
    """Whether its periods accept drafts that were looked up."""

    @property
    def stream_seconds(self) -> float:
        """Seconds in which a pass of the full path streams weights from a slow tier; 0 where fast
        memory holds all weights.
        """
        ...

    @property
    def limits(self) -> Limits | None:
        """The limits of a period graph, where periods run as one graph; else None."""
        ...

    @property
    def device(self) -> Any: ...

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        ...

    @property
    def threads(self) -> int:
        """The most threads of one operator on the CPU."""
        ...

    def run(self, entry: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `entry` on its named inputs and returns its named outputs."""
        ...

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        """A decoder with room for `rows` sequences of `tokens` tokens each, prompt and answer."""
        ...


class Decoder:
    """A batch of sequences in progress, and the strategies that continue it."""

    def __init__(
        self,
        state: State,
        ways: Mapping[Way, Strategy],
        choose: Choose,
        clock: PhaseClock,
        *,
        refresh: int = 0,
        rows: int | None = None,
        resizable: bool = True,
        scorer: Scorer | None = None,
    ) -> None:
        """refresh: number of periods after which `griffin` selects its neurons again, from the
        prompt and the tokens verified so far; 0: never. rows: the number of rows that graphs were
        compiled for; the batch is filled up with inactive rows. resizable: whether `select` can
        drop rows.
        """
        self.state, self.resizable = state, resizable
        self.ways = dict(ways)
        """The strategies, by the way that they decode."""
        self._choose, self._clock = choose, clock
        self._refresh, self._periods = refresh, 0
        self._rows, self._scorer = rows, scorer

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        noise: np.ndarray | None,
        prefix: Prefix | None = None,
    ) -> list[int]:
        """Runs the prompts through the full path, without their `prefix`, whose K/V is given.
        Returns the first token of each row; it is drawn if there is noise [rows, 1, 1].
        """
        state = self.state
        with state.computing():
            if self._scorer is not None:
                self._scorer.begin(prompts)
            logits, self.prefill_passes = state.prefill(prompts, prefix)
            # One choice after all chunks: a choice per chunk would use up random numbers of a row
            # whose neighbour has a longer prompt.
            number = None if noise is None else state.array(noise)[:, 0, 0]
            state.root = self._choose(logits, state.length, number)
            state.choose_neurons()
            first: list[int] = state.root.tolist()
            if self._rows is not None:
                state.fill(self._rows)
            return first

    def period(
        self,
        way: Way,
        plan: Plan,
        sizes: Sequence[int],
        noise: np.ndarray | None,
        given: Sequence[Sequence[int]] = (),
    ) -> Period:
        """Runs one period (or step) for all rows; row i commits at most `sizes[i]` tokens.

        noise [rows, 2, K] float64: uniform random numbers, where tokens are drawn; a step uses the
        first one only. given: each row's looked-up chain; empty where the sparse path drafts.
        """
        state, rows = self.state, len(sizes)
        self._periods += 1
        due = self._refresh > 0 and self._periods % self._refresh == 0
        with state.computing():
            if noise is not None:
                noise = state.array(self._filled(noise, 0))
            if any(given):
                plan = replace(plan, given=state.array(self._filled(padded(given), NO_TOKEN)))
            plan = replace(plan, noise=noise, observes=self._refresh > 0, refreshes=due)
            most = state.array(self._filled(np.array(sizes), 1))
            outcome = self.ways[way].period(state, plan, most, self._clock)
            read = outcome.packed[:rows].tolist()  # the one read of device values in a period
        return Period(
            [RowPeriod(tokens[:advance], drafted) for *tokens, advance, drafted in read],
            outcome.levels,
            outcome.full_passes,
            outcome.evidence,
        )

    def logprobs(self) -> list[list[TokenLogprobs]]:
        """The log-probabilities of each row's tokens that the last call committed. Only for
        requests that ask for them.
        """
        assert self._scorer is not None
        return self._scorer.logprobs()

    def set_active(self, active: Sequence[bool]) -> None:
        """Sets which rows continue; the others do not change."""
        state = self.state
        with state.computing():
            state.active = state.array(self._filled(np.array(active), False))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows with their state, and drops the others."""
        with self.state.computing():
            self.state.select(rows)
            if self._scorer is not None:
                self._scorer.select(rows)

    def density(self) -> float:
        """The mean bytes that a sparse step has read so far, as a share of the full path's."""
        return self.state.density()

    def array(self, tokens: Sequence[Any]) -> Any:
        """Tokens as an array of the back end's kind, for streamers."""
        return self.state.xp.asarray(tokens)

    def _filled(self, values: np.ndarray, value: float) -> np.ndarray:
        """`values` [rows, ...], with `value` for the rows that fill the batch up."""
        spare = self.state.rows - len(values)
        if not spare:
            return values
        more = np.full((spare, *values.shape[1:]), value, values.dtype)
        return np.concatenate([values, more])


def padded(given: Sequence[Sequence[int]]) -> np.ndarray:
    """The looked-up chains as an array [rows, longest] int64 for `Plan.given`; shorter ones end in
    `NO_TOKEN`.
    """
    array = np.full((len(given), max(map(len, given))), NO_TOKEN, np.int64)
    for row, tokens in enumerate(given):
        array[row, : len(tokens)] = tokens
    return array
