"""An answer in progress: its state in the engine, and the events that the engine reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from sirius_runtime.decoder import Way
from sirius_runtime.generation import Row
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.request import FinishReason, Mode, Request
from sirius_runtime.rules import RULES
from sirius_runtime.serve.mixed import Asking


@dataclass(frozen=True)
class News:
    """An event of an answer: its new tokens with their log-probabilities and, if it has ended, the
    finish reason or the error.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether this is the answer's last event."""
        return self.reason is not None or self.error is not None


class DeadlineError(Exception):
    """The answer was not complete at its deadline."""


class ClosingError(Exception):
    """The engine stopped before the answer was complete."""


@dataclass(eq=False)
class Answer:
    """One sequence: a prompt, a checked request and, if the mode samples, a seed.

    `listen` is called with each event, in the engine's thread. deadline, begun, admitted, first:
    seconds of `time.monotonic`; `admitted` is when it got a row, `first` when its first token came.
    """

    prompt: Sequence[int]
    request: Request
    seed: int | None
    deadline: float
    listen: Callable[[News], None]
    tokenizer: Tokenizer | None
    cancelled: bool = False
    """The client has gone. Any thread may set this; the engine reads it between periods."""
    ran: int = 0
    """Prompt tokens whose K/V is in the cache."""
    cached: int = 0
    """How many of them came from the prefix cache."""
    digests: Sequence[bytes] = ()
    drafted: int = 0
    accepted: int = 0
    periods: int = 0
    row: Row = field(init=False)
    begun: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first: float | None = None

    def __post_init__(self) -> None:
        self.row = Row(self.tokenizer, self.prompt, self.request, self.seed)

    @property
    def way(self) -> Way:
        """Which path its next step runs on."""
        if self.request.mode in RULES:
            return Way.DRAFT
        return Way.DENSE if self.request.mode == Mode.FULL else Way.SPARSE

    @property
    def batch(self) -> Hashable:
        """The key of its batch: answers with equal keys run as one batch."""
        request, scoring = self.request, self.request.scoring
        by_length = scoring is not None and (
            scoring.logits.forced_eos_token_id or scoring.logits.exponential_decay_length_penalty
        )
        most = request.max_new_tokens if by_length else None
        return self.way, request.guarded and request.mode, scoring, most

    @property
    def length(self) -> int:
        """Tokens whose K/V is in the cache: once the answer has begun, all but the last token."""
        return len(self.prompt) + len(self.row.tokens) - 1 if self.row.tokens else self.ran

    def most(self, period: int) -> int:
        """How many tokens its next period may commit, if the batch's period is `period`."""
        shorter = min(self.request.period, period)
        return self.row.may_commit(shorter) if self.way is Way.DRAFT else 1

    def asking(self, *, first: bool = False) -> Asking:
        """Its plan for the next period, with newly drawn random numbers. first: the plan for
        choosing its first token.
        """
        noise: np.ndarray | None = None
        if self.seed is not None:
            period = self.way is Way.DRAFT and not first
            noise = self.row.uniform(2, self.request.period) if period else self.row.uniform(1, 1)
        return Asking(self.request.plan, noise)
