"""CPU kernels under test: which this machine can build, and proof that it was they that ran."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

from sirius_runtime.errors import BackendError
from sirius_runtime.kernels.build import InstructionSet, compiler, instruction_sets
from sirius_runtime.operators import OPERATORS

SETS = list(InstructionSet)


class Fallback(Exception):  # noqa: N818  (not an error: what a test expects, or not)
    """A reference was asked for."""


def forbid_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, an operator for which no kernel serves raises `Fallback`."""

    def refuse(*_: Any) -> None:
        raise Fallback

    for row in OPERATORS.values():
        if row.cpu is not None and not row.name.endswith("_moe"):  # which go expert by expert
            monkeypatch.setattr(f"{row.reference.__module__}.{row.name}", refuse)


def require_compiler() -> None:
    """Skips the test, and says why, where there is no C++ compiler."""
    if reason := _no_compiler(os.environ.get("CXX")):
        pytest.skip(reason)


@functools.cache
def _no_compiler(_chosen: str | None) -> str:
    """Why there is none, once for each that the environment names: a thousand tests ask."""
    try:
        compiler()
    except BackendError as error:
        return str(error)
    return ""


def require(isa: InstructionSet) -> None:
    """Skips the test, and says why, where kernels for `isa` can't be built or run."""
    if isa not in instruction_sets():
        pytest.skip(f"this CPU has no {isa}")
    require_compiler()
