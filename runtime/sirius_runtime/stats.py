"""What a generation cost and gained, as data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sirius_runtime.spec import SparsitySpec

if TYPE_CHECKING:
    import torch


class Phase(StrEnum):
    """Where the time of a generation goes."""

    DRAFT = "draft"
    """Sparse steps."""
    VERIFY = "verify"
    """Full forwards over chunks, or over one token in mode `full`."""
    PERIOD = "period"
    """Whole periods that run as one graph, drafts and verification together."""
    REST = "rest"
    """Everything else: prefill, acceptance, host work."""


@dataclass(frozen=True)
class Fallback:
    """Tokens of all rows that were decoded densely because drafts did not pay, and what those
    drafts brought: `advance` tokens a row in the time of `cost` dense steps.
    """

    tokens: int
    advance: float
    cost: float


@dataclass(frozen=True)
class GenerationStats:
    """Counts over all rows of one `generate` call.

    `advances` counts periods by the tokens they committed, `aal` (average advance length) leaves
    each row's last period out, which the end cuts short. `corrections`: periods that refused a
    drafted token. `acceptance_rate`: accepted over drafted tokens. `density`: share of the
    bytes of weights that one sparse step read, of those that a full step reads.
    `effective_density`: that share per committed token over the periods that `aal` counts and over
    dense steps, dense = 1. `weight_bytes`: bytes of the model's weights, as one dense step reads
    them. `dense_tokens`: made by dense steps;
    `fallback`: those made because drafts did not pay. `looked_up`: drafted tokens that prompt
    look-up copied, which read no weight, and `looked_up_kept`: those that were accepted; both are
    among the drafted and accepted tokens of the other counts. None stands for a number that was not
    measured: a generation that ends with its first token, which prefill makes, has no decoding.
    """

    rows: int
    prompt_tokens: int
    tokens: int
    periods: int
    advances: dict[int, int]
    aal: float | None
    corrections: int
    acceptance_rate: float | None
    density: float
    effective_density: float | None
    weight_bytes: int
    seconds: dict[Phase, float]
    prefill_seconds: float
    bytes_read: dict[Phase, float]
    dense_tokens: int = 0
    fallback: Fallback | None = None
    looked_up: int = 0
    looked_up_kept: int = 0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def decoded_tokens(self) -> int:
        """Tokens that decoding made: all but each row's first, which prefill makes."""
        return self.tokens - self.rows

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens over the time after prefill; None where there are none."""
        if not self.decoded_tokens:
            return None
        return self.decoded_tokens / (self.total_seconds - self.prefill_seconds)

    @property
    def bytes_per_token(self) -> dict[Phase, float]:
        """Weight bytes read per generated token, by phase."""
        return {phase: count / max(self.tokens, 1) for phase, count in self.bytes_read.items()}

    @property
    def seconds_per_token(self) -> dict[Phase, float]:
        """Seconds per generated token, by phase."""
        return {phase: value / max(self.tokens, 1) for phase, value in self.seconds.items()}


class PeriodSteps(NamedTuple):
    """A period of a row: the tokens that it could have committed, drafted ones and one of the full
    path, and those that it did. `looked_up`: its draft was copied, without a sparse step.
    """

    size: int
    advance: int
    looked_up: bool = False

    def reads(self, density: float) -> float:
        """Of the weights, how often they were read."""
        return 1.0 if self.looked_up else (self.size - 1) * density + 1.0


@dataclass(frozen=True)
class RowSteps:
    """How a row's tokens were made. `dense`: tokens of dense steps."""

    periods: tuple[PeriodSteps, ...]
    dense: int


class Device(Protocol):
    """Where a back end computes: a `torch.device`, or what has a `type` as it has."""

    @property
    def type(self) -> str: ...


class PhaseClock:
    """Adds up the seconds of each phase; on a GPU, of the work that the phase queued there."""

    def __init__(self, device: Device) -> None:
        """`cuda` among the types is PyTorch's, which queues its work."""
        self._cuda = device.type == "cuda"
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(Phase, 0.0)
        self._events: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []
        self.prefill_seconds = 0.0

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        if self._cuda:
            import torch

            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            begin_s = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - begin_s

    def end_prefill(self) -> None:
        """Marks the end of prefill; what follows is decoding."""
        self.prefill_seconds = time.perf_counter() - self._start

    def seconds(self) -> dict[Phase, float]:
        """Seconds by phase so far; what no phase claimed is `rest`."""
        if self._events:
            import torch

            torch.cuda.synchronize()
            for phase, begin, end in self._events:
                self._seconds[phase] += begin.elapsed_time(end) / 1e3
            self._events.clear()
        total = time.perf_counter() - self._start
        claimed = {
            phase: value for phase, value in self._seconds.items() if phase is not Phase.REST
        }
        return claimed | {Phase.REST: total - sum(claimed.values())}


def measured_density(sparsity: SparsitySpec, kept: Iterable[float], tokens: int) -> float:
    """Share of the bytes that a sparse step read: measured where tokens differ in what they
    keep, else static.

    kept: what each counted site kept, summed over `tokens`.
    """
    if tokens == 0:
        return sparsity.density
    measured = zip(sparsity.counted, kept, strict=True)
    more = sum((count / tokens - site.kept) * site.params for site, count in measured)
    return sparsity.density + float(more) / sparsity.step


@dataclass
class StatsRecorder:
    """Collects what the generation loop sees, and closes it into a `GenerationStats`."""

    rows: int
    prompt_tokens: int
    weight_bytes: int
    clock: PhaseClock
    prefill_passes: int = 0
    draft_steps: int = 0
    full_passes: int = 0
    tokens: int = 0
    fallback: Fallback | None = None
    _periods: list[list[PeriodSteps]] = field(default_factory=list)
    _dense: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._periods = [[] for _ in range(self.rows)]
        self._dense = [0] * self.rows

    def dense_step(self, row: int) -> None:
        """Notes that a dense step made a token of `row`."""
        self._dense[row] += 1

    def period(self, row: int, size: int, advance: int, *, looked_up: bool = False) -> None:
        """Notes that a period of `size` - 1 drafted levels committed `advance` tokens of `row`."""
        self._periods[row].append(PeriodSteps(size, advance, looked_up))

    @property
    def by_row(self) -> tuple[RowSteps, ...]:
        """What was noted of each row."""
        return tuple(
            RowSteps(tuple(periods), dense)
            for periods, dense in zip(self._periods, self._dense, strict=True)
        )

    def close(self, density: float) -> GenerationStats:
        every = [p for row in self._periods for p in row]
        counted = [p for row in self._periods for p in row[:-1]]
        # A generation of one period a row has no other to average over.
        reads = counted or every
        advance = sum(p.advance for p in reads)
        drafted = sum(p.size - 1 for p in every)
        weight_reads = sum(p.reads(density) for p in reads)
        copied = [p for p in every if p.looked_up]
        dense = sum(self._dense)
        steps = self.draft_steps + self.full_passes
        effective = None
        if advance:
            effective = (weight_reads + dense) / (advance + dense)
        elif steps:  # modes without periods
            effective = (self.draft_steps * density + self.full_passes) / steps
        return GenerationStats(
            rows=self.rows,
            prompt_tokens=self.prompt_tokens,
            tokens=self.tokens,
            periods=len(every),
            advances=dict(sorted(Counter(p.advance for p in every).items())),
            aal=sum(p.advance for p in counted) / len(counted) if counted else None,
            corrections=sum(p.advance < p.size for p in every),
            acceptance_rate=sum(p.advance - 1 for p in every) / drafted if drafted else None,
            density=density,
            effective_density=effective,
            weight_bytes=self.weight_bytes,
            seconds=self.clock.seconds(),
            prefill_seconds=self.clock.prefill_seconds,
            bytes_read={
                Phase.DRAFT: self.draft_steps * density * self.weight_bytes,
                Phase.VERIFY: float(self.full_passes * self.weight_bytes),
                Phase.PERIOD: 0.0,  # counted as the drafts and verifications that it holds
                Phase.REST: float(self.prefill_passes * self.weight_bytes),
            },
            dense_tokens=dense,
            fallback=self.fallback,
            looked_up=sum(p.size - 1 for p in copied),
            looked_up_kept=sum(p.advance - 1 for p in copied),
        )
