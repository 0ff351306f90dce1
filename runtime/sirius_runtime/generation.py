"""One `generate` call: the loop over periods or steps, and its bookkeeping on the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from sirius_runtime.controller import Controller, Observation
from sirius_runtime.decoder import Backend, Period, Way
from sirius_runtime.errors import GenerationError
from sirius_runtime.guard import Costs, Guard
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.lookup import Lookup
from sirius_runtime.prefix import Prefix
from sirius_runtime.request import MAX_PERIOD, FinishReason, Mode, Request
from sirius_runtime.rules import RULES
from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.sizes import node_count
from sirius_runtime.spec import AcceptanceSpec
from sirius_runtime.state import State
from sirius_runtime.stats import GenerationStats, Phase, PhaseClock, RowSteps, StatsRecorder
from sirius_runtime.text import StopScanner
from sirius_runtime.trace import Trace, Tracer, Tracing


class Streamer(Protocol):
    """transformers' streamer interface: `put` gets the prompt [1, T], then committed tokens [n];
    `end` is called last.
    """

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


class Row:
    """One sequence on the host: its committed tokens, and its finish reason."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        request: Request,
        seed: int | None,
    ) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason: FinishReason | None = None
        self._request = request
        self._scanner = None
        if tokenizer is not None and request.stop:
            self._scanner = StopScanner(tokenizer, request.stop, prompt)
        self._random = None if seed is None else np.random.default_rng(seed)
        self._lookup = Lookup(request.lookup, prompt) if request.lookup else None

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Appends committed tokens up to the row's end; returns those that were appended."""
        taken: list[int] = []
        for token in tokens:
            if self.reason is not None:
                break
            if token == NO_TOKEN:
                raise GenerationError(_no_token(self._request, len(self.tokens) + len(taken)))
            taken.append(token)
            if token in self._request.eos:
                self.reason = FinishReason.EOS
            elif self._scanner is not None and self._scanner.stops_at(token):
                self.reason = FinishReason.STOP
            elif len(self.tokens) + len(taken) == self._request.max_new_tokens:
                self.reason = FinishReason.LENGTH
        self.tokens += taken
        if self._lookup is not None:
            self._lookup.take(taken)
        return taken

    def uniform(self, *shape: int) -> np.ndarray:
        """The row's next random numbers in [0, 1); they do not depend on other rows."""
        assert self._random is not None
        return self._random.random(shape)

    def may_commit(self, period: int) -> int:
        """The most tokens that the row's next period may commit: `period`, or the rest up to
        `max_new_tokens`. `generate` has checked that this many fit into the model's length.
        """
        return min(period, self._request.max_new_tokens - len(self.tokens))

    def looked_up(self, period: int) -> Sequence[int]:
        """The looked-up draft for the row's next period of at most `period` tokens (K): tokens that
        followed the same n-gram earlier in its text. Empty where there is none.
        """
        if self._lookup is None or self.reason is not None:
            return ()
        return self._lookup.continuation(self.may_commit(min(period, self._request.period)) - 1)


class Choice(NamedTuple):
    """What runs next: a step, or a period of at most `period` tokens (K) in trees of `width`."""

    way: Way
    period: int
    width: int


def next_drafts(
    rows: Sequence[Row], choose: Callable[[], Choice]
) -> tuple[Choice, list[Sequence[int]]]:
    """What runs next, and each row's looked-up draft. `choose`: the choice for sparse drafts.

    A single row with a looked-up draft uses it, as long as the request's period allows; `choose` is
    not called. In a batch, looked-up drafts are no longer than the chosen period, because all rows
    verify as many tokens as the longest draft has.
    """
    if len(rows) == 1 and (own := rows[0].looked_up(MAX_PERIOD)):
        return Choice(Way.DRAFT, len(own) + 1, 1), [own]
    choice = choose()
    return choice, [row.looked_up(choice.period) if choice.way is Way.DRAFT else () for row in rows]


class Generation:
    """The rows of a `generate` call, the decoder, and the loop over periods."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        prompts: list[list[int]],
        request: Request,
        streamer: Streamer | None,
        costs: Costs,
        prefix: Prefix | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """costs: measured times of periods, which this run adds to. prefix: the K/V of tokens that
        all prompts begin with. tracing: only for one row.
        """
        self._backend, self._prefix = backend, prefix
        self._tracer = None
        if tracing is not None:
            self._tracer = Tracer(tracing, backend, request, tokenizer, prompts[0])
        self._prompts, self._request, self._streamer = prompts, request, streamer
        seeds = request.seeds or (None,) * len(prompts)
        self._rows = [
            Row(tokenizer, prompt, request, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        self._held = list(range(len(prompts)))  # the decoder's rows, as indices of all rows
        self._recorder = StatsRecorder(
            rows=len(prompts),
            prompt_tokens=sum(map(len, prompts)),
            weight_bytes=backend.program.weight_bytes(backend.itemsize),
            clock=PhaseClock(backend.device),
        )
        self._controller = None
        if request.adaptive:
            self._controller = Controller(request.period, request.widths, backend.stream_seconds)
        self._guard = None
        if request.guarded:
            self._guard = guard_of(request, costs, backend.program.acceptance)
        self._decoder = backend.open(
            request,
            len(prompts),
            max(map(len, prompts)) + request.max_new_tokens,
            self._recorder.clock,
        )

    def run(self) -> tuple[list[Row], GenerationStats]:
        decoder = self._decoder
        if self._streamer is not None:
            self._streamer.put(decoder.array(self._prompts[:1]))
        first = decoder.prefill(self._prompts, self._noise(Way.DENSE), self._prefix)
        self._recorder.prefill_passes = decoder.prefill_passes
        self._commit([[token] for token in first])
        if self._tracer is not None:
            self._tracer.first(first[0])
        self._recorder.clock.end_prefill()
        while any(row.reason is None for row in self._rows):
            self._leave_out_finished()
            self._period()
        if self._guard is not None:
            self._recorder.fallback = self._guard.fallback
        stats = self._recorder.close(decoder.density())
        if self._tracer is not None:
            self._tracer.end(decoder.state, self._fresh_state)
        return self._rows, stats

    def _fresh_state(self, tokens: int) -> State:
        """An empty state of a decoder for one row of so many tokens."""
        clock = PhaseClock(self._backend.device)
        return self._backend.open(self._request, 1, tokens + 1, clock).state

    @property
    def _live(self) -> list[Row]:
        return [self._rows[index] for index in self._held]

    def _noise(self, way: Way) -> np.ndarray | None:
        """The next random numbers of each row that the decoder holds: [rows, 2, K] for a period,
        [rows, 1, 1] for a step. None where the run is greedy.
        """
        if self._request.seeds is None:
            return None
        shape = (2, self._request.period) if way is Way.DRAFT else (1, 1)
        return np.stack([row.uniform(*shape) for row in self._live])

    def _choice(self) -> Choice:
        """What runs next where no draft is looked up."""
        request = self._request
        if request.mode not in RULES:
            return Choice(Way.DENSE if request.mode == Mode.FULL else Way.SPARSE, 1, 1)
        if self._controller is not None:
            return Choice(Way.DRAFT, *self._controller.choose())
        if self._guard is not None:
            return Choice(*self._guard.choose(), request.widths[0])
        return Choice(Way.DRAFT, request.period, request.widths[0])

    def _period(self) -> None:
        rows, sizes, plan = self._live, [1] * len(self._held), self._request.plan
        (way, period, width), given = next_drafts(rows, self._choice)
        reason = self._guard.reason if self._guard is not None and way is Way.DENSE else None
        if way is Way.DRAFT:
            # Each row's draft is as long as if the row ran alone, so a batch changes no row's
            # tokens. A row that has ended verifies one token, which is dropped.
            sizes = [
                1 if row.reason is not None else len(own) + 1 if own else row.may_commit(period)
                for row, own in zip(rows, given, strict=True)
            ]
            plan = replace(plan, period=max(sizes), width=width)
        # On a GPU, reading the clock waits for the device, so it is read only for the controller.
        before = {} if self._controller is None else self._recorder.clock.seconds()
        begin = time.perf_counter()
        done = self._decoder.period(way, plan, sizes, self._noise(way), given)
        seconds = time.perf_counter() - begin  # the tokens are on the host
        self._recorder.draft_steps += done.levels
        self._recorder.full_passes += done.full_passes
        live = self._count(way, done, given)
        if self._controller is not None and live:
            self._controller.observe(
                self._observation(before, plan.period, plan.width, done.levels, live)
            )
        if self._guard is not None and live:
            self._guard.observe(way, max(sizes), done.levels, live, seconds)
        before_commit = len(rows[0].tokens)
        self._commit([row.tokens for row in done.rows])
        if self._tracer is not None:
            taken = rows[0].tokens[before_commit:]
            self._tracer.step(way, plan, done, taken, seconds, reason, any(given))

    def _count(
        self, way: Way, done: Period, given: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]]:
        """Records statistics of the live rows; returns the (drafted, accepted) levels of those
        whose drafts the sparse path made.
        """
        live = []
        for index, row, did, own in zip(self._held, self._live, done.rows, given, strict=True):
            if row.reason is not None:
                continue
            looked_up = len(own) > 0
            if not looked_up:
                live.append((did.drafted, len(did.tokens) - 1))
            if way is Way.DRAFT:
                size, advance = did.drafted + 1, len(did.tokens)
                self._recorder.period(index, size, advance, looked_up=looked_up)
            elif way is Way.DENSE:
                self._recorder.dense_step(index)
        return live

    def _observation(
        self,
        before: dict[Phase, float],
        period: int,
        width: int,
        levels: int,
        rows: list[tuple[int, int]],
    ) -> Observation:
        after = self._recorder.clock.seconds()
        seconds = {phase: after[phase] - before[phase] for phase in Phase}
        return Observation(
            period=period,
            width=width,
            levels=levels,
            nodes=node_count(levels + 1, width),
            draft_seconds=seconds[Phase.DRAFT],
            verify_seconds=seconds[Phase.VERIFY],
            rest_seconds=seconds[Phase.REST],
            rows=tuple(rows),
        )

    def _commit(self, tokens: list[list[int]]) -> None:
        ended = False
        for row, new, logprobs in zip(self._live, tokens, self._logprobs(), strict=True):
            if row.reason is not None:
                continue
            taken = row.take(new)
            row.logprobs += logprobs[: len(taken)]
            self._recorder.tokens += len(taken)
            ended |= row.reason is not None
            if self._streamer is not None:
                self._streamer.put(self._decoder.array(taken))
        if ended:
            self._decoder.set_active([row.reason is None for row in self._live])

    def _logprobs(self) -> Sequence[Sequence[TokenLogprobs]]:
        """The log-probabilities of each held row's last tokens; empty where not asked for."""
        scoring = self._request.scoring
        if scoring is None or scoring.logprobs is None:
            return [()] * len(self._held)
        return self._decoder.logprobs()

    def _leave_out_finished(self) -> None:
        """Drops the rows that have ended from the decoder, once that at least halves the batch.

        Dropping copies the caches of the other rows, so it is not done for every row that ends.
        """
        going = [place for place, row in enumerate(self._live) if row.reason is None]
        if self._decoder.resizable and 2 * len(going) <= len(self._held):
            self._decoder.select(going)
            self._held = [self._held[place] for place in going]

    @property
    def trace(self) -> Trace | None:
        """The trace, where one was asked for; else None."""
        return None if self._tracer is None else self._tracer.trace

    @property
    def steps(self) -> tuple[RowSteps, ...]:
        """How each row's tokens were decoded, period by period."""
        return self._recorder.by_row


def guard_of(request: Request, costs: Costs, measured: AcceptanceSpec | None) -> Guard:
    """The guard for a request; `measured`: the acceptance rates measured at compile time."""
    passes = None
    if measured is not None:
        passes = measured.agreement if request.mode == Mode.EXACT else measured.passes
    return Guard(request.period, costs, passes)


def _no_token(request: Request, place: int) -> str:
    """The message for an answer whose token after the first `place` ones can't be chosen."""
    path = "sparse" if request.mode == Mode.SPARSE and place else "full"  # prompts run densely
    processing = "" if request.scoring is None else request.scoring.processing
    forbidden = f" Or {processing} forbid every token: relax them." if processing else ""
    return (
        f"token {place + 1} of an answer can't be chosen: the {path} path's logits for it are NaN "
        "or infinite. In 16 bits some models overflow: load with dtype float32. If this happens in "
        f"float32, the weights hold NaN or infinity: compile a sound checkpoint.{forbidden}"
    )
