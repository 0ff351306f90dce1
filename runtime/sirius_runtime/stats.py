"""Statistics of a generation: tokens, acceptance, times and weight reads."""

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
    """The phases of a generation, for times and bytes."""

    DRAFT = "draft"
    """Sparse steps."""
    VERIFY = "verify"
    """Passes of the full path: verifications, and dense steps."""
    PERIOD = "period"
    """Whole periods that run as one graph, draft and verification together."""
    REST = "rest"
    """Everything else: prefill, acceptance, host work."""


@dataclass(frozen=True)
class Fallback:
    """The number of tokens of all rows that were decoded densely because drafts did not pay; and
    the mean of those drafts: `advance` tokens per row in the time of `cost` dense steps.
    """

    tokens: int
    advance: float
    cost: float


@dataclass(frozen=True)
class GenerationStats:
    """Counts over all rows of one `generate` call.

    `advances`: number of periods by the tokens that they committed. `aal`: average advance length,
    without each row's last period, which the row's end may cut short. `corrections`: periods that
    refused a drafted token. `acceptance_rate`: accepted / drafted tokens. `density`: mean bytes of
    weights that a sparse step read, divided by those of a full step. `effective_density`: weight
    reads per committed token (dense decoding: 1), over the periods of `aal` and the dense steps.
    `weight_bytes`: bytes of the model's weights, which a dense step reads. `seconds`: time by
    phase; `prefill_seconds`: time until the first token. `bytes_read`: bytes of weights read, by
    phase. `dense_tokens`: tokens decoded by dense steps; `fallback`: those of them that were dense
    because drafts did not pay. `looked_up`: drafted tokens that were copied by prompt look-up,
    without a sparse step; `looked_up_kept`: those of them that were accepted. Both are included in
    the other counts. None means not measured: a generation that ends with its first token, which
    prefill gives, decodes nothing.
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
        """Tokens without each row's first one, which prefill gives."""
        return self.tokens - self.rows

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens per second of the time after prefill; None if there are none."""
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
    """A period of a row. `size`: the most tokens that it could commit, i.e. the drafted ones and
    one of the full path; `advance`: the committed tokens; `looked_up`: whether the draft was copied
    by prompt look-up, without a sparse step.
    """

    size: int
    advance: int
    looked_up: bool = False

    def reads(self, density: float) -> float:
        """Weight bytes that it read, in units of a dense step."""
        return 1.0 if self.looked_up else (self.size - 1) * density + 1.0


@dataclass(frozen=True)
class RowSteps:
    """How a row's tokens were decoded: its periods, and the number of its dense steps."""

    periods: tuple[PeriodSteps, ...]
    dense: int


class Device(Protocol):
    """A back end's device: a `torch.device`, or another object with its attribute `type`."""

    @property
    def type(self) -> str: ...


class PhaseClock:
    """Sums the seconds of each phase; on a GPU, the time of the work that the phase queued."""

    def __init__(self, device: Device) -> None:
        """device: type ``cuda`` is PyTorch's, whose calls only queue work."""
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
        """Seconds by phase so far; time outside all phases is `rest`. On a GPU, waits for it."""
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
    """The mean share of a full step's bytes that sparse steps read: measured at sites where the
    number kept differs between tokens, else static.

    kept: the units that each counted site kept, summed over `tokens` tokens.
    """
    if tokens == 0:
        return sparsity.density
    measured = zip(sparsity.counted, kept, strict=True)
    more = sum((count / tokens - site.kept) * site.params for site, count in measured)
    return sparsity.density + float(more) / sparsity.step


@dataclass
class StatsRecorder:
    """Collects counts in the generation loop; `close` returns the `GenerationStats`."""

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
        """Records a dense step of `row`."""
        self._dense[row] += 1

    def period(self, row: int, size: int, advance: int, *, looked_up: bool = False) -> None:
        """Records a period of `row` with `size` - 1 drafted levels and `advance` tokens."""
        self._periods[row].append(PeriodSteps(size, advance, looked_up))

    @property
    def by_row(self) -> tuple[RowSteps, ...]:
        """Each row's periods and dense steps."""
        return tuple(
            RowSteps(tuple(periods), dense)
            for periods, dense in zip(self._periods, self._dense, strict=True)
        )

    def close(self, density: float) -> GenerationStats:
        every = [p for row in self._periods for p in row]
        counted = [p for row in self._periods for p in row[:-1]]
        # Where each row has only one period, that one is used.
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
                Phase.PERIOD: 0.0,  # its reads are counted as drafts and verifications
                Phase.REST: float(self.prefill_passes * self.weight_bytes),
            },
            dense_tokens=dense,
            fallback=self.fallback,
            looked_up=sum(p.size - 1 for p in copied),
            looked_up_kept=sum(p.advance - 1 for p in copied),
        )
