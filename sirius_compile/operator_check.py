"""Compares an operator's kernel with its reference on the same values.

The error is relative and per token: ‖found − wanted‖ / ‖wanted‖ over the last dimension; the
largest error of all tokens counts. If a kernel sets a share s of the columns to zero, the error is
√s; if it fills them with other columns' values, √(2s). Rounding may cause an error of at most the
sum of:

- Both sides round intermediate values (products, activation, their product, result) to the tensors'
  dtype, ROUNDINGS times together, each time by at most half its epsilon.
- Both sides sum products in float32, in different orders: a few times √TERMS epsilons of float32.

That is 3.1e-2 in bfloat16, 3.9e-3 in float16 and 3.1e-5 in float32. For attention, the second term
counts SCORES times, because its sums are exponents: the exponential of a large score has a larger
relative error than the score. `sirius_compile.self_check` has the errors measured on
Qwen2.5-Coder-0.5B.

If an operator selects units by a threshold or a count, rounding may move scores at the border to
either side. So the reference also runs with the border moved down and up: past scores that are
equal there, or by an epsilon. The allowed error grows by the error between these results and the
reference. If a reference itself rounds more than this (attention scores rounded to bfloat16 before
tanh), a result close to the reference in float32 is accepted, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sirius_runtime.kernels.native import references
from sirius_runtime.nested import LARGEST, is_nested
from sirius_runtime.operators import OPERATORS

ROUNDINGS = 8
TERMS = 1 << 14
"""Terms of a sum: about as many as the widest layers of today's models have."""

SCORES = 5
"""Factor on attention's summation error, which was 2.1e-5 for a real model's keys in float32."""

STEP = 1 / LARGEST
"""Error allowed in addition for products with nested weights. They round activations to integers,
so a tiny difference before the product may move an activation to the neighbouring integer."""

Operator = Callable[..., Any]


@dataclass(frozen=True)
class Difference:
    """The largest relative error of a kernel's result, and the largest that rounding explains."""

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"relative error {self.error:.1e}, at most {self.allowed:.1e} is allowed"


def tolerance(dtype: torch.dtype, name: str = "") -> float:
    """The relative error that rounding may cause; see the module's docstring."""
    half = torch.finfo(dtype).eps / 2
    sums = 4 * TERMS**0.5 * torch.finfo(torch.float32).eps / 2
    return ROUNDINGS * half + sums * (SCORES if "attention" in name else 1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a token. Infinite if shapes differ, or if `found` is not finite
    where `wanted` is. Tokens for which `wanted` is not finite are not compared.
    """
    if found.shape != wanted.shape:
        return float("inf")
    wide = wanted.double()
    if wide.ndim == 0:
        wide = wide[None]
    size = wide.norm(dim=-1)
    known = size.isfinite()
    # A row close to zero is measured against a fraction of the other rows' norm.
    least = 1e-3 * size[known].mean() if known.any() else size.new_zeros(())
    error = (found.double().view_as(wide) - wide).norm(dim=-1) / size.clamp(min=1e-30).clamp(least)
    worst = error[known].nan_to_num(nan=float("inf"))
    return float(worst.max()) if worst.numel() else 0.0


def name_of(target: Any) -> str:
    """The name of an operator or a kernel; empty for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname) if target.namespace == "sirius" else ""
    module = str(getattr(target, "__module__", ""))
    ours = module.startswith("sirius_runtime.") or getattr(target, "is_kernel", False)
    return str(getattr(target, "__name__", "")) if ours else ""


def compare(operator: Operator, arguments: Sequence[Any], found: Any = None) -> Difference:
    """Compares a kernel with its reference on these arguments. `found`: the kernel's result, if the
    kernel has run already. Both write the same values to caches among the arguments.
    """
    if found is None:
        found = operator(*arguments)
    name = name_of(operator)
    given = _tensors([*arguments, found])  # an embedding's only floating point tensor is its result
    dtype = next(t.dtype for t in given if t.dtype.is_floating_point)
    nested = any(is_nested(t) for t in given)
    with references():
        wanted = operator(*arguments)
        moved = [operator(*around) for around in _around(name, arguments)]
        between = _kept_between(*moved) if moved else 0
        # The kernel's and the reference's selection may lie on different sides of the border.
        allowed = tolerance(dtype, name) + nested * STEP
        allowed += sum(_error(other, wanted, between) for other in moved)
        error = _error(found, wanted, between)
        if error > allowed and dtype is not torch.float32:
            wide = [_mapped(value, _widened) for value in arguments]
            error = min(error, _error(found, operator(*wide), between))
    return Difference(error, allowed)


class OperatorCheck(fx.Interpreter):
    """Runs a graph with its kernels, and compares each with its reference. `found` is called with
    each compared node and its difference.
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
    """The largest relative error; infinite if counts differ by more than `between`."""
    worst = 0.0
    for one, other in zip(_tensors([found]), _tensors([wanted]), strict=True):
        if other.dtype.is_floating_point:
            worst = max(worst, relative_error(one, other))
        elif bool(((one - other).abs() > between).any()):
            worst = float("inf")
    return worst


def _kept_between(low: Any, high: Any) -> int:
    """The largest difference between the counts in two results."""
    counts = [
        [t for t in _tensors([result]) if not t.dtype.is_floating_point] for result in (low, high)
    ]
    return max((int((a - b).abs().max()) for a, b in zip(*counts, strict=True)), default=0)


def _around(name: str, arguments: Sequence[Any]) -> list[list[Any]]:
    """The arguments with the selection's border moved down and up; empty if nothing is selected."""
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
    # All scores equal to the border, and one more that may have been rounded across it.
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
