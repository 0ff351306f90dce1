"""Whether an operator's kernel computes what its reference computes, on the same values.

An error is relative and of a token: ‖found − wanted‖ / ‖wanted‖ over the last dimension, the
largest of all tokens. Zeros in place of a share s of a result's columns make it √s, other columns'
values √(2s). What rounding may make of it:

- Both sides round the numbers that follow from each other (products, activation, their product,
  result) to the tensors' type, ROUNDINGS of them together, each by at most half its epsilon.
- Sums of products are float32 in orders of their own: that leaves some epsilon √TERMS of float32.

That is 3.1e-2 in bfloat16, 3.9e-3 in float16 and 3.1e-5 in float32. In attention the sums are
exponents, where what is relative to a large score becomes relative to its exponential: it may be
SCORES times as much. Measured, over every operator of the layers of Qwen2.5-Coder-0.5B: see
`sirius_compile.self_check`.

Where an operator chooses by a threshold or a number, scores at the border may be rounded to either
side of it. The reference says what that comes to: its results with the border moved below and above
the scores that are equal there, or by an epsilon, differ from it by what the neurons or channels
between them add, and by so much more may the kernel's result differ. Where rounding alone is larger
than allowed (scores of attention rounded to bfloat16 before tanh, in a reference), being near the
reference in float32 is as good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sirius_runtime.kernels.native import references
from sirius_runtime.operators import OPERATORS

ROUNDINGS = 8
TERMS = 1 << 14
"""Of a sum: as many as the widest layers of today's models have, about."""

SCORES = 5
"""By how much more sums of attention may differ: real keys made 2.1e-5 of it in float32."""

Operator = Callable[..., Any]


@dataclass(frozen=True)
class Difference:
    """Of a kernel's result from its reference's: the largest relative error, and what rounding may
    make of it.
    """

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"relative error {self.error:.1e}, where rounding makes at most {self.allowed:.1e}"


def tolerance(dtype: torch.dtype, name: str = "") -> float:
    """The relative error that rounding may make of an operator's result: see the module's text."""
    half = torch.finfo(dtype).eps / 2
    sums = 4 * TERMS**0.5 * torch.finfo(torch.float32).eps / 2
    return ROUNDINGS * half + sums * (SCORES if "attention" in name else 1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest, over the tokens: infinite where shapes differ, or where `found` is not finite
    and `wanted` is. What `wanted` has no number for is not compared.
    """
    if found.shape != wanted.shape:
        return float("inf")
    wide = wanted.double()
    if wide.ndim == 0:
        wide = wide[None]
    size = wide.norm(dim=-1)
    known = size.isfinite()
    # A token's row that is all but nought, beside the others, is as large as a part of theirs.
    least = 1e-3 * size[known].mean() if known.any() else size.new_zeros(())
    error = (found.double().view_as(wide) - wide).norm(dim=-1) / size.clamp(min=1e-30).clamp(least)
    worst = error[known].nan_to_num(nan=float("inf"))
    return float(worst.max()) if worst.numel() else 0.0


def name_of(target: Any) -> str:
    """An operator's or a kernel's own name; empty for what is neither."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname) if target.namespace == "sirius" else ""
    module = str(getattr(target, "__module__", ""))
    ours = module.startswith("sirius_runtime.") or getattr(target, "is_kernel", False)
    return str(getattr(target, "__name__", "")) if ours else ""


def compare(operator: Operator, arguments: Sequence[Any], found: Any = None) -> Difference:
    """A kernel's result beside its reference's, on these arguments. `found`: the kernel's, where it
    has run. Caches among the arguments are written to, the same values twice.
    """
    if found is None:
        found = operator(*arguments)
    name = name_of(operator)
    dtype = next(t.dtype for t in _tensors(arguments) if t.dtype.is_floating_point)
    with references():
        wanted = operator(*arguments)
        moved = [operator(*around) for around in _around(name, arguments)]
        between = _kept_between(*moved) if moved else 0
        # Up to the kernel's own choice from the least, and to the reference's.
        allowed = tolerance(dtype, name) + sum(_error(other, wanted, between) for other in moved)
        error = _error(found, wanted, between)
        if error > allowed and dtype is not torch.float32:
            wide = [_mapped(value, _widened) for value in arguments]
            error = min(error, _error(found, operator(*wide), between))
    return Difference(error, allowed)


class OperatorCheck(fx.Interpreter):
    """Runs a graph with its kernels, and compares each as it runs: `found` gets the difference of
    every call, by its node.
    """

    def __init__(self, module: fx.GraphModule, found: Callable[[fx.Node, Difference], None]):
        super().__init__(module)
        self._found = found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and name_of(n.target) and not n.kwargs:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            assert callable(n.target)
            self._found(n, compare(n.target, arguments, value))
        return value


def _error(found: Any, wanted: Any, between: int = 0) -> float:
    """The largest relative error of the results; counts may differ by `between`."""
    worst = 0.0
    for one, other in zip(_tensors([found]), _tensors([wanted]), strict=True):
        if other.dtype.is_floating_point:
            worst = max(worst, relative_error(one, other))
        elif bool(((one - other).abs() > between).any()):
            worst = float("inf")
    return worst


def _kept_between(low: Any, high: Any) -> int:
    """By how many the counts of two results differ."""
    counts = [
        [t for t in _tensors([result]) if not t.dtype.is_floating_point] for result in (low, high)
    ]
    return max((int((a - b).abs().max()) for a, b in zip(*counts, strict=True)), default=0)


def _around(name: str, arguments: Sequence[Any]) -> list[list[Any]]:
    """The arguments with the border of what is kept an epsilon lower and higher; none for what
    chooses nothing.
    """
    row = OPERATORS.get(name)
    if row is None or row.scores is None:
        return []
    *rest, last = arguments
    scores = row.scores(*arguments)
    if row.has_threshold:
        step = torch.finfo(scores.dtype).eps * abs(last)
        return [[*rest, last - step], [*rest, last + step]]
    if row.shares_choice:
        scores = scores.sum(1)
    if last == scores.shape[-1]:
        return []
    border = scores.topk(last, -1).values[..., -1:]
    # All that are equal there, and one more that was rounded across.
    above, level = (scores > border).sum(-1), (scores >= border).sum(-1)
    low, high = int(above.min()) - 1, int(level.max()) + 1
    return [[*rest, max(1, low)], [*rest, min(scores.shape[-1], high)]]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        return [_mapped(element, function) for element in value]
    return function(value)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype.is_floating_point else value
    return torch.float32 if isinstance(value, torch.dtype) else value
