"""Replaces torch's control-flow operators by Python's, for graphs that run operator by operator.

    Before                                       After
    higher_order.while_loop(goes, body, c, x)    while goes(*c, *x): c = body(*c, *x)
    higher_order.cond(which, yes, no, x)         (yes if which else no)(*x)

At each call, torch's operators check for tracing, autograd and vmap, over as many arguments as the
model has weights. None of these is active here. The host reads `which` from the device in both
forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from sirius_runtime.errors import ArtifactError

_MOST_STEPS = 4096
"""More than any period has levels."""

Branch = Callable[..., Sequence[Tensor]]


def as_python(graph: fx.Graph) -> None:
    """Rewrites the loops and conditions of a graph in place."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _PYTHON.get(node.target, node.target)


def while_loop(
    goes_on: Callable[..., Tensor], body: Branch, carried: Sequence[Tensor], given: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Runs `body` while `goes_on` returns true (a bool tensor of one element); returns the carried
    values.

    Raises ArtifactError for a loop of more than `_MOST_STEPS` steps: a period's loop drafts one
    level per step.
    """
    for _ in range(_MOST_STEPS):
        if not goes_on(*carried, *given):
            return carried
        carried = body(*carried, *given)
    raise ArtifactError(
        f"a loop of a graph has not ended after {_MOST_STEPS} steps; the artifact may be damaged: "
        "compile the model again"
    )


def cond(which: Tensor, yes: Branch, no: Branch, given: Sequence[Tensor] = ()) -> Sequence[Tensor]:
    """Runs the branch that `which` (a bool tensor of one element) chooses; returns its result."""
    return (yes if which else no)(*given)


_PYTHON = {
    torch.ops.higher_order.while_loop: while_loop,
    torch.ops.higher_order.cond: cond,
}
