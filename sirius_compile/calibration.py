"""Calibration: the thresholds of the sparse path, as quantiles of activations over text.

Decoding reads what the model itself writes, so the built-in text is on-policy: prompts that ship
with the compiler, and the dense model's own greedy continuation of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, fx

from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.errors import CalibrationError
from sirius_runtime.model import Mode, SiriusModel
from sirius_runtime.ops.mlp import ACTIVATIONS
from sirius_runtime.session import Session
from sirius_runtime.stats import PhaseClock, StatsRecorder

BUILTIN_PROMPTS = Path(__file__).parent / "calibration_prompts.jsonl"
CONTINUATION = 48  # new tokens after each built-in prompt
WINDOW = 512  # tokens of a text that are read together
MIN_TOKENS = 64
MAX_TOKENS = 16_384


@dataclass(frozen=True)
class Calibration:
    """Thresholds [layers], and what they keep: the share of neurons over the calibration tokens."""

    tokens: int
    thresholds: tuple[float, ...]
    reached: tuple[float, ...]


class QuantileSketch:
    """Quantiles of non-negative values per layer, from a histogram of their float32 bit patterns.

    The patterns of non-negative floats are in the order of the values, so the leading 19 bits below
    the sign are bins of a relative width of 2^-11: exact counts, one pass, a few megabytes a layer.
    """

    _DROPPED_BITS = 12
    _BINS = 1 << (31 - _DROPPED_BITS)

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    @property
    def layers(self) -> list[int]:
        """The layers that have values, in order."""
        return sorted(self._counts)

    def add(self, layer: int, values: Tensor) -> None:
        """Counts `values`, any shape; raises CalibrationError where one is not finite."""
        values = values.detach().float().flatten().cpu()
        if not bool(values.isfinite().all()):
            raise CalibrationError(
                f"layer {layer} has activations that are not finite on the calibration text; the "
                "weights or their dtype are broken (try --dtype float32)"
            )
        bins = values.view(torch.int32) >> self._DROPPED_BITS
        counts = torch.bincount(bins, minlength=self._BINS)
        self._counts[layer] = self._counts.get(layer, 0) + counts

    def quantile(self, layer: int, share: float) -> float:
        """The smallest bin edge with at least `share` of the layer's values at or below it."""
        counts = self._counts[layer].cumsum(0)
        wanted = torch.tensor(share * float(counts[-1]), dtype=torch.float64)
        index = int(torch.searchsorted(counts.double(), wanted))
        edge = ((index + 1) << self._DROPPED_BITS) - 1
        return float(torch.tensor(edge, dtype=torch.int32).view(torch.float32))

    def share_above(self, layer: int, threshold: float) -> float:
        """Share of the layer's values in the bins above `threshold`'s."""
        index = int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32))
        counts = self._counts[layer]
        return float(counts[(index >> self._DROPPED_BITS) + 1 :].sum()) / float(counts.sum())


class ObservingBackend(EagerBackend):
    """Runs `prefill` node by node and shows each MLP's |act(gate x)| [B, T, I] to `observe`."""

    observe: Callable[[int, Tensor], None]

    @torch.inference_mode()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bound = self._entries[entry]
        observer = _Observer(bound.module, self.observe)
        return self._named(entry, observer.run(*bound.arguments(inputs)))


class _Observer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, observe: Callable[[int, Tensor], None]) -> None:
        super().__init__(module)
        self._observe = observe

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.sirius.dense_mlp.default:
            x, gate, _, _, gate_bias, _, _, act, layer = args
            self._observe(layer, ACTIVATIONS[act](F.linear(x, gate, gate_bias)).abs())
        return super().call_function(target, args, kwargs)


def read_texts(path: Path) -> list[str]:
    """The texts of a calibration file: JSONL with a ``text`` field a line, or plain text as one.

    Raises CalibrationError for a file that can't be read as either.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"calibration file {path} can't be read as UTF-8 text ({error}); give plain text or "
            "JSONL with a 'text' field, or --calibration builtin"
        ) from error
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"calibration file {path}, line {number}: not a JSON object with a 'text' field"
            ) from error
    return texts


def read_prompts(path: Path) -> list[str]:
    """The prompts of a built-in calibration file (JSONL, field ``prompt``)."""
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Windows of token ids of the texts, `MAX_TOKENS` in all at the most."""
    windows: list[list[int]] = []
    left = MAX_TOKENS
    for text in texts:
        ids = tokenizer.encode(text).ids[:left]
        left -= len(ids)
        windows += [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    return [w for w in windows if w]


def on_policy(prompts: Sequence[str], model: SiriusModel) -> list[list[int]]:
    """The prompts with the dense model's greedy continuation, as token ids."""
    output = model.generate(list(prompts), mode=Mode.FULL, max_new_tokens=CONTINUATION)
    return [[*p, *t] for p, t in zip(output.prompts, output.tokens, strict=True)]


def calibrate(
    backend: ObservingBackend, sequences: Sequence[list[int]], keep: float
) -> Calibration:
    """The (1 - keep) quantile of each layer's |act(gate x)| over the tokens of `sequences`.

    Raises CalibrationError where there are too few tokens, or where a layer's activations leave no
    threshold that keeps some neurons and not all.
    """
    tokens = sum(map(len, sequences))
    if tokens < MIN_TOKENS:
        raise CalibrationError(
            f"the calibration text has {tokens} tokens; at least {MIN_TOKENS} are needed"
        )
    sketch = QuantileSketch()
    backend.observe = sketch.add
    for sequence in sequences:
        recorder = StatsRecorder(1, len(sequence), 0, PhaseClock(backend.device))
        Session(backend, 1, len(sequence), recorder).prefill([sequence])
    thresholds = tuple(sketch.quantile(layer, 1.0 - keep) for layer in sketch.layers)
    reached = tuple(map(sketch.share_above, sketch.layers, thresholds))
    for layer, share in enumerate(reached):
        if abs(share - keep) > 0.1:
            raise CalibrationError(
                f"layer {layer}: no threshold keeps {keep:.0%} of the neurons on this text (the "
                f"nearest keeps {share:.0%}); its activations are all but constant"
            )
    return Calibration(tokens, thresholds, reached)
