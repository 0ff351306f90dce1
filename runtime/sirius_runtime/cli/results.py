"""The output of `generate` as JSON and as text."""

from __future__ import annotations

import math
import sys
from typing import Any

from sirius_runtime.command_line import say
from sirius_runtime.terminal import without_controls


def output_json(output: Any) -> dict[str, Any]:
    """The first row's answer, and the statistics of the whole output."""
    from sirius_runtime.spec import to_json

    stats = to_json(output.stats)
    stats["tokens_per_second"] = output.stats.tokens_per_second
    stats["seconds_per_token"] = to_json(output.stats.seconds_per_token)
    stats["bytes_per_token"] = to_json(output.stats.bytes_per_token)
    return {
        "text": output.texts[0] if output.texts else None,
        "tokens": list(output.tokens[0]),
        "finish_reason": output.finish_reasons[0],
        "seed": output.seeds[0] if output.seeds else None,
        "stats": stats,
    }


def logprobs_json(output: Any) -> dict[str, Any]:
    """The log-probabilities of the first row's tokens, or {} where none were asked for. Minus
    infinity, which JSON can't express, becomes null.
    """
    if output.logprobs is None:
        return {}

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    tokens = [
        {
            "token": entry.token,
            "logprob": number(entry.logprob),
            "top": [{"token": token, "logprob": number(value)} for token, value in entry.top],
        }
        for entry in output.logprobs[0]
    ]
    return {"logprobs": tokens}


def summary(output: Any) -> str:
    """The statistics of an output on one line."""
    stats = output.stats
    parts = [
        f"{stats.tokens} tokens ({output.finish_reasons[0]})",
        f"{figure(stats.tokens_per_second, 1)} tokens/s",
    ]
    if stats.periods:
        parts += [
            f"{stats.periods} periods",
            f"AAL {figure(stats.aal, 2)}",
            f"{stats.corrections} corrections",
        ]
    if stats.looked_up:
        parts.append(f"{stats.looked_up_kept} of {stats.looked_up} looked-up tokens kept")
    if output.seeds:
        parts.append(f"seed {output.seeds[0]}")
    parts.append(
        f"density {stats.density:.3f}, effective {figure(stats.effective_density, 3)} of the full "
        "path's bytes"
    )
    return ", ".join(parts) + _fell_back(stats)


def _fell_back(stats: Any) -> str:
    """The clause that says why it decoded densely; empty where drafts paid."""
    fallback = stats.fallback
    if fallback is None:
        return ""
    return (
        f"; drafts did not pay ({fallback.advance:.1f} tokens in the time of {fallback.cost:.1f} "
        f"dense steps): decoded densely for {fallback.tokens} of {stats.tokens} tokens"
    )


def figure(value: float | None, places: int) -> str:
    """A number with so many decimal places; a dash for None, which was not measured."""
    return "-" if value is None else f"{value:.{places}f}"


def write_text(text: str) -> None:
    """Writes a model's text to stdout. A terminal would obey control characters, so they are
    replaced there; a file or a pipe gets the text unchanged.
    """
    say(without_controls(text) if sys.stdout.isatty() else text, end="")
