"""What the commands that answer tasks share: their arguments, the task, progress and tables."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sirius_runtime.cli.options import loading_options
from sirius_runtime.cli.results import figure
from sirius_runtime.command_line import (
    new_file_argument,
    path_argument,
    positive_number,
    read_path,
    say,
    whole_number,
)
from sirius_runtime.errors import ConfigError
from sirius_runtime.terminal import plain

if TYPE_CHECKING:
    from sirius_runtime.evaluation.evaluate import EvaluationOptions
    from sirius_runtime.evaluation.modes import Setting
    from sirius_runtime.evaluation.problems import Task
    from sirius_runtime.evaluation.summary import Interval, Summary
    from sirius_runtime.model import SiriusModel

GSM8K, HUMANEVAL, LM_EVAL = "gsm8k", "humaneval", "lm-eval:"
NOTES = (
    "none: texts without an answer. cut: texts that reached --max-new-tokens. corr.: corrections "
    "per 100 tokens."
)
_WIDTH = 200  # greatest width of a table, in columns
T = TypeVar("T")


def add_task(parser: argparse.ArgumentParser) -> None:
    """Options for the problems and their prompts, and how they are run."""
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
    parser.add_argument("--batch-size", type=positive_number, default=8, metavar="N")
    parser.add_argument("--limit", type=positive_number, metavar="N", help="the first N problems")
    parser.add_argument(
        "--seed", type=whole_number, help="shuffle the problems, before --limit takes the first N"
    )
    parser.add_argument("--max-new-tokens", type=positive_number, metavar="N")
    parser.add_argument(
        "--no-share-prefix",
        dest="share_prefix",
        action="store_false",
        help="prefill the common prefix of all prompts again for each prompt",
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


def add_results(parser: argparse.ArgumentParser, flag: str = "--out") -> None:
    """The option for the file of results."""
    parser.add_argument(
        flag,
        type=new_file_argument,
        metavar="FILE",
        help="write each result to this JSONL file; an interrupted run continues from it",
    )


def loading_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`. A memory budget has room for a batch, and for the prefix it shares."""
    loading = loading_options(args)
    return loading if args.memory_budget is None else {**loading, "rows": args.batch_size + 1}


def read_task(args: argparse.Namespace) -> Task:
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


def read_graded_task(args: argparse.Namespace) -> Task:
    """As `read_task`, for commands that grade the answers themselves."""
    if args.task.startswith(LM_EVAL):
        raise ConfigError(
            f"--task {args.task}: only sirius eval runs lm-evaluation-harness; give gsm8k, "
            "humaneval or a file"
        )
    return read_task(args)


def evaluation_options(
    args: argparse.Namespace, modes: Sequence[Setting], generation: Mapping[str, Any]
) -> EvaluationOptions:
    """The options of `add_task`, for these settings."""
    from sirius_runtime.evaluation.evaluate import EvaluationOptions

    return EvaluationOptions(
        modes=tuple(modes),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        seed=args.seed,
        generation=generation,
        share_prefix=args.share_prefix,
        allow_code_execution=args.allow_code_execution,
    )


def answer(
    args: argparse.Namespace,
    model: SiriusModel,
    task: Task,
    modes: Sequence[Setting],
    out: Path | None,
    generation: Mapping[str, Any] | None = None,
) -> list[Summary]:
    """Runs `evaluate` with a progress bar. out: the file of results."""
    from sirius_runtime.evaluation.evaluate import evaluate

    options = evaluation_options(args, modes, generation or {})
    identity = {
        "artifact": identity_of(args.artifact),
        "dtype": args.dtype,
        "backend": args.backend,
    }
    with progress_bar("answers") as progress:
        return evaluate(model, task, options, out=out, identity=identity, progress=progress)


def identity_of(artifact: Path) -> str:
    """The SHA-256 of the manifest, which contains the hashes of all other files."""
    from sirius_runtime.artifact import MANIFEST, Artifact

    with Artifact.open(artifact, verify=False) as opened:
        return hashlib.sha256(opened.read_bytes(MANIFEST)).hexdigest()


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
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


def columns(summaries: Sequence[Summary]) -> list[tuple[str, Callable[[Summary], str]]]:
    """The columns of a task's table after its first ones, which name the settings."""
    stricts = any(summary.strict is not None for summary in summaries)
    strict: list[tuple[str, Callable[[Summary], str]]] = [("strict", lambda s: _percent(s.strict))]
    return [
        ("accuracy (95%)", lambda s: interval_text(s.accuracy)),
        *(strict if stricts else ()),
        ("less full (95%)", lambda s: interval_text(s.difference, sign="+")),
        ("none", lambda s: str(s.unanswered)),
        ("cut", lambda s: str(s.cut)),
        ("AAL", lambda s: figure(s.aal, 2)),
        ("corr.", lambda s: figure(s.corrections, 1)),
        ("density", lambda s: f"{s.density:.3f}"),
        ("eff.", lambda s: f"{s.effective_density:.3f}"),
        ("tokens/s", lambda s: figure(s.tokens_per_second, 1)),
        ("x full", lambda s: figure(s.speed, 2)),
    ]


def print_table(
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


def interval_text(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    mean, low, high = (f"{100 * v:{sign}.1f}" for v in (interval.mean, interval.low, interval.high))
    return f"{mean}% [{low}, {high}]"
