"""What decodes: a batch's state, and the strategies that run a period over it.

`Generation` keeps rows, ends, streams and statistics, in plain numbers: no tensor crosses the seam
to a `Decoder`. A `Strategy` runs one period: by the entries (`by_entries`), as one graph
(`one_graph`), replayed from a recording (`recorded`), or one step of one path (`Steps`). It returns
what the period did; strategies share the state, so that one may follow another.
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
    """How the next tokens are made."""

    DRAFT = "draft"
    """A period: the sparse path drafts, the full path verifies."""
    DENSE = "dense"
    """A step of the full path."""
    SPARSE = "sparse"
    """A step of the sparse path that is never verified."""


@dataclass(frozen=True)
class Evidence:
    """Why a period did what it did: its draft, the full path's logits after each node [B, N, V],
    and what was made of them. A step has logits alone, [B, 1, V], before any processing.
    """

    draft: Draft | None
    logits: Any
    verdict: Verdict | None


@dataclass(frozen=True)
class Outcome:
    """What a period did, in the state's own arrays.

    packed [B, K + 2] int64: K tokens, of which the first `advance` are committed, `advance`, and
    the drafted levels that count for the row; the host reads it at once. levels, full_passes: the
    sparse steps and the full forwards that ran; what was looked up took no step.
    """

    packed: Any
    levels: int
    full_passes: int = 1
    evidence: Evidence | None = None


@dataclass(frozen=True)
class RowPeriod:
    """What a period did to one row: the tokens it committed, and the levels drafted for it."""

    tokens: list[int]
    drafted: int


@dataclass(frozen=True)
class Period:
    """What a period did: to each row, and what it cost."""

    rows: list[RowPeriod]
    levels: int
    full_passes: int
    evidence: Evidence | None


Choose = Callable[[Any, Any, Any], Any]
"""Chooses each row's next token [B]: by its logits [B, V], the number [B] of tokens before it, and
a uniform number [B] where it is drawn (else None: the likeliest).
"""


class Strategy(Protocol):
    """Runs a period over a state, and moves it on."""

    def period(self, state: Any, plan: Plan, most_B: Any, clock: PhaseClock) -> Outcome:
        """Row i commits at most `most_B[i]` tokens, at least 1. Times go to the clock's phases."""
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
    """The strategies that every back end has."""
    return {way: Steps(way, choose) for way in (Way.DENSE, Way.SPARSE)}


class Backend(Protocol):
    """A loaded program: runs its entries, and opens what decodes by them.

    Its arrays are PyTorch's or NumPy's; caches among PyTorch's inputs are written in place.
    """

    program: ProgramSpec
    dtype: Any
    explains: bool
    """Whether its periods bring their evidence."""
    looks_up: bool
    """Whether its periods take drafts that were looked up."""

    @property
    def stream_seconds(self) -> float:
        """Of a full pass, the seconds that it reads weights which no fast memory holds; 0: none."""
        ...

    @property
    def limits(self) -> Limits | None:
        """What whole periods can take, where they run as one graph."""
        ...

    @property
    def device(self) -> Any: ...

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        ...

    @property
    def threads(self) -> int:
        """Threads of one operator on the CPU, at the most."""
        ...

    def run(self, entry: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `entry` on its named inputs and returns its named outputs."""
        ...

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        """A decoder with room for rows of `tokens`, prompt and answer."""
        ...


class Decoder:
    """A batch of sequences in progress, and the ways to go on with it."""

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
        """refresh: periods after which `griffin` selects its neurons again, from the prompt and the
        tokens verified so far; 0: never. rows: the number that graphs were compiled for; the batch
        is filled up with inactive rows. resizable: whether `select` can leave rows out.
        """
        self.state, self.resizable = state, resizable
        self._ways, self._choose, self._clock = ways, choose, clock
        self._refresh, self._periods = refresh, 0
        self._rows, self._scorer = rows, scorer

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        noise: np.ndarray | None,
        prefix: Prefix | None = None,
    ) -> list[int]:
        """Runs the prompts densely, but for their `prefix`; returns the first token of each row,
        drawn by noise [rows, 1, 1] where it is given.
        """
        state = self.state
        with state.computing():
            if self._scorer is not None:
                self._scorer.begin(prompts)
            logits, self.prefill_passes = state.prefill(prompts, prefix)
            # Once: with a choice a chunk, a longer neighbour would use up a row's random numbers.
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
        """Goes on with every row; row i commits at most `sizes[i]` tokens.

        noise [rows, 2, K] float64: where tokens are drawn; of a step its first number alone. given:
        of each row the chain that was looked up; none for rows whose draft the sparse path makes.
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
            outcome = self._ways[way].period(state, plan, most, self._clock)
            read = outcome.packed[:rows].tolist()  # the one read of device values in a period
        return Period(
            [RowPeriod(tokens[:advance], drafted) for *tokens, advance, drafted in read],
            outcome.levels,
            outcome.full_passes,
            outcome.evidence,
        )

    def logprobs(self) -> list[list[TokenLogprobs]]:
        """Of each row's tokens that the last call committed, where the request asks for them."""
        assert self._scorer is not None
        return self._scorer.logprobs()

    def set_active(self, active: Sequence[bool]) -> None:
        """Says which rows go on; the others stay as they are."""
        state = self.state
        with state.computing():
            state.active = state.array(self._filled(np.array(active), False))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows and leaves the others out, with their state."""
        with self.state.computing():
            self.state.select(rows)
            if self._scorer is not None:
                self._scorer.select(rows)

    def density(self) -> float:
        """Share of the full path's bytes that a sparse step read so far."""
        return self.state.density()

    def array(self, tokens: Sequence[Any]) -> Any:
        """Tokens as the back end's own kind of array, for streamers."""
        return self.state.xp.asarray(tokens)

    def _filled(self, values: np.ndarray, value: float) -> np.ndarray:
        """`values` [rows, ...] with those of the rows that fill the batch up."""
        spare = self.state.rows - len(values)
        if not spare:
            return values
        more = np.full((spare, *values.shape[1:]), value, values.dtype)
        return np.concatenate([values, more])


def padded(given: Sequence[Sequence[int]]) -> np.ndarray:
    """The chains that were looked up, as `Plan.given` [rows, longest] int64."""
    array = np.full((len(given), max(map(len, given))), NO_TOKEN, np.int64)
    for row, tokens in enumerate(given):
        array[row, : len(tokens)] = tokens
    return array
