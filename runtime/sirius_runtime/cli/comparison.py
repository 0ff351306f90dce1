"""`sirius run --compare`: modes full, sparse and sirius side by side."""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
from typing import Any

from sirius_runtime.cli.results import figure, output_json
from sirius_runtime.command_line import say
from sirius_runtime.terminal import without_controls


def print_comparison(model: Any, prompt: str, options: dict[str, Any], as_json: bool) -> None:
    """Answers the prompt in the three modes; prints the texts and a table of their statistics."""
    from sirius_runtime.compare import compare

    runs = compare(model, prompt, **options)
    if as_json:
        document = {
            str(run.mode): output_json(run.output)
            | {"same_tokens": run.same_tokens, "speed": run.speed}
            for run in runs
        }
        say(json.dumps(document))
        return
    width = shutil.get_terminal_size().columns
    for line in side_by_side([f"--- {r.mode} ---\n{_shown(r.output)}" for r in runs], width):
        say(line)
    say("")
    header = ("mode", "tokens", "as full", "AAL", "density", "eff.", "tokens/s", "x full")
    rows = [header] + [_comparison_row(run) for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        say("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))


def _shown(output: Any) -> str:
    text = str(output.texts[0] if output.texts else output.tokens[0]).strip("\n")
    return without_controls(text)


def side_by_side(texts: list[str], width: int) -> list[str]:
    """The texts as columns of equal width, each line wrapped to its column."""
    column = max((width - 2 * (len(texts) - 1)) // len(texts), 16)
    wrapped = [
        [
            part
            for line in text.splitlines()
            for part in textwrap.wrap(line, column, drop_whitespace=False) or [""]
        ]
        for text in texts
    ]
    return [
        "  ".join(cell.ljust(column) for cell in row).rstrip()
        for row in itertools.zip_longest(*wrapped, fillvalue="")
    ]


def _comparison_row(run: Any) -> tuple[str, ...]:
    stats = run.output.stats
    return (
        str(run.mode),
        str(stats.tokens),
        str(run.same_tokens),
        figure(stats.aal, 2),
        "1.000" if run.mode == "full" else f"{stats.density:.3f}",
        figure(stats.effective_density, 3),
        figure(stats.tokens_per_second, 1),
        figure(run.speed, 2),
    )
