"""Runs one prompt in three modes: the dense model, the sparse path alone, and Sirius."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from sirius_runtime.model import GenerationOutput, Mode, MoreOptions, Prompt, SiriusModel

COMPARED = (Mode.FULL, Mode.SPARSE, Mode.SIRIUS)


@dataclass(frozen=True)
class Comparison:
    """One mode's run, compared with the dense run of the same call.

    `same_tokens`: number of leading tokens that equal the dense run's. `speed`: tokens per second
    divided by the dense run's; None where either run ended with its first token.
    """

    mode: Mode
    output: GenerationOutput
    same_tokens: int
    speed: float | None


def compare(
    model: SiriusModel,
    prompt: Prompt,
    *,
    add_special_tokens: bool = True,
    max_new_tokens: int | None = None,
    period: int | str | None = None,
    tree_width: int | None = None,
    confidence: float | None = None,
    refresh: int | None = None,
    fallback: bool | None = None,
    lookup: int | None = None,
    stop: tuple[str, ...] = (),
    **more: Unpack[MoreOptions],
) -> list[Comparison]:
    """Generates from `prompt` in each mode of `COMPARED`, dense first, after a warm-up of each.

    Options are those of `SiriusModel.generate`, but `fallback` is off by default: drafts are made
    even where they are slower than dense decoding.
    """

    def run(mode: Mode, new_tokens: int | None) -> GenerationOutput:
        return model.generate(
            prompt,
            add_special_tokens=add_special_tokens,
            mode=mode,
            max_new_tokens=new_tokens,
            period=period,
            tree_width=tree_width,
            confidence=confidence,
            refresh=refresh,
            fallback=bool(fallback),
            lookup=lookup,
            stop=stop,
            **more,
        )

    for mode in COMPARED:  # the first call also pays for allocation and warm-up
        run(mode, min(2, max_new_tokens or 2))
    outputs = {mode: run(mode, max_new_tokens) for mode in COMPARED}
    dense = outputs[Mode.FULL]
    return [
        Comparison(
            mode=mode,
            output=output,
            same_tokens=_common_prefix(output.tokens[0], dense.tokens[0]),
            speed=_ratio(output.stats.tokens_per_second, dense.stats.tokens_per_second),
        )
        for mode, output in outputs.items()
    ]


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
