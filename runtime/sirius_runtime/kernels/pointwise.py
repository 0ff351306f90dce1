"""RMS norms, rotary embeddings and gates on the CPU, each as one call.

These are not operators: graphs on disk keep the torch calls, which the back end replaces by these
when it loads a graph. At one token, the time between matrix products is the number of calls.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import ACTIVATIONS, TYPES, address, check, is_vector
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import mlp as reference

_ROTATE = Struct("=18q")  # x and its strides, cosine, sine: see ``csrc/cpu.cpp``


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """weight [C] · x [..., C] / sqrt(mean(x²) + epsilon), with the mean in float32."""
    if not _is_norm(x, weight, dtype):
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean([-1], True) + epsilon)
        return weight * (wide * scale).to(dtype)
    given = x.contiguous()
    y = torch.empty_like(given)
    _norm(given, None, None, weight, epsilon, y)
    return y


def add_norm(
    x: Tensor, addend: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + addend, and `rms_norm` of that sum."""
    if not (x.shape == addend.shape and x.dtype is addend.dtype and _is_norm(x, weight, dtype)):
        total = x + addend
        return total, rms_norm(total, weight, epsilon, dtype)
    given = x.contiguous()
    total, y = torch.empty_like(given), torch.empty_like(given)
    _norm(given, addend.contiguous(), total, weight, epsilon, y)
    return total, y


def _is_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a norm of x, and it takes these arguments."""
    return (
        x.dtype in TYPES
        and x.dtype is dtype
        and x.is_cpu
        and is_vector(weight, dtype)
        and weight.shape[0] == x.shape[-1]
        and x.numel() > 0
        and kernels() is not None
    )


def _norm(
    x: Tensor,
    addend: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    epsilon: float,
    y: Tensor,
) -> None:
    library = kernels()
    assert library is not None
    status = library.sirius_rms_norm(
        TYPES[x.dtype], x.data_ptr(), x.numel(),
        address(addend), 0 if addend is None else addend.numel(), address(total),
        weight.data_ptr(), weight.shape[0], epsilon, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, "rms_norm")


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, half: int) -> Tensor:
    """x · cosine + (-x₂, x₁) · sine, where x₁ = x[..., :half] and x₂ = x[..., half:].

    x [B, H, T, D]; cosine and sine [B, 1, T, D].
    """
    kind = TYPES.get(x.dtype)
    if (
        kind is not None
        and x.ndim == 4
        and x.shape[3] == 2 * half
        and x.numel() > 0
        and x.stride(3) == 1
        and x.is_cpu
        and cosine.dtype is sine.dtype is x.dtype
        and cosine.shape == sine.shape == (x.shape[0], 1, *x.shape[2:])
        and (library := kernels()) is not None
    ):
        cosine, sine = cosine.contiguous(), sine.contiguous()
        y = x.new_empty(x.shape)
        operands = _ROTATE.pack(
            x.data_ptr(), *x.shape, *x.stride()[:3],
            cosine.data_ptr(), *cosine.shape, sine.data_ptr(), *sine.shape,
        )  # fmt: skip
        status = library.sirius_rotate(kind, operands, y.data_ptr(), torch.get_num_threads())
        check(library, status, "rotate")
        return y
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine


def gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    """act(g) · u. `act`: a name in the table of activations."""
    if not (
        g.dtype in TYPES
        and g.dtype is u.dtype
        and g.shape == u.shape
        and g.is_cpu
        and g.numel() > 0
        and (library := kernels()) is not None
    ):
        return reference.ACTIVATIONS[act](g) * u
    g, u = g.contiguous(), u.contiguous()
    y = torch.empty_like(g)
    status = library.sirius_gated(
        TYPES[g.dtype], ACTIVATIONS[act], g.data_ptr(), g.numel(), u.data_ptr(), u.numel(),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, "gate")
    return y
