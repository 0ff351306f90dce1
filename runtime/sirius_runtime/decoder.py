"""What the generation loop asks of a back end, in plain numbers: no tensor crosses this seam.

`Generation` keeps rows, ends, streams and statistics; a `Decoder` keeps the state of the rows that
it holds and runs what they run. There is one for PyTorch (`torch_decoder`) and one for ONNX Runtime
(`backends.onnx_decoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.plan import Limits, Plan
from sirius_runtime.request import Request
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.stats import Device, StatsRecorder

Uniform = Callable[..., np.ndarray]
"""Random numbers in [0, 1) of a shape, for each row that the decoder holds: [rows, *shape]."""


@dataclass(frozen=True)
class RowPeriod:
    """What a period did to one row: the tokens it committed, and the levels drafted for it."""

    tokens: list[int]
    drafted: int


class Decoder(Protocol):
    """A batch of sequences in progress."""

    resizable: bool
    """Whether `select` can leave rows out."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Runs the prompts densely; returns the first token of each row."""
        ...

    def period(self, plan: Plan, sizes: Sequence[int], noise: np.ndarray | None) -> list[RowPeriod]:
        """Drafts, verifies and commits; row i commits at most `sizes[i]` tokens.

        noise [rows, 2, K]: float64, of `Rule.SAMPLE`.
        """
        ...

    def full_step(self) -> list[int]:
        """One dense step; returns each row's next token."""
        ...

    def sparse_step(self) -> list[int]:
        """One sparse step that is never verified; returns each row's next token."""
        ...

    def logprobs(self) -> list[list[TokenLogprobs]]:
        """Of each row's tokens that the last call committed, where the request asks for them."""
        ...

    def set_active(self, active: Sequence[bool]) -> None:
        """Says which rows go on; the others stay as they are."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows and leaves the others out, with their state."""
        ...

    def density(self) -> float:
        """Share of the parameters that a sparse step read so far."""
        ...

    def array(self, tokens: Sequence[Any]) -> Any:
        """Tokens as the back end's own kind of array, for streamers."""
        ...


class Engine(Protocol):
    """A loaded program that can open decoders: a back end."""

    program: ProgramSpec
    limits: Limits | None
    """What whole periods can take, where they run as one graph."""

    @property
    def device(self) -> Device: ...

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        ...

    @property
    def threads(self) -> int:
        """Threads of one operator on the CPU, at the most."""
        ...

    def open(
        self,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
    ) -> Decoder:
        """A decoder with room for rows of `tokens`, prompt and answer.

        uniform: where tokens are drawn outside of periods; else they are the likeliest.
        """
        ...
