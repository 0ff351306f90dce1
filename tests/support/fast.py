"""Which of a test's cases each suite runs.

`make test` runs the cases without a mark. `make test-gate` runs those marked `gate`: further cases
of what the fast suite shows once, and tests whose compilation takes seconds. `make test-all` runs
both, and the cases marked `slow`. What has both marks is slow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(
    cases: Iterable[object], fast: Collection[object], gate: Collection[object] = ()
) -> list[Any]:
    """These cases: the `fast` ones as they are, those of `gate` marked so, the others marked slow.

    Each of `fast` and `gate` is a case.
    """
    every = list(cases)
    assert all(case in every for case in (*fast, *gate))
    return [
        case
        if case in fast
        else _marked(case, pytest.mark.gate if case in gate else pytest.mark.slow)
        for case in every
    ]


def gate_but(cases: Iterable[object], fast: Collection[object]) -> list[Any]:
    """These cases: the `fast` ones, each of which is one, as they are, the others marked `gate`."""
    every = list(cases)
    return slow_but(every, fast, [case for case in every if case not in fast])


def _marked(case: object, mark: pytest.MarkDecorator) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=mark)
