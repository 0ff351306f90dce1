"""Checks results before they are timed, at the timed shapes.

An operator is compared with its plain-PyTorch reference on the same values. A whole step runs once
with each of its operators compared on the step's own inputs; the timed form (recorded, compiled, by
a peer) must then give that run's result. `sirius_compile.operator_check` derives the tolerance:
rounding, plus the units at the border of a selection. So a tie is no error, but a wrong block of
columns is. Results of several layers may differ by √(2 · layers) times as much, because attention
and MLP of each layer add errors.

A wrong result ends the command, with a message that names the row, the error and the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from sirius_compile.operator_check import (
    Difference,
    OperatorCheck,
    compare,
    name_of,
    relative_error,
    tolerance,
)
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.rewrite import with_kernels
from sirius_runtime.errors import SiriusError
from sirius_runtime.model import SiriusModel

TOKENS = 24
"""New tokens of an answer whose operators are compared: enough periods for all shapes."""


class WrongResultError(SiriusError):
    """A timed function's result differs from the reference: a bug."""


def wrong(row: str, said: object) -> WrongResultError:
    """The error for a row."""
    return WrongResultError(f"wrong, so not timed: {row}: {said}")


def call(
    row: str, operator: Callable[..., Any], arguments: Sequence[Any], found: Any = None
) -> Difference:
    """Checks an operator's call. `found`: the result, if another function is timed."""
    difference = compare(operator, arguments, found)
    if not difference.right:
        raise wrong(row, difference)
    return difference


def near(row: str, found: Tensor, wanted: Tensor, layers: int = 0) -> None:
    """Checks a result that may differ by rounding only, over `layers` layers."""
    allowed = tolerance(wanted.dtype) * max(1.0, (2 * layers) ** 0.5)
    difference = Difference(relative_error(found.to(wanted.device), wanted), allowed)
    if not difference.right:
        raise wrong(row, difference)


def equal(row: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Checks that tokens are the same."""
    if list(found) != list(wanted):
        same = sum(a == b for a, b in zip(found, wanted, strict=False))
        raise wrong(
            row, f"{same} of {max(len(found), len(wanted))} tokens are the reference's, all must be"
        )


@contextmanager
def operators(row: str, backend: EagerBackend) -> Iterator[None]:
    """A context in which a back end's entries run operator by operator, each compared."""

    def look(node: fx.Node, difference: Difference) -> None:
        if not difference.right:
            name = name_of(node.target)
            raise wrong(f"{row}, {name} ({node.name})", difference)

    checks: dict[str, OperatorCheck] = {}

    @torch.inference_mode()
    def run(entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bound = backend._entries[entry]
        if entry not in checks:
            on_cpu = backend.device.type == "cpu"
            module = with_kernels(bound.module) if on_cpu else bound.module
            checks[entry] = OperatorCheck(module, look)
        return backend._named(entry, checks[entry].run(*bound.arguments(inputs)))

    before = backend.run
    backend.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        backend.run = before  # type: ignore[method-assign]


def generation(row: str, model: SiriusModel, prompt: Any, **options: Any) -> None:
    """Checks the operators while generating an answer's first tokens."""
    assert isinstance(model.backend, EagerBackend)
    with operators(row, model.backend):
        model.generate(prompt, max_new_tokens=TOKENS, fallback=False, **options)
