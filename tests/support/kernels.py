"""CPU kernels under test: which this machine can build, and proof that it was they that ran."""

from __future__ import annotations

from typing import Any

import pytest

from sirius_runtime.errors import BackendError
from sirius_runtime.kernels import attention, linear, mlp
from sirius_runtime.kernels.build import InstructionSet, compiler, instruction_sets

SETS = list(InstructionSet)

_REFERENCES = {
    attention: ["cached_attention", "block_attention"],
    linear: ["linear", "linears", "sparse_linear"],
    mlp: [
        *("dense_mlp", "dense_mlp_statistic", "dense_mlp_activity", "topk_mlp", "cats_mlp"),
        *("griffin_mlp", "griffin_cats_mlp"),
    ],
}


class Fallback(Exception):  # noqa: N818  (not an error: what a test expects, or not)
    """A reference was asked for."""


def forbid_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, an operator for which no kernel serves raises `Fallback`."""

    def refuse(*_: Any) -> None:
        raise Fallback

    for module, names in _REFERENCES.items():
        for name in names:
            monkeypatch.setattr(module.reference, name, refuse)


def require_compiler() -> None:
    """Skips the test, and says why, where there is no C++ compiler."""
    try:
        compiler()
    except BackendError as error:
        pytest.skip(str(error))


def require(isa: InstructionSet) -> None:
    """Skips the test, and says why, where kernels for `isa` can't be built or run."""
    if isa not in instruction_sets():
        pytest.skip(f"this CPU has no {isa}")
    require_compiler()
