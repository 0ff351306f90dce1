"""The table of commands, and the entry point of `sirius`.

Tokens and JSON go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from typing import TextIO

from sirius_runtime.cli import (
    ablate,
    chat,
    eval,
    export_onnx,
    inspect,
    run,
    serve,
    trace,
    tune,
    verify,
)
from sirius_runtime.cli.command import Command
from sirius_runtime.command_line import finish, tell
from sirius_runtime.terminal import plain

COMMANDS: Mapping[str, Command] = {
    "run": run.COMMAND,
    "chat": chat.COMMAND,
    "serve": serve.COMMAND,
    "inspect": inspect.COMMAND,
    "verify": verify.COMMAND,
    "eval": eval.COMMAND,
    "ablate": ablate.COMMAND,
    "tune": tune.COMMAND,
    "trace": trace.COMMAND,
    "export-onnx": export_onnx.COMMAND,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the console script `sirius`; returns the exit code."""

    def command() -> None:
        parsed = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning
            COMMANDS[parsed.command].run(parsed)

    return finish("sirius", command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sirius", description="Run and inspect Sirius artifacts.")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        command.add_arguments(parsers.add_parser(name, help=command.help, epilog=command.epilog))
    return parser


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning as one line on stderr, without the source location that Python adds."""
    tell(f"sirius: warning: {plain(str(message))}")
