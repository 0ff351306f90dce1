"""No number of a wrong result: what a benchmark times is compared first, at the timed shapes.

An operator is compared with its plain-PyTorch reference on the same values; a whole step is run
once with each of its operators compared on the step's own inputs, and what is timed (recorded,
compiled, by a peer) must give that run's result. How much may differ is derived in
`sirius_compile.operator_check`: what rounding makes, and where neurons or channels are chosen, what
those at the border add: a tie is no error, a wrong block of columns is. Results of several layers
may differ by √(2 · layers) times as much: each layer's two blocks add errors of their own.

What is wrong ends the command, with a message that names the row, what was found and what is
allowed.
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
"""New tokens of an answer whose operators are compared: some periods, and enough for all shapes."""


class WrongResultError(SiriusError):
    """What would have been timed computes something else than the reference: a bug."""


def wrong(row: str, said: object) -> WrongResultError:
    """The error for a row."""
    return WrongResultError(f"wrong, so not timed: {row}: {said}")


def call(
    row: str, operator: Callable[..., Any], arguments: Sequence[Any], found: Any = None
) -> Difference:
    """An operator's call; `found`: its result, where what is timed is another function."""
    difference = compare(operator, arguments, found)
    if not difference.right:
        raise wrong(row, difference)
    return difference


def near(row: str, found: Tensor, wanted: Tensor, layers: int = 0) -> None:
    """A result that rounding alone may have changed, in as many layers."""
    allowed = tolerance(wanted.dtype) * max(1.0, (2 * layers) ** 0.5)
    difference = Difference(relative_error(found.to(wanted.device), wanted), allowed)
    if not difference.right:
        raise wrong(row, difference)


def equal(row: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Tokens that must be the same."""
    if list(found) != list(wanted):
        same = sum(a == b for a, b in zip(found, wanted, strict=False))
        raise wrong(
            row, f"{same} of {max(len(found), len(wanted))} tokens are the reference's, all must be"
        )


@contextmanager
def operators(row: str, backend: EagerBackend) -> Iterator[None]:
    """Within it, the entries of a back end run operator by operator, each compared."""

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
    """The operators of an answer's first tokens."""
    assert isinstance(model.backend, EagerBackend)
    with operators(row, model.backend):
        model.generate(prompt, max_new_tokens=TOKENS, fallback=False, **options)
