"""`sirius tune`: writes the fastest setting within a stated loss into the artifact's defaults."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.evaluating import (
    NOTES,
    add_results,
    add_task,
    answer,
    columns,
    interval_text,
    loading_of,
    print_table,
    read_graded_task,
)
from sirius_runtime.cli.options import add_loading
from sirius_runtime.command_line import new_file_argument, real_number, say
from sirius_runtime.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from sirius_runtime.evaluation.modes import Setting
    from sirius_runtime.evaluation.summary import Summary
    from sirius_runtime.evaluation.tune import Choice
    from sirius_runtime.spec import PeriodSpec


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task(parser)
    parser.add_argument(
        "--max-loss",
        type=real_number,
        required=True,
        metavar="POINTS",
        help="the accuracy that may be lost to mode full, in percentage points",
    )
    parser.add_argument(
        "--confident",
        action="store_true",
        help="require that of the whole 95%% interval of the loss, not only of its mean",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=V,…",
        help="values of one option to try, instead of the default ones; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=new_file_argument,
        metavar="MODEL.sirius",
        help="write the artifact with its new defaults here (default: replace it)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    add_results(parser, "--results")
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.artifact_writer import ArtifactWriter
    from sirius_runtime.evaluation.ablate import read_axes
    from sirius_runtime.evaluation.modes import Setting
    from sirius_runtime.evaluation.tune import choose, defaults, grid
    from sirius_runtime.loading import load
    from sirius_runtime.new_defaults import write_defaults
    from sirius_runtime.request import Mode

    if not 0.0 <= args.max_loss <= 100.0:
        raise ConfigError(f"--max-loss must be in 0..100 percentage points, got {args.max_loss}")
    out, force = args.out or args.artifact, args.force or args.out is None
    axes = read_axes(args.vary, research=False)
    task, loading = read_graded_task(args), loading_of(args)
    ArtifactWriter(out, force=force)  # refuses what can be refused now, before hours of answers
    model = load(**loading)
    settings = grid(model.program, axes)
    full = Setting(str(Mode.FULL))
    summaries = answer(args, model, task, (full, *settings), args.results)
    choice = choose(settings, summaries[1:], args.max_loss, confident=args.confident)
    period = defaults(model.program.period, choice.setting)
    write_defaults(args.artifact, out, period, force=force)
    if args.json:
        say(json.dumps(_json(args, summaries, choice, out)))
        return
    print_table(
        f"{task.name}: {summaries[0].problems} problems",
        [("mode", lambda s: s.mode), *columns(summaries)],
        summaries,
    )
    say(NOTES)
    say(_reason(args, settings, summaries, choice))
    say(f"written to {out}: {_defaults(period, choice.setting)}")


def _reason(
    args: argparse.Namespace,
    settings: Sequence[Setting],
    summaries: Sequence[Summary],
    choice: Choice,
) -> str:
    """Why this setting was chosen, and how sure that is."""
    from sirius_runtime.evaluation.tune import allowed, loss

    pairs = list(zip(settings, summaries[1:], strict=True))
    within = sum(allowed(*pair, args.max_loss, confident=args.confident) for pair in pairs)
    measure = "95% interval" if args.confident else "mean"
    lines = [
        f"{within} of {len(pairs)} settings lose at most {args.max_loss:g} points to full (by the "
        f"{measure} over {summaries[0].problems} problems)."
    ]
    own = choice.summary
    speed = "unknown" if own.speed is None else f"{own.speed:.2f} x full"
    if choice.pays:
        lines.append(
            f"The fastest of them is {choice.setting.name}: {speed}, less full "
            f"{interval_text(own.difference, sign='+')}."
        )
    else:
        lines.append(
            "Drafting does not pay: none of them is faster than full. The default becomes "
            f"{choice.setting.name} ({speed}), whose tokens are the full path's; runs decode "
            "densely where drafts do not pay."
        )
    if choice.setting.mode != "exact" and (worst := loss(own, confident=True)) > args.max_loss:
        lines.append(
            f"The interval does not exclude a loss of {worst:.1f} points: give more problems, or "
            "--confident."
        )
    return "\n".join(lines)


def _defaults(period: PeriodSpec, setting: Setting) -> str:
    """The defaults that were set."""
    names = ("mode", *(name for name, _ in setting.options))
    return ", ".join(f"{name.replace('_', ' ')} {getattr(period, name)}" for name in names)


def _json(
    args: argparse.Namespace, summaries: Sequence[Summary], choice: Choice, out: Path
) -> dict[str, object]:
    return {
        "settings": [asdict(summary) for summary in summaries],
        "max_loss": args.max_loss,
        "confident": args.confident,
        "chosen": choice.setting.name,
        "pays": choice.pays,
        "written": str(out),
    }


COMMAND = Command(
    "write the fastest setting within a stated loss into the artifact's defaults",
    _add_arguments,
    _run,
    epilog="Runs mode exact and mode sirius in every combination of the varied options. The file "
    "is written under a temporary name and renamed. See docs/tune.md.",
)
