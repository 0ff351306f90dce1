"""Norms and rotary embeddings on the CPU as one call each, for graphs that spell them out.

Not operators: graphs on disk keep torch's spelling, of which these are the sum. At one token a
decoder's time between its matrix products is the number of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import MOST_TOKENS, TYPES, check, is_vector
from sirius_runtime.kernels.native import kernels


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """weight [C] times x [..., C] over the root of its mean square, which is taken in float32."""
    kind = TYPES.get(x.dtype)
    size = x.shape[-1]
    if (
        kind is not None
        and x.dtype is dtype
        and x.device.type == "cpu"
        and is_vector(weight, dtype, size)
        and 0 < x.numel() <= MOST_TOKENS * size
        and (library := kernels()) is not None
    ):
        given = x.contiguous()
        y = torch.empty_like(given)
        tokens = x.numel() // size
        check(
            library.sirius_rms_norm(
                kind, given.data_ptr(), weight.data_ptr(), epsilon, y.data_ptr(), tokens, size
            ),
            "rms_norm",
        )
        return y
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean([-1], True) + epsilon)
    return weight * (wide * scale).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, half: int) -> Tensor:
    """x · cosine + (-x₂, x₁) · sine, where x₁ is x up to `half` of its last dimension, x₂ the rest.

    x [B, H, T, D]; cosine and sine [B, 1, T, D].
    """
    kind = TYPES.get(x.dtype)
    if (
        kind is not None
        and x.ndim == 4
        and x.shape[3] == 2 * half
        and 0 < x.shape[0] * x.shape[2] <= MOST_TOKENS
        and x.stride(3) == 1
        and x.device.type == "cpu"
        and cosine.dtype is sine.dtype is x.dtype
        and cosine.shape == sine.shape == (x.shape[0], 1, *x.shape[2:])
        and (library := kernels()) is not None
    ):
        B, H, T, D = x.shape
        cosine, sine = cosine.contiguous(), sine.contiguous()
        y = x.new_empty(B, H, T, D)
        row, head, token, _ = x.stride()
        check(
            library.sirius_rotate(
                kind, x.data_ptr(), row, head, token, cosine.data_ptr(), sine.data_ptr(),
                y.data_ptr(), B, H, T, D,
            ),
            "rotate",
        )  # fmt: skip
        return y
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine
