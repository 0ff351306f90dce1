"""Runs the two console scripts in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
        return self.script("sirius-compile", sirius_compile.cli.main, arguments)

    def run(self, *arguments: object) -> Finished:
        """`sirius arguments…`"""
        return self.call(lambda: sirius_runtime.cli.main(list(map(str, arguments))))

    def script(
        self, name: str, main: Callable[[], int | None], arguments: Sequence[object]
    ) -> Finished:
        """`name arguments…`, of a script that reads `sys.argv`."""
        self._monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return self.call(main)

    def call(self, main: Callable[[], int | None]) -> Finished:
        """What `main` leaves behind, whether it returns its code or exits with it."""
        try:
            code: int | str | None = main()
        except SystemExit as stop:
            code = stop.code
        return self._finished(int(code or 0))

    def _finished(self, code: int) -> Finished:
        captured = self._capsys.readouterr()
        return Finished(code, captured.out, captured.err)
