"""MLPs on the CPU: by a kernel if one takes the arguments, else `sirius_runtime.ops.mlp`.

The kernels choose the same neurons as the references, because they round products, activations and
means to the tensors' type as torch does. Between equal scores, where torch's ``topk`` leaves the
order open, they take the first neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import (
    ACTIVATIONS,
    BFLOAT16_TOKENS,
    MOST_TOKENS,
    TYPES,
    address,
    as_stored,
    check,
    fits,
    is_matrix,
    is_nested_by,
    is_vector,
    matrix,
    nested_matrix,
    vector,
)
from sirius_runtime.kernels.linear import linear
from sirius_runtime.kernels.native import kernels
from sirius_runtime.nested import Layout, is_nested
from sirius_runtime.ops import mlp as reference
from sirius_runtime.ops.chosen import spreading
from sirius_runtime.ops.linear import linear as plain_linear
from sirius_runtime.ops.linear import outputs_of
from sirius_runtime.ops.operands import Mlp, grouped


@dataclass(frozen=True)
class _Choice:
    """Which neurons a kernel uses: a list, the `keep` largest or those above a threshold; all of
    them by default. counts: whether it returns how many it used.
    """

    neurons: Tensor | None = None
    keep: int = 0
    threshold: float | None = None
    counts: bool = False
    product: bool = False
    """Whether act(gate x) · up x is returned too."""
    total: int = 0
    """The MLP's neurons, where its weights may be copies of the chosen ones' rows; else 0."""


_ALL = _Choice()
_MLP = Struct("=29q")  # MlpOperands<Matrix> of ``csrc/cpu.cpp``
_NESTED_MLP = Struct("=38q")  # MlpOperands<NestedMatrix>
_STATISTIC = Struct("=7q")


def _run(
    operator: str, choice: _Choice, x: Tensor, mlp: Mlp[Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """y [B, T, C], and counts [B] or z [B, T, I] if asked for; None if no kernel takes this."""
    gate, up, down, gate_bias, up_bias, down_bias, act, _ = mlp
    dtype = x.dtype
    kind, code = TYPES.get(dtype), ACTIVATIONS.get(act)
    if kind is None or code is None or x.ndim != 3:
        return None
    B, T, C = x.shape
    chooses = choice.neurons is not None or choice.keep > 0 or choice.threshold is not None
    if not chooses:  # every token uses all neurons: rows and tokens are the same
        B, T = 1, B * T
    if not (
        # Skipping neurons pays in bfloat16 for any number of rows.
        T <= MOST_TOKENS
        and fits(T, B, dtype, B * MOST_TOKENS if chooses else BFLOAT16_TOKENS)
        and _serves(mlp, dtype, choice)
        and is_vector(gate_bias, dtype)
        and is_vector(up_bias, dtype)
        and is_vector(down_bias, dtype)
    ):
        return None
    neurons = choice.neurons
    if neurons is not None:
        if neurons.dtype is not torch.int64 or neurons.ndim != 2 or neurons.numel() == 0:
            return None
        neurons = neurons.contiguous()
    library = kernels()
    if library is None:
        return None
    given = x.contiguous()
    y = torch.empty_like(given)
    extra = None
    if choice.counts:
        extra = given.new_empty(B, dtype=torch.int64)
    elif choice.product:
        extra = given.new_empty(*x.shape[:2], outputs_of(gate))
    threshold = choice.threshold
    kernel, operands = library.sirius_mlp, _MLP
    weights: tuple[int, ...] = (*matrix(gate), *matrix(up), *matrix(down))
    if is_nested(gate):
        kernel, operands = library.sirius_nested_mlp, _NESTED_MLP
        weights = (*nested_matrix(gate), *nested_matrix(up), *_nested_down(down, choice))
    status = kernel(
        kind,
        operands.pack(
            given.data_ptr(), B, T, C,
            *weights,
            *vector(gate_bias), *vector(up_bias), *vector(down_bias),
            address(neurons), *((0, 0) if neurons is None else neurons.shape),
            y.data_ptr(),
            address(extra if choice.counts else None),
            address(extra if choice.product else None),
            choice.total,
        ),
        code,
        choice.keep,
        threshold is not None,
        0.0 if threshold is None else as_stored(threshold, dtype),
        torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, operator)
    return y, extra


def _nested_down(down: Tensor, choice: _Choice) -> tuple[int, ...]:
    """A ``NestedMatrix``: by inputs, or a copy of its rows, which is not in groups."""
    if down.ndim == 4:
        return nested_matrix(down)
    plane, row, _ = down.stride()
    return (down.data_ptr(), down.shape[0], down.shape[2] * 2, choice.total, plane, row, 0)


def _serves(mlp: Mlp[Tensor], dtype: torch.dtype, choice: _Choice) -> bool:
    """Whether the kernels take the weights: all matrices of that type, or all nested."""
    rows = [weight for weight in (mlp.gate, mlp.up) if weight is not None]
    if not is_nested(mlp.gate):
        return all(is_matrix(weight, dtype) for weight in (*rows, mlp.down))
    return (
        all(is_nested_by(weight, Layout.BY_OUTPUTS) for weight in rows)
        and (
            is_nested_by(mlp.down, Layout.BY_INPUTS)
            or (choice.total > 0 and is_nested_by(mlp.down, Layout.BY_OUTPUTS))  # a copy of rows
        )
        and {weight.shape[0] for weight in rows} == {mlp.down.shape[0]}
    )


@grouped
def dense_mlp(x: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """As `reference.dense_mlp`."""
    done = _run("dense_mlp", _ALL, x, mlp) or _by_torch(x, mlp)
    return reference.dense_mlp(x, *mlp) if done is None else done[0]


def _by_torch(x: Tensor, mlp: Mlp[Tensor]) -> tuple[Tensor, Tensor] | None:
    """y [B, T, C] and z = act(gate x) · up x [B, T, I] for many tokens, by torch's matrix products
    and one kernel for the activation and the product between them. None without kernels.
    """
    library, code = kernels(), ACTIVATIONS.get(mlp.act)
    if library is None or code is None or x.dtype not in TYPES or x.device.type != "cpu":
        return None
    product = linear if is_nested(mlp.gate) else plain_linear
    z = product(x, mlp.gate, mlp.gate_bias)  # a new contiguous tensor: the kernel may overwrite it
    u = None if mlp.up is None else product(x, mlp.up, mlp.up_bias)
    status = library.sirius_gated(
        TYPES[z.dtype], code, z.data_ptr(), z.numel(), address(u), 0 if u is None else u.numel(),
        z.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, "dense_mlp")
    down = mlp.down if is_nested(mlp.down) else mlp.down.t()
    return product(z, down, mlp.down_bias), z


def _with_product(operator: str, x: Tensor, mlp: Mlp[Tensor]) -> tuple[Tensor, Tensor] | None:
    """y and z as in `_by_torch`, by one kernel if it takes the arguments."""
    y, z = _run(operator, _Choice(product=True), x, mlp) or (None, None)
    return _by_torch(x, mlp) if y is None or z is None else (y, z)


@grouped
def dense_mlp_statistic(x: Tensor, mlp: Mlp[Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.dense_mlp_statistic`."""
    library, done = kernels(), None
    if x.ndim == 3 and valid.dtype is torch.bool and valid.shape == x.shape[:2]:
        done = _with_product("dense_mlp_statistic", x, mlp)
    if done is None or library is None:
        return reference.dense_mlp_statistic(x, *mlp, valid)
    y, z = done
    valid = valid.contiguous()
    statistic = z.new_empty(z.shape[0], z.shape[2], dtype=torch.float32)
    status = library.sirius_statistic(
        TYPES[z.dtype],
        _STATISTIC.pack(z.data_ptr(), *z.shape, valid.data_ptr(), *valid.shape),
        statistic.data_ptr(),
        torch.get_num_threads(),
    )
    check(library, status, "dense_mlp_statistic")
    return y, statistic


@grouped
def dense_mlp_activity(x: Tensor, mlp: Mlp[Tensor]) -> tuple[Tensor, Tensor]:
    """As `reference.dense_mlp_activity`."""
    library = kernels()
    done = _with_product("dense_mlp_activity", x, mlp)
    if done is None or library is None:
        return reference.dense_mlp_activity(x, *mlp)
    y, z = done
    activity = torch.empty_like(z, dtype=torch.float32)
    status = library.sirius_activity(
        TYPES[z.dtype],
        z.data_ptr(),
        activity.data_ptr(),
        z.numel() // z.shape[-1],
        z.shape[-1],
        torch.get_num_threads(),
    )
    check(library, status, "dense_mlp_activity")
    return y, activity


def keeping(operator: str, names: Sequence[str], total: int = 0) -> Callable[..., Any]:
    """The kernel of an MLP that keeps some of its neurons. Its last arguments are `names`: the
    prompt's `neurons`, the number to `keep` or the `threshold`. Of neurons with equal scores, the
    first are kept. With a threshold it also returns the counts. total: the MLP's neurons I, where
    its weights may be copies of the chosen neurons' rows (`ops.chosen`).

    The kernel raises IndexError for a neuron out of range.
    """
    counts = "threshold" in names

    @grouped
    def kernel(x: Tensor, mlp: Mlp[Tensor], *own: Any) -> Any:
        kept = dict(zip(names, own, strict=True))
        if "neurons" in kept:
            kept["neurons"] = kept["neurons"][mlp.layer]
        done = None
        if kept.get("keep", 1) > 0:
            done = _run(operator, _Choice(**kept, counts=counts, total=total), x, mlp)
        if done is None:
            slow = getattr(reference, operator)
            return (spreading(slow, total) if total else slow)(x, *mlp, *own)
        return done if counts else done[0]

    kernel.__name__ = operator
    return kernel


griffin_mlp = keeping("griffin_mlp", ("neurons",))
"""As `reference.griffin_mlp`."""
