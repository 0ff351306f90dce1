"""Which of a test's cases the fast suite runs; `make test-all` runs all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[object], fast: Collection[object]) -> list[Any]:
    """These cases, marked slow where they are not among the fast ones, each of which is a case."""
    every = list(cases)
    assert all(case in every for case in fast)
    return [case if case in fast else slow(case) for case in every]


def slow(case: object) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
