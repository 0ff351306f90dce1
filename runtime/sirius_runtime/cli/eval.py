"""`sirius eval`: answers a task's problems in several modes, and grades them in one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.evaluating import (
    LM_EVAL,
    NOTES,
    add_results,
    add_task,
    answer,
    columns,
    evaluation_options,
    loading_of,
    print_table,
    progress_bar,
    read_task,
)
from sirius_runtime.cli.options import add_loading, add_lookup
from sirius_runtime.cli.results import figure
from sirius_runtime.command_line import real_number, say, whole_number
from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.modes import Setting, default_settings, read_modes

if TYPE_CHECKING:
    from sirius_runtime.evaluation.harness import HarnessScore

_GENERATION = (
    *("period", "tree_width", "verify_temperature", "confidence", "refresh", "fallback", "lookup"),
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task(parser)
    parser.add_argument(
        "--modes",
        metavar="M,…",
        help="full, sparse, exact, sirius, sirius:THRESHOLD, and the last three with options: "
        "exact:period=8:confidence=0.3 (default: full,sparse and the artifact's own mode)",
    )
    parser.add_argument("--period", type=whole_number, metavar="K", help="tokens per verification")
    parser.add_argument("--tree-width", type=whole_number, metavar="W")
    parser.add_argument("--verify-temperature", type=real_number, metavar="T")
    parser.add_argument("--confidence", type=real_number, metavar="C")
    parser.add_argument("--refresh", type=whole_number, metavar="N")
    parser.add_argument(
        "--fallback",
        action="store_const",
        const=True,
        help="decode densely while drafts do not pay, as `sirius run` does (default: always draft, "
        "so that no token depends on measured time)",
    )
    add_lookup(parser)
    add_results(parser)
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON list, no table")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.loading import load

    modes = None if args.modes is None else read_modes(args.modes)
    if args.task.startswith(LM_EVAL):
        _run_harness(args, modes)
        return
    task, loading = read_task(args), loading_of(args)
    model = load(**loading)
    modes = modes or default_settings(model.program.period.mode)
    summaries = answer(args, model, task, modes, args.out, _generation(args))
    if args.json:
        say(json.dumps([asdict(summary) for summary in summaries]))
    else:
        title = f"{task.name}: {summaries[0].problems} problems"
        print_table(title, [("mode", lambda s: s.mode), *columns(summaries)], summaries)
        say(NOTES)


def _generation(args: argparse.Namespace) -> dict[str, object]:
    return {name: value for name in _GENERATION if (value := getattr(args, name)) is not None}


def _run_harness(args: argparse.Namespace, modes: tuple[Setting, ...] | None) -> None:
    from sirius_runtime.evaluation.harness import evaluate_by_harness
    from sirius_runtime.loading import load

    unused = ("data", "shots", "out", "seed")
    if given := [f"--{name}" for name in unused if getattr(args, name) is not None]:
        raise ConfigError(
            f"lm-eval:… tasks do not take {', '.join(given)}, because the harness chooses their "
            "data and order; leave it out"
        )
    model = load(**loading_of(args))
    modes = modes or default_settings(model.program.period.mode)
    options = evaluation_options(args, modes, _generation(args))
    with progress_bar("modes") as progress:
        scores = evaluate_by_harness(
            model,
            args.task.removeprefix(LM_EVAL),
            options,
            num_shots=args.num_shots,
            chat=args.chat,
            system=args.system,
            include=None if args.include is None else str(args.include),
            progress=progress,
        )
    if args.json:
        say(json.dumps([asdict(score) for score in scores]))
        return
    table: list[tuple[str, Callable[[HarnessScore], str]]] = [
        ("mode", lambda s: s.mode),
        ("task", lambda s: s.task),
        ("metric", lambda s: s.metric),
        ("value", lambda s: f"{s.value:.4f}"),
        ("stderr", lambda s: figure(s.stderr, 4)),
        ("AAL", lambda s: figure(s.aal, 2)),
        ("eff.", lambda s: figure(s.effective_density, 3)),
        ("tokens/s", lambda s: figure(s.tokens_per_second, 1)),
    ]
    print_table(args.task, table, scores, left=3)


COMMAND = Command(
    "grade a task's answers in several modes: accuracy, advance, speed", _add_arguments, _run
)
