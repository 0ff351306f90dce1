"""Runs the two console scripts in this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

import sirius_compile.cli
import sirius_runtime.cli


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Cli:
    """Calls `sirius-compile` and `sirius` with arguments, and captures what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def compile(self, *arguments: object) -> Finished:
        """`sirius-compile arguments…`"""
        self._monkeypatch.setattr(sys, "argv", ["sirius-compile", *map(str, arguments)])
        try:
            sirius_compile.cli.main()
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        return self._finished(int(code or 0))

    def run(self, *arguments: object) -> Finished:
        """`sirius arguments…`"""
        try:
            code: int | str | None = sirius_runtime.cli.main(list(map(str, arguments)))
        except SystemExit as stop:  # argparse
            code = stop.code
        return self._finished(int(code or 0))

    def _finished(self, code: int) -> Finished:
        captured = self._capsys.readouterr()
        return Finished(code, captured.out, captured.err)
