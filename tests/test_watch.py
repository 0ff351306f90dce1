"""Progress: parts are counted when they are done, and a bar is drawn on terminals only."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from sirius_compile.cli import progress
from sirius_compile.watch import each, unwatched


class Log:
    """A `Watch` that records its calls."""

    def __init__(self) -> None:
        self.told: list[object] = []

    @contextmanager
    def count(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        self.told.append((what, total))
        yield lambda: self.told.append("done")


def test_a_part_is_counted_once_it_is_done_with() -> None:
    log = Log()
    for part in each(log, "letters", "ab"):
        log.told.append(part)
    assert log.told == [("letters", 2), "a", "done", "b", "done"]


def test_a_bar_says_what_is_done_and_what_is_left() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with progress.Bar(console).count("write text", 48) as done:
        done()
    shown = text.getvalue()
    assert "write text" in shown
    assert "1/48" in shown
    assert "left:" in shown


def test_a_bar_of_bytes_says_how_fast_it_goes() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with progress.Bar(console).measure("write artifact", 8_000_000_000) as done:
        done(2_000_000_000)
    shown = text.getvalue()
    assert "write artifact" in shown
    assert "2.0/8.0 GB" in shown
    assert "left:" in shown


def test_no_bar_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    watch = progress.bar()
    assert watch is unwatched
    assert list(each(watch, "letters", "ab")) == ["a", "b"]
    assert capsys.readouterr().err == ""
