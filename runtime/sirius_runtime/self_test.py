"""The numeric self-test: logits of the compiling machine, for other machines to compute again.

A few tokens from a fixed seed run through `prefill`, `sparse` and `full` as in decoding. The
manifest keeps the tokens, a digest of each entry's logits, and a few logits of each token. A
machine with equal digests computes bit for bit what the compiling machine did. Other kernels, other
numbers of threads and GPUs round differently: there, the kept logits show whether the difference is
within rounding.

Shape letters: `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from sirius_runtime.entries import FULL, PREFILL, SPARSE
from sirius_runtime.spec import DType, ModelSpec, SelfTestRun, SelfTestSpec
from sirius_runtime.state import State

PROMPT_TOKENS, BLOCK_TOKENS = 24, 4
LIKELIEST = 4
"""Number of logits that are kept for each token."""

TOLERANCE = {DType.FLOAT32: 0.0045, DType.FLOAT16: 0.064, DType.BFLOAT16: 0.1}
"""The largest difference of a logit that counts as rounding, relative to the root mean square of
the token's logits. It is √(2 (1 - c)) for the cosine c that the compiler's check of kernels allows
(`sirius_compile.self_check` has the measurements).
"""
NESTED_TOLERANCE = 0.064
"""The tolerance for nested weights, if it is more: activations are rounded to integers there, so a
rounding difference may change one by a whole step.
"""


class Outcome(StrEnum):
    """How a machine's logits compare with those of the compiling machine."""

    EQUAL = "bit-equal"
    ROUNDED = "equal within rounding"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Compared:
    """An entry's logits compared with the manifest's. `largest`: the largest difference of a kept
    logit, relative to the root mean square of its token's logits.
    """

    entry: str
    outcome: Outcome
    largest: float


def choose_tokens(model: ModelSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt and a block of tokens; they depend only on the vocabulary and the model's length."""
    block = min(BLOCK_TOKENS, model.max_seq_len - 1)
    prompt = min(PROMPT_TOKENS, model.max_seq_len - block)
    drawn = np.random.Generator(np.random.PCG64(0)).integers(0, model.vocab_size, prompt + block)
    ids = tuple(map(int, drawn))
    return ids[:prompt], ids[prompt:]


def record(state: State, prompt: tuple[int, ...], block: tuple[int, ...]) -> SelfTestSpec | None:
    """Runs the self-test on an empty state of one row; None where logits are not finite."""
    runs = []
    for entry, logits_TV in _run(state, prompt, block):
        data, values = _numbers(logits_TV)
        if not np.isfinite(values).all():
            return None
        tokens = np.argsort(-values, axis=-1, kind="stable")[:, :LIKELIEST]
        kept = np.take_along_axis(values, tokens, -1)
        runs.append(
            SelfTestRun(
                entry=entry,
                sha256=hashlib.sha256(data).hexdigest(),
                rms=tuple(map(_short, _rms(values))),
                tokens=tuple(tuple(map(int, row)) for row in tokens),
                logits=tuple(tuple(map(_short, row)) for row in kept),
            )
        )
    return SelfTestSpec(prompt, block, tuple(runs))


def repeat(
    state: State, test: SelfTestSpec, dtype: DType, *, nested: bool = False
) -> tuple[Compared, ...]:
    """Runs a self-test again, on an empty state of one row, and compares the logits. `nested`:
    whether the program has nested weights.
    """
    wanted = {run.entry: run for run in test.runs}
    tolerance = max(TOLERANCE[dtype], NESTED_TOLERANCE * nested)
    return tuple(
        _compare(wanted[entry], logits_TV, tolerance)
        for entry, logits_TV in _run(state, test.prompt, test.block)
        if entry in wanted
    )


def _run(
    state: State, prompt: tuple[int, ...], block: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    """The logits [T, V] of each entry: of the prompt's last token for `prefill`, and of the block's
    tokens for the others.
    """
    with state.computing():
        logits_BV, _ = state.prefill([prompt])
        yield PREFILL, logits_BV
        state.choose_neurons()
        ids = state.array(np.array([block]))
        steps = []
        for index in range(len(block)):
            steps.append(state.chain(SPARSE, ids[:, index : index + 1])["logits"][0])
            state.length = state.length + 1
        yield SPARSE, state.xp.concatenate(steps)
        state.length = state.length - len(block)
        yield FULL, state.chain(FULL, ids)["logits"][0]


def _compare(wanted: SelfTestRun, logits_TV: Any, tolerance: float) -> Compared:
    data, values = _numbers(logits_TV)
    if hashlib.sha256(data).hexdigest() == wanted.sha256:
        return Compared(wanted.entry, Outcome.EQUAL, 0.0)
    if len(wanted.tokens) != len(values):
        return Compared(wanted.entry, Outcome.DIFFERENT, float("inf"))
    kept = np.take_along_axis(values, np.array(wanted.tokens), -1)
    rms = np.maximum(np.array(wanted.rms), np.finfo(np.float32).tiny)[:, None]
    apart = np.abs(kept - np.array(wanted.logits)) / rms
    # A token that was not kept may now be the likeliest, but by no more than rounding.
    above = (values.max(-1, keepdims=True) - kept[:, :1]) / rms - tolerance
    largest = float(np.maximum(apart, above).max())
    near = largest <= tolerance  # False for NaN
    return Compared(wanted.entry, Outcome.ROUNDED if near else Outcome.DIFFERENT, largest)


def _numbers(logits_TV: Any) -> tuple[bytes, np.ndarray]:
    """The bytes of logits in their own dtype, and their values."""
    if isinstance(logits_TV, np.ndarray):
        return logits_TV.tobytes(), logits_TV.astype(np.float64)
    import torch

    own = logits_TV.detach().cpu().contiguous()
    return own.view(torch.uint8).numpy().tobytes(), own.double().numpy()


def _rms(values_TV: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.sqrt(np.square(values_TV).mean(-1))
    return found


def _short(value: float) -> float:
    return float(f"{value:.6g}")
