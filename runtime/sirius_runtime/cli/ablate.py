"""`sirius ablate`: what each option does to accuracy and speed, one at a time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.evaluating import (
    NOTES,
    add_results,
    add_task,
    answer,
    columns,
    loading_of,
    print_table,
    read_graded_task,
)
from sirius_runtime.cli.options import add_loading
from sirius_runtime.command_line import new_file_argument, say
from sirius_runtime.evaluation.modes import NUMBERS, RESEARCH

if TYPE_CHECKING:
    from sirius_runtime.evaluation.ablate import Row
    from sirius_runtime.evaluation.summary import Summary


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task(parser)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=V,…",
        help=f"values of one option; may be repeated. Options: {', '.join((*NUMBERS, *RESEARCH))} "
        "(default: several values of all that the artifact has)",
    )
    parser.add_argument(
        "--mode", help="the mode whose options vary: sirius or exact (default: the artifact's)"
    )
    parser.add_argument(
        "--plot",
        type=new_file_argument,
        metavar="FILE",
        help="draw accuracy over speed and over effective density to this .png or .svg",
    )
    add_results(parser)
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON list, no table")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.evaluation.ablate import read_axes, rows, settings
    from sirius_runtime.evaluation.pareto import check_plot, plot
    from sirius_runtime.loading import load
    from sirius_runtime.request import check_default_mode

    axes = read_axes(args.vary)
    if args.mode is not None:
        check_default_mode(args.mode, flag="--")
    if args.plot is not None:
        check_plot(args.plot)
    task, loading = read_graded_task(args), loading_of(args)
    model = load(**loading)
    table = rows(model.program, axes, args.mode)
    summaries = answer(args, model, task, settings(table), args.out)
    by_name = {summary.mode: summary for summary in summaries}
    found = [(row, by_name[row.setting.name]) for row in table]
    title = f"{task.name}: {summaries[0].problems} problems"
    if args.plot is not None:
        plot(found, f"{args.artifact.name}, {Path(title).name}", args.plot)
    if args.json:
        say(json.dumps([_json(*pair) for pair in found]))
        return
    first: list[tuple[str, Callable[[tuple[Row, Summary]], str]]] = [
        ("option", lambda pair: pair[0].axis),
        ("value", lambda pair: pair[0].value + "*" * pair[0].default),
    ]
    others = [(name, _of_summary(cell)) for name, cell in columns(summaries)]
    print_table(title, [*first, *others], found, left=2)
    say(f"*: the artifact's default, measured once. {NOTES}")


def _of_summary(
    cell: Callable[[Summary], str],
) -> Callable[[tuple[Row, Summary]], str]:
    return lambda pair: cell(pair[1])


def _json(row: Row, summary: Summary) -> dict[str, object]:
    return {"option": row.axis, "value": row.value, "default": row.default} | asdict(summary)


COMMAND = Command(
    "show what each option does to accuracy and speed, one at a time",
    _add_arguments,
    _run,
    epilog="kv_rewriting=off and rollback=period change the algorithm, for measurement alone; no "
    "other command has them. See docs/tune.md.",
)
