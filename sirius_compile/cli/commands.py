"""The table of commands, and the entry point of `sirius-compile`.

A command is a function with typer's annotations; its docstring is its help. Progress goes to
stderr, results to stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from sirius_compile.cli.compile import compile_artifact
from sirius_compile.cli.onnx import add_onnx_graphs
from sirius_runtime.command_line import finish

PROGRAM = "sirius-compile"
Command = Callable[..., Any]

COMMANDS: Mapping[str, Command] = {
    "onnx": add_onnx_graphs,
}
"""Commands by the first word of a command line. Any other first word is a model to compile; a
folder with a command's name is given as ``./onnx``.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return finish(PROGRAM, lambda: _run(given))


def _run(arguments: Sequence[str]) -> None:
    """Runs a command. Always raises SystemExit, as typer does."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    name, *rest = arguments or [""]
    if name in COMMANDS:
        app.command()(COMMANDS[name])
        app(rest, prog_name=f"{PROGRAM} {name}")
    else:
        app.command(epilog=_other_commands())(compile_artifact)
        app(list(arguments), prog_name=PROGRAM)


def _other_commands() -> str:
    named = ", ".join(f"{PROGRAM} {name} --help" for name in COMMANDS)
    return f"Other commands: {named}."
