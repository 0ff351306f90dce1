"""An answer in progress: what the engine knows of it, and what it tells of it."""

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
    """What became of an answer: tokens that it has from now on, and how it ended, if it did: for a
    reason, or by an error.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.reason is not None or self.error is not None


class DeadlineError(Exception):
    """An answer took longer than its request allows."""


class ClosingError(Exception):
    """The engine stops before the answer is complete."""


@dataclass(eq=False)
class Answer:
    """One row: a prompt, a checked request and, where it draws, a seed; `listen` is told of it, in
    the engine's thread. deadline: by `time.monotonic`.
    """

    prompt: Sequence[int]
    request: Request
    seed: int | None
    deadline: float
    listen: Callable[[News], None]
    tokenizer: Tokenizer | None
    cancelled: bool = False
    """Nobody listens any more; set by any thread, and read between periods."""
    ran: int = 0
    """Tokens of the prompt whose K/V is there."""
    cached: int = 0
    """Those of them that were found in the prefix cache."""
    digests: Sequence[bytes] = ()
    drafted: int = 0
    accepted: int = 0
    periods: int = 0
    row: Row = field(init=False)
    begun: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first: float | None = None
    """When its first token came."""

    def __post_init__(self) -> None:
        self.row = Row(self.tokenizer, self.prompt, self.request, self.seed)

    @property
    def way(self) -> Way:
        """How it goes on."""
        if self.request.mode in RULES:
            return Way.DRAFT
        return Way.DENSE if self.request.mode == Mode.FULL else Way.SPARSE

    @property
    def batch(self) -> Hashable:
        """What answers that run in one batch have in common."""
        request, scoring = self.request, self.request.scoring
        by_length = scoring is not None and (
            scoring.logits.forced_eos_token_id or scoring.logits.exponential_decay_length_penalty
        )
        most = request.max_new_tokens if by_length else None
        return self.way, request.guarded and request.mode, scoring, most

    @property
    def length(self) -> int:
        """Tokens whose K/V is there: all but the last one, once there is a first."""
        return len(self.prompt) + len(self.row.tokens) - 1 if self.row.tokens else self.ran

    def most(self, period: int) -> int:
        """Tokens that its next period may commit, where that drafts no further than this."""
        own = min(self.request.period, period)
        return self.row.may_commit(own) if self.way is Way.DRAFT else 1

    def asking(self, *, first: bool = False) -> Asking:
        """What it asks of its next period; draws its random numbers. first: of its first token."""
        noise: np.ndarray | None = None
        if self.seed is not None:
            period = self.way is Way.DRAFT and not first
            noise = self.row.uniform(2, self.request.period) if period else self.row.uniform(1, 1)
        return Asking(self.request.plan, noise)
