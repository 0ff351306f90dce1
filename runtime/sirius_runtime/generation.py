"""One `generate` call: the loop over periods or steps, and its bookkeeping on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sirius_runtime.controller import Controller, Observation
from sirius_runtime.period_session import PeriodSession
from sirius_runtime.policy import draw
from sirius_runtime.request import RULES, FinishReason, Mode, Request
from sirius_runtime.session import Backend, Session, cache_slots, greedy
from sirius_runtime.stats import GenerationStats, Phase, PhaseClock, StatsRecorder
from sirius_runtime.text import StopScanner
from sirius_runtime.tree import node_count


class Streamer(Protocol):
    """transformers' streamer: `put` takes the prompt [1, T], then committed tokens; then `end`."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Row:
    """What the host knows of one sequence: its committed tokens, and why it ended."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request, seed: int | None) -> None:
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self._request = request
        self._scanner = StopScanner(tokenizer, request.stop) if tokenizer and request.stop else None
        self._random = None if seed is None else np.random.default_rng(seed)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Takes committed tokens up to the row's end; returns those taken."""
        taken: list[int] = []
        for token in tokens:
            if self.reason is not None:
                break
            taken.append(token)
            if token in self._request.eos:
                self.reason = FinishReason.EOS
            elif self._scanner is not None and self._scanner.stops_at(token):
                self.reason = FinishReason.STOP
            elif len(self.tokens) + len(taken) == self._request.max_new_tokens:
                self.reason = FinishReason.LENGTH
        self.tokens += taken
        return taken

    def uniform(self, *shape: int) -> np.ndarray:
        """The row's own next random numbers in [0, 1): its neighbours change none of them."""
        assert self._random is not None
        return self._random.random(shape)

    def chunk_size(self, period: int) -> int:
        """Tokens that the row's next period may commit: `period`, or what is still wanted.

        What is wanted fits into the model's length: `generate` has seen to that.
        """
        return min(period, self._request.max_new_tokens - len(self.tokens))


class Generation:
    """The rows of a call, those of them that the Session still holds, and the loop."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        prompts: list[list[int]],
        request: Request,
        streamer: Streamer | None,
    ) -> None:
        self._prompts, self._request, self._streamer = prompts, request, streamer
        seeds = request.seeds or (None,) * len(prompts)
        self._rows = [Row(tokenizer, request, seed) for seed in seeds]
        self._held = list(range(len(prompts)))  # the Session's rows, as indices of all rows
        self._device = backend.device
        self._recorder = StatsRecorder(
            rows=len(prompts),
            prompt_tokens=sum(map(len, prompts)),
            weight_bytes=backend.program.model.parameters * backend.dtype.itemsize,
            clock=PhaseClock(backend.device),
        )
        self._controller = Controller(request.period, request.widths) if request.adaptive else None
        period, limits = request.period, backend.limits
        kind = Session
        if limits is not None and request.mode in RULES:
            kind, period = PeriodSession, limits.period  # its block is of the compiled size
        tokens = max(map(len, prompts)) + request.max_new_tokens
        self._session = kind(
            backend,
            len(prompts),
            cache_slots(tokens, period, max(request.widths)),
            self._recorder,
            refresh=request.refresh,
        )

    @torch.inference_mode()
    def run(self) -> tuple[list[Row], GenerationStats]:
        session, request = self._session, self._request
        first = session.prefill(self._prompts, self._pick)
        self._commit([[token] for token in first.tolist()])
        self._recorder.clock.end_prefill()
        while any(row.reason is None for row in self._rows):
            self._leave_out_finished()
            if request.mode in RULES:
                self._period()
            else:
                step = session.full_step if request.mode is Mode.FULL else session.sparse_step
                self._commit([[token] for token in step(self._pick).tolist()])
        return self._rows, self._recorder.close(session.density())

    @property
    def _live(self) -> list[Row]:
        return [self._rows[index] for index in self._held]

    def _pick(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row: its likeliest, or one drawn with the row's own number."""
        if self._request.seeds is None:
            return greedy(logits_BV)
        p = self._request.plan.sampling.distribution(logits_BV)
        return draw(p, self._noise(1)[:, 0])

    def _noise(self, *shape: int) -> Tensor:
        numbers = np.stack([row.uniform(*shape) for row in self._live])
        return torch.from_numpy(numbers).to(self._device)

    def _period(self) -> None:
        request = self._request
        period, width = request.period, request.widths[0]
        if self._controller is not None:
            period, width = self._controller.choose()
        rows = self._live
        # Each row's draft is as long as in a run of its own: a batch changes no row's tokens. Of a
        # row that has ended one token is judged, and not taken.
        sizes = [1 if row.reason is not None else row.chunk_size(period) for row in rows]
        plan = replace(request.plan, size=max(sizes), width=width)
        if request.mode is Mode.SAMPLE:
            plan = replace(plan, noise=self._noise(2, request.period))
        before = self._recorder.clock.seconds()
        steps = self._recorder.draft_steps
        outcome = self._session.period(plan, torch.tensor(sizes, device=self._device))
        # The one read of device values in a period.
        counts = torch.stack([outcome.advance, outcome.drafted], 1)
        read = torch.cat([outcome.tokens, counts], 1).tolist()
        committed, live = [], []
        for index, row, (*tokens, advance, drafted) in zip(self._held, rows, read, strict=True):
            committed.append(tokens[:advance])
            if row.reason is None:
                live.append((drafted, advance - 1))
                self._recorder.period(index, drafted + 1, advance)
        if self._controller is not None:
            levels = self._recorder.draft_steps - steps
            self._controller.observe(self._observation(before, plan.size, width, levels, live))
        self._commit(committed)

    def _observation(
        self,
        before: dict[Phase, float],
        size: int,
        width: int,
        levels: int,
        rows: list[tuple[int, int]],
    ) -> Observation:
        after = self._recorder.clock.seconds()
        seconds = {phase: after[phase] - before[phase] for phase in Phase}
        return Observation(
            size=size,
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
        for row, new in zip(self._live, tokens, strict=True):
            if row.reason is not None:
                continue
            taken = row.take(new)
            self._recorder.tokens += len(taken)
            ended |= row.reason is not None
            if self._streamer is not None:
                self._streamer.put(torch.tensor(taken))
        if ended:
            self._session.set_active(
                torch.tensor([row.reason is None for row in self._live], device=self._device)
            )

    def _leave_out_finished(self) -> None:
        """Drops rows that have ended from the Session, once that halves the batch.

        Each time copies what the others hold, so not each time that one ends.
        """
        going = [place for place, row in enumerate(self._live) if row.reason is None]
        if self._session.resizable and 2 * len(going) <= len(self._held):
            self._session.select(torch.tensor(going, device=self._device))
            self._held = [self._held[place] for place in going]
