"""`SiriusModel`: a loaded program with `generate`, under transformers' names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.policy import Acceptance, ExactAcceptance, ThresholdAcceptance
from sirius_runtime.session import PREFILL_CHUNK, Backend, Session
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.stats import GenerationStats, PhaseClock, StatsRecorder
from sirius_runtime.text import StopScanner, cut_at_stop, decode

DEFAULT_NEW_TOKENS = 256
MAX_PERIOD = PREFILL_CHUNK

Prompt = str | Sequence[int]


class Mode(StrEnum):
    """Which paths write and which decide."""

    SIRIUS = "sirius"
    """The sparse path writes; the full path checks each period by the threshold."""
    EXACT = "exact"
    """The same, but only the full path's own argmax passes: dense greedy tokens."""
    FULL = "full"
    """The dense model, token by token."""
    SPARSE = "sparse"
    """The sparse path alone, never checked."""


class FinishReason(StrEnum):
    """Why a row ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


class Streamer(Protocol):
    """transformers' streamer: `put` takes the prompt [1, T], then committed tokens; then `end`."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class GenerationOutput:
    """What `generate` returns: `tokens` and `texts` are the new ones of each row, prompts left out.

    A row that ended by an EOS token or a stop string has it as the end of its tokens; its text ends
    before the stop string, and leaves special tokens out. `texts` is None for a model without a
    tokenizer.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    finish_reasons: tuple[FinishReason, ...]
    stats: GenerationStats


class SiriusModel:
    """A program behind a back end: `generate` it."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None) -> None:
        self.backend = backend
        self.tokenizer = tokenizer

    @property
    def program(self) -> ProgramSpec:
        """What the artifact says of the model."""
        return self.backend.program

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt] | Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        mode: Mode | str = Mode.SIRIUS,
        threshold: float | None = None,
        period: int | None = None,
        verify_temperature: float | None = None,
        stop: str | Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
    ) -> GenerationOutput:
        """Generates greedily from one prompt or a batch.

        inputs: text, token ids, a list of either, or input_ids [B, T] (with `attention_mask` [B, T]
        where rows are padded, left or right). max_new_tokens: by default what is left of the
        model's length, at most 256. threshold, period, verify_temperature: the artifact's defaults
        unless given. stop: strings that end a row once they stand in its text. eos_token_id:
        replaces the model's own EOS ids. streamer: one row only; is given committed tokens, never
        taken back.

        Raises GenerationError for a request that can't be served and ConfigError for an option out
        of range, each naming the limit; the model serves the next call all the same.
        """
        prompts = self._prompts(inputs, attention_mask)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        request = _Request(
            mode=_mode(mode),
            acceptance=self._acceptance(_mode(mode), threshold, verify_temperature),
            period=self._period(period),
            max_new_tokens=self._max_new_tokens(prompts, max_new_tokens),
            eos=self._eos(eos_token_id),
            stop=self._stop(stop),
        )
        if streamer is not None:
            if len(prompts) != 1:
                raise GenerationError(f"a streamer takes one row, the batch has {len(prompts)}")
            streamer.put(torch.tensor([prompts[0]]))
        rows, stats = _Generation(self, prompts, request, streamer).run()
        if streamer is not None:
            streamer.end()
        return GenerationOutput(
            prompts=tuple(map(tuple, prompts)),
            tokens=tuple(tuple(row.tokens) for row in rows),
            texts=None if self.tokenizer is None else tuple(self._text(r, stop) for r in rows),
            finish_reasons=tuple(row.reason or FinishReason.LENGTH for row in rows),
            stats=stats,
        )

    def _text(self, row: _Row, stop: Sequence[str]) -> str:
        assert self.tokenizer is not None
        return cut_at_stop(decode(self.tokenizer, row.tokens), stop)

    def _prompts(
        self, inputs: Prompt | Sequence[Prompt] | Tensor, mask: Tensor | None
    ) -> list[list[int]]:
        if isinstance(inputs, Tensor):
            prompts = _unpadded(inputs, mask)
        elif mask is not None:
            raise GenerationError("attention_mask goes with a tensor of input_ids only")
        elif isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int)):
            prompts = [self._encode(inputs)]  # type: ignore[arg-type]
        else:
            prompts = [self._encode(prompt) for prompt in inputs]  # type: ignore[arg-type]
        if not prompts:
            raise GenerationError("no prompt was given")
        vocabulary = self.program.model.vocab_size
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise GenerationError(f"prompt {index} is empty: give at least one token")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise GenerationError(
                    f"prompt {index} has a token id outside of the vocabulary (0..{vocabulary - 1})"
                )
        return prompts

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise GenerationError("the artifact holds no tokenizer: give token ids, not text")
        return list(self.tokenizer.encode(prompt).ids)

    def _acceptance(
        self, mode: Mode, threshold: float | None, temperature: float | None
    ) -> Acceptance:
        default = self.program.period
        if mode is Mode.EXACT:
            return ExactAcceptance()
        return ThresholdAcceptance(
            default.threshold if threshold is None else threshold,
            default.verify_temperature if temperature is None else temperature,
        )

    def _period(self, period: int | None) -> int:
        period = self.program.period.period if period is None else period
        if not 1 <= period <= MAX_PERIOD:
            raise ConfigError(f"period must be in 1..{MAX_PERIOD}, got {period}")
        return period

    def _max_new_tokens(self, prompts: list[list[int]], wanted: int | None) -> int:
        longest, limit = max(map(len, prompts)), self.program.model.max_seq_len
        room = limit - longest
        if room < 1:
            raise GenerationError(
                f"the prompt has {longest} tokens, but the artifact was compiled for sequences of "
                f"{limit}; shorten it, or compile with a larger --max-seq-len"
            )
        if wanted is None:
            return min(room, DEFAULT_NEW_TOKENS)
        if not 1 <= wanted <= room:
            raise GenerationError(
                f"max_new_tokens must be in 1..{room} here ({limit} tokens of max_seq_len less "
                f"{longest} of the prompt), got {wanted}"
            )
        return wanted

    def _eos(self, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_token_id is None:
            return frozenset(self.program.eos_token_ids)
        return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)

    def _stop(self, stop: tuple[str, ...]) -> tuple[str, ...]:
        if stop and self.tokenizer is None:
            raise GenerationError("stop strings need a tokenizer, and the artifact holds none")
        if "" in stop:
            raise GenerationError("a stop string is empty: it would stop every row at once")
        return stop


def _unpadded(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The rows of input_ids, without the tokens that attention_mask leaves out."""
    if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype is torch.bool:
        raise GenerationError(
            f"input_ids must be integers of shape [B, T] or [T], got {ids.dtype} {list(ids.shape)}"
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise GenerationError(
            f"attention_mask has shape {list(mask.shape)}, which must be that of input_ids, "
            f"{list(ids.shape)}"
        )
    if ids.ndim == 1:
        ids, mask = ids[None], mask[None]
    return [row[kept.bool()].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def _mode(mode: Mode | str) -> Mode:
    if mode not in list(Mode):
        raise ConfigError(f"mode must be one of {', '.join(Mode)}, got {mode!r}")
    return Mode(mode)


@dataclass(frozen=True)
class _Request:
    mode: Mode
    acceptance: Acceptance
    period: int
    max_new_tokens: int
    eos: frozenset[int]
    stop: tuple[str, ...]


class _Row:
    """What the host knows of one sequence: its committed tokens, and why it ended."""

    def __init__(self, tokenizer: Tokenizer | None, request: _Request) -> None:
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self._request = request
        self._scanner = StopScanner(tokenizer, request.stop) if tokenizer and request.stop else None

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


class _Generation:
    """One `generate` call: the loop over periods or steps, and its bookkeeping."""

    def __init__(
        self,
        model: SiriusModel,
        prompts: list[list[int]],
        request: _Request,
        streamer: Streamer | None,
    ) -> None:
        self._prompts, self._request, self._streamer = prompts, request, streamer
        self._rows = [_Row(model.tokenizer, request) for _ in prompts]
        self._recorder = StatsRecorder(
            rows=len(prompts),
            prompt_tokens=sum(map(len, prompts)),
            weight_bytes=model.program.model.parameters * model.backend.dtype.itemsize,
            clock=PhaseClock(model.backend.device),
        )
        # A row may overshoot its end by a period, and is carried along through one chunk more.
        capacity = max(map(len, prompts)) + request.max_new_tokens + 2 * request.period
        self._session = Session(
            model.backend, len(prompts), math.ceil(capacity / 64) * 64, self._recorder
        )

    @torch.inference_mode()
    def run(self) -> tuple[list[_Row], GenerationStats]:
        session, request = self._session, self._request
        first = session.prefill(self._prompts)
        self._commit([[token] for token in first.tolist()])
        self._recorder.clock.end_prefill()
        while any(row.reason is None for row in self._rows):
            if request.mode in (Mode.SIRIUS, Mode.EXACT):
                self._period()
            else:
                step = session.full_step if request.mode is Mode.FULL else session.sparse_step
                self._commit([[token] for token in step().tolist()])
        return self._rows, self._recorder.close(session.density())

    def _period(self) -> None:
        # Each row's chunk is as long as in a run of its own: a batch changes no row's tokens.
        sizes = [self._chunk_size(row) for row in self._rows]
        active = [row.reason is None for row in self._rows]
        most = torch.tensor(sizes, device=self._session.length.device)
        verdict = self._session.period(max(sizes), self._request.acceptance, most)
        # The one read of device values in a period.
        *columns, advances = torch.cat([verdict.tokens, verdict.advance[:, None]], 1).T.tolist()
        committed = [
            list(row)[:advance]
            for row, advance in zip(zip(*columns, strict=True), advances, strict=True)
        ]
        for index, advance in enumerate(advances):
            if active[index]:
                self._recorder.period(index, sizes[index], advance)
        self._commit(committed)

    def _chunk_size(self, row: _Row) -> int:
        """Tokens of the row's next chunk: the period, or what is still wanted; 1 once it ended.

        What is wanted fits into the model's length: `generate` has seen to that.
        """
        if row.reason is not None:
            return 1
        return min(self._request.period, self._request.max_new_tokens - len(row.tokens))

    def _commit(self, tokens: list[list[int]]) -> None:
        ended = False
        for row, new in zip(self._rows, tokens, strict=True):
            if row.reason is not None:
                continue
            taken = row.take(new)
            self._recorder.tokens += len(taken)
            ended |= row.reason is not None
            if self._streamer is not None:
                self._streamer.put(torch.tensor(taken))
        if ended:
            self._session.active = torch.tensor(
                [row.reason is None for row in self._rows], device=self._session.active.device
            )
