"""Log-probabilities of given tokens by the full path, each given the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sirius_runtime.entries import FULL
from sirius_runtime.state import State

_LOGITS = 2**25  # in memory at once


@dataclass(frozen=True)
class TokenScores:
    """The scores of a row's tokens from its start on: their log-probabilities (natural logarithm),
    and whether each token is the likeliest at its place.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


def score(
    state: State, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[TokenScores, ...]:
    """Scores the tokens of each row from its start (1 or more) on.

    The tokens before the first start run as a prefill; the others in chunks, with logits for each.
    """
    skipped, longest = min(starts) - 1, max(map(len, rows))
    if skipped:
        state.prefill([row[:skipped] for row in rows])
    padded = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    logprobs = np.zeros((len(rows), longest))
    greedy = np.zeros((len(rows), longest), bool)
    step = max(1, _LOGITS // (len(rows) * state.program.model.vocab_size))
    ends = np.array([len(row) - 1 for row in rows])  # the last token need not run
    for begin in range(skipped, longest - 1, step):
        end = min(begin + step, longest - 1)
        state.length = state.array(np.minimum(ends, begin))
        logits = state.chain(FULL, state.array(padded[:, begin:end]))["logits"]
        after = padded[:, begin + 1 : end + 1]
        logprobs[:, begin + 1 : end + 1], greedy[:, begin + 1 : end + 1] = _scored(logits, after)
    return tuple(
        TokenScores(
            tuple(logprobs[index, start : len(row)].tolist()),
            tuple(greedy[index, start : len(row)].tolist()),
        )
        for index, (row, start) in enumerate(zip(rows, starts, strict=True))
    )


def _scored(logits_BTV: Any, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, T] of tokens from logits (a torch tensor or NumPy array), and whether
    they are the likeliest.
    """
    if not isinstance(logits_BTV, np.ndarray):
        logits_BTV = logits_BTV.float().cpu().numpy()
    own = np.take_along_axis(logits_BTV, tokens_BT[..., None], -1)[..., 0]
    highest = logits_BTV.max(-1)
    total = np.log(np.exp(logits_BTV - highest[..., None]).sum(-1, dtype=np.float64))
    return own - highest - total, logits_BTV.argmax(-1) == tokens_BT
