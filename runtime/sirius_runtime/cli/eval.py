"""`sirius eval`: answers a task's problems in several modes, and grades them in one table."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.options import add_loading, add_lookup, loading_options
from sirius_runtime.cli.results import figure
from sirius_runtime.command_line import (
    new_file_argument,
    path_argument,
    positive_number,
    read_path,
    real_number,
    say,
    whole_number,
)
from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.modes import DEFAULT, read_modes
from sirius_runtime.terminal import plain

if TYPE_CHECKING:
    from sirius_runtime.evaluation.evaluate import EvaluationOptions
    from sirius_runtime.evaluation.harness import HarnessScore
    from sirius_runtime.evaluation.problems import Task
    from sirius_runtime.evaluation.summary import Interval, Summary

GSM8K, HUMANEVAL, LM_EVAL = "gsm8k", "humaneval", "lm-eval:"
_GENERATION = (
    *("period", "tree_width", "verify_temperature", "confidence", "refresh", "fallback", "lookup"),
)
_WIDTH = 120  # greatest width of a table, in columns
T = TypeVar("T")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        required=True,
        metavar="TASK",
        help="a file of problems (FILE.jsonl, see docs/eval.md), gsm8k, humaneval, or lm-eval:NAME "
        "of lm-evaluation-harness",
    )
    parser.add_argument(
        "--data", type=path_argument, metavar="FILE", help="the problems of gsm8k or humaneval"
    )
    parser.add_argument(
        "--shots", type=path_argument, metavar="FILE", help="gsm8k: the file of worked examples"
    )
    parser.add_argument(
        "--include", type=path_argument, metavar="DIR", help="lm-eval: a folder of your own tasks"
    )
    parser.add_argument(
        "--num-shots", type=whole_number, metavar="N", help="worked examples (gsm8k: 8)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask each problem as a chat message in the model's template, without examples",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument(
        "--modes",
        default=DEFAULT,
        metavar="M,…",
        help=f"full, sparse, exact, sirius, sirius:THRESHOLD (default: {DEFAULT})",
    )
    parser.add_argument("--batch-size", type=positive_number, default=8, metavar="N")
    parser.add_argument("--limit", type=positive_number, metavar="N", help="the first N problems")
    parser.add_argument(
        "--seed", type=whole_number, help="shuffle the problems, before --limit takes the first N"
    )
    parser.add_argument("--max-new-tokens", type=positive_number, metavar="N")
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
    parser.add_argument(
        "--no-share-prefix",
        dest="share_prefix",
        action="store_false",
        help="prefill the common prefix of all prompts again for each prompt",
    )
    parser.add_argument(
        "--out",
        type=new_file_argument,
        metavar="FILE",
        help="write each result to this JSONL file; an interrupted run continues from it",
    )
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="humaneval: run the code of answers, in a child process with limits",
    )
    parser.add_argument(
        "--code-seconds",
        type=positive_number,
        default=10,
        metavar="S",
        help="time limit for the code of one answer, in seconds (10)",
    )
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON list, no table")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.evaluation.evaluate import EvaluationOptions, evaluate
    from sirius_runtime.loading import load

    options = EvaluationOptions(
        modes=read_modes(args.modes),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        seed=args.seed,
        generation={
            name: value for name in _GENERATION if (value := getattr(args, name)) is not None
        },
        share_prefix=args.share_prefix,
        allow_code_execution=args.allow_code_execution,
    )
    if args.task.startswith(LM_EVAL):
        _run_harness(args, options)
        return
    task, loading = _task(args), _loading(args)
    model = load(**loading)
    identity = {"artifact": _identity(args.artifact), "dtype": args.dtype, "backend": args.backend}
    with _progress("answers") as progress:
        summaries = evaluate(
            model, task, options, out=args.out, identity=identity, progress=progress
        )
    if args.json:
        say(json.dumps([asdict(summary) for summary in summaries]))
    else:
        title = f"{task.name}: {summaries[0].problems} problems"
        _print_table(title, _columns(summaries), summaries)
        say("none: texts without an answer. cut: texts that reached --max-new-tokens.")


def _run_harness(args: argparse.Namespace, options: EvaluationOptions) -> None:
    from sirius_runtime.evaluation.harness import evaluate_by_harness
    from sirius_runtime.loading import load

    unused = ("data", "shots", "out", "seed")
    if given := [f"--{name}" for name in unused if getattr(args, name) is not None]:
        raise ConfigError(
            f"lm-eval:… tasks do not take {', '.join(given)}, because the harness chooses their "
            "data and order; leave it out"
        )
    model = load(**_loading(args))
    with _progress("modes") as progress:
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
    columns: list[tuple[str, Callable[[HarnessScore], str]]] = [
        ("mode", lambda s: s.mode),
        ("task", lambda s: s.task),
        ("metric", lambda s: s.metric),
        ("value", lambda s: f"{s.value:.4f}"),
        ("stderr", lambda s: figure(s.stderr, 4)),
        ("AAL", lambda s: figure(s.aal, 2)),
        ("eff.", lambda s: figure(s.effective_density, 3)),
        ("tokens/s", lambda s: figure(s.tokens_per_second, 1)),
    ]
    _print_table(args.task, columns, scores, left=3)


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`. A memory budget has room for a batch, and for the prefix it shares."""
    loading = loading_options(args)
    return loading if args.memory_budget is None else {**loading, "rows": args.batch_size + 1}


def _task(args: argparse.Namespace) -> Task:
    from sirius_runtime.evaluation import problems
    from sirius_runtime.evaluation.execution import Limits

    known = args.task in (GSM8K, HUMANEVAL)
    if known and args.data is None:
        raise ConfigError(
            f"--task {args.task} needs its problems, which are not shipped: give --data FILE.jsonl"
        )
    unused = {
        "--data": not known and args.data is not None,
        "--shots": (args.task != GSM8K or args.chat) and args.shots is not None,
        "--num-shots": (args.task != GSM8K or args.chat) and args.num_shots is not None,
        "--system": args.system is not None and not args.chat,
        "--include": args.include is not None,
    }
    if any(unused.values()):
        flags = ", ".join(flag for flag, given in unused.items() if given)
        raise ConfigError(
            f"{flags} would have no effect here (--data is for gsm8k and humaneval, --shots and "
            "--num-shots are for gsm8k without --chat, --system is for --chat, --include is for "
            "lm-eval:…); leave it out"
        )
    chat = {"chat": args.chat, "system": args.system}
    if args.task == GSM8K:
        shots = 8 if args.num_shots is None else args.num_shots
        return problems.gsm8k(args.data, shots=args.shots, num_shots=shots, **chat)
    if args.task == HUMANEVAL:
        return problems.humaneval(args.data, limits=Limits(seconds=args.code_seconds), **chat)
    file = read_path(args.task)
    if not file.exists():
        raise ConfigError(
            f"--task {args.task}: there is no such task or file; give the path of a JSONL file, "
            f"{GSM8K}, {HUMANEVAL}, or {LM_EVAL}NAME of lm-evaluation-harness"
        )
    return problems.own_task(file, **chat)


def _identity(artifact: Path) -> str:
    """The SHA-256 of the manifest, which contains the hashes of all other files."""
    from sirius_runtime.artifact import MANIFEST, Artifact

    with Artifact.open(artifact, verify=False) as opened:
        return hashlib.sha256(opened.read_bytes(MANIFEST)).hexdigest()


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with the remaining time; yields the function that updates it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(file=sys.stderr))
    job = bar.add_task(what, total=None)

    def update(done: int, total: int) -> None:
        bar.start()  # not earlier: loading the model may print messages
        bar.update(job, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


def _columns(summaries: Sequence[Summary]) -> list[tuple[str, Callable[[Summary], str]]]:
    """The columns of a task's table, one row per mode."""
    stricts = any(summary.strict is not None for summary in summaries)
    strict: list[tuple[str, Callable[[Summary], str]]] = [("strict", lambda s: _percent(s.strict))]
    return [
        ("mode", lambda s: s.mode),
        ("accuracy (95%)", lambda s: _interval(s.accuracy)),
        *(strict if stricts else ()),
        ("less full (95%)", lambda s: _interval(s.difference, sign="+")),
        ("none", lambda s: str(s.unanswered)),
        ("cut", lambda s: str(s.cut)),
        ("AAL", lambda s: figure(s.aal, 2)),
        ("density", lambda s: f"{s.density:.3f}"),
        ("eff.", lambda s: f"{s.effective_density:.3f}"),
        ("tokens/s", lambda s: figure(s.tokens_per_second, 1)),
        ("x full", lambda s: figure(s.speed, 2)),
    ]


def _print_table(
    title: str,
    columns: Sequence[tuple[str, Callable[[T], str]]],
    items: Sequence[T],
    left: int = 1,
) -> None:
    """Prints one row per item; the first `left` columns are aligned to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=None, title_justify="left", pad_edge=False)
    for index, (name, _) in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for item in items:
        table.add_row(*(plain(cell(item)) for _, cell in columns))
    console = Console(highlight=False, markup=False, width=_WIDTH)
    with console.capture() as capture:
        console.print(table)
    say(capture.get(), end="")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    mean, low, high = (f"{100 * v:{sign}.1f}" for v in (interval.mean, interval.low, interval.high))
    return f"{mean}% [{low}, {high}]"


COMMAND = Command(
    "grade a task's answers in several modes: accuracy, advance, speed", _add_arguments, _run
)
