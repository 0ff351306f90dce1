"""MLPs for few tokens. Each function returns None if its kernels do not take the arguments.

The kernels choose the same neurons as the references, because they round products, activations and
means to the tensors' type as torch does. Of equal scores, the first are kept. A prompt's list
must have distinct neurons: one listed twice is added twice, one out of range is ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.kernels.cuda import nested, tiles
from sirius_runtime.kernels.cuda.arguments import ACTIVATIONS, TYPES, given, is_matrix, is_vector
from sirius_runtime.kernels.cuda.device import products
from sirius_runtime.kernels.cuda.launch import launch
from sirius_runtime.kernels.cuda.selection import Live, above, largest
from sirius_runtime.kernels.cuda.sums import sum_of_rows
from sirius_runtime.nested import is_nested
from sirius_runtime.ops.linear import outputs_of
from sirius_runtime.ops.operands import Mlp, grouped


def _neurons(
    mlp: Mlp[Tensor], x: Tensor, rows: Tensor | None, score: str = "", gate_only: bool = False
) -> tuple[Tensor, Tensor]:
    """z [B, T, K] = act(gate x) · up x of x [B, T, C], for the neurons `rows` [B, K] or all; and
    scores [B, K], float32: the "mean" or "sum" of |z| over the tokens (`score`; "" for none).
    gate_only: leave out the factor up x.
    """
    B, T, C = x.shape
    I = mlp.gate.shape[0]  # noqa: E741
    K = I if rows is None else rows.shape[1]
    up = None if gate_only else mlp.up
    tile = tiles.products(T, K, C, x.dtype, 1 if up is None else 2, x.device)
    z = x.new_empty(B, T, K)
    scores = x.new_empty(B, K if score else 0, dtype=torch.float32)
    launch(
        products.neurons,
        (-(-K // tile.rows), B),
        x.device,
        (
            *(x, mlp.gate, given(up, x), given(mlp.gate_bias, x), given(mlp.up_bias, x)),
            *(given(rows, x), z, scores, T, C, I, K),
            *(mlp.gate.stride(0), 0 if up is None else up.stride(0)),
        ),
        tile,
        HAS_UP=up is not None,
        HAS_GATE_BIAS=mlp.gate_bias is not None,
        HAS_UP_BIAS=up is not None and mlp.up_bias is not None,
        HAS_ROWS=rows is not None,
        SCORE=score,
        ACT=mlp.act,
        TOKENS=tiles.padded(T),
        ROWS=tile.rows,
        CHANNELS=tile.channels,
    )
    return z, scores


def _live(mlp: Mlp[Tensor], x: Tensor, g: Tensor, live: Live) -> Tensor:
    """The MLP's output y [B, T, C] over the live neurons; g [B, T, K] = act(gate x) of all K."""
    B, T, C = x.shape
    K = g.shape[2]
    up = mlp.up
    tile = tiles.products(T, K, C, x.dtype, 1, x.device)
    z = torch.empty_like(g)
    launch(
        products.live_neurons,
        (-(-K // tile.rows), B),
        x.device,
        (
            *(x, given(up, x), given(mlp.up_bias, x), g),
            *(live.positions, live.rows, live.count, z),
            *(T, C, K, 0 if up is None else up.stride(0)),
        ),
        tile,
        HAS_UP=up is not None,
        HAS_UP_BIAS=up is not None and mlp.up_bias is not None,
        TOKENS=tiles.padded(T),
        ROWS=tile.rows,
        CHANNELS=tile.channels,
    )
    return sum_of_rows(z, mlp.down, live.rows, live.count, mlp.down_bias)


def _down_of(mlp: Mlp[Tensor], z: Tensor, rows: Tensor | None) -> Tensor:
    return sum_of_rows(z, mlp.down, rows, None, mlp.down_bias)


def _serves(x: Tensor, mlp: Mlp[Tensor], tokens: int) -> bool:
    """Whether the kernels take the MLP for `tokens` tokens of a row."""
    gate = mlp.gate
    if x.dtype not in TYPES or mlp.act not in ACTIVATIONS or x.ndim != 3 or gate.ndim != 2:
        return False
    I, C = gate.shape  # noqa: E741
    return (
        1 <= tokens <= tiles.MOST_TOKENS
        and x.shape[0] > 0
        and x.shape[2] == C > 0
        and I > 0
        and all(is_matrix(w, x, I, C) for w in (gate, mlp.up, mlp.down) if w is not None)
        and is_vector(mlp.gate_bias, x.dtype, x.device, I)
        and is_vector(mlp.up_bias, x.dtype, x.device, I)
        and is_vector(mlp.down_bias, x.dtype, x.device, C)
    )


def _is_list(neurons: Tensor, x: Tensor) -> bool:
    """Whether `neurons` is a non-empty list [B, K], int64, on the device of `x`."""
    return (
        neurons.dtype is torch.int64
        and neurons.device == x.device
        and neurons.ndim == 2
        and neurons.shape[0] == x.shape[0]
        and neurons.shape[1] > 0
    )


def _dense(x: Tensor, mlp: Mlp[Tensor]) -> tuple[Tensor, Tensor] | None:
    """y [B, T, C] and z = act(gate x) · up x [B, T, I]."""
    if is_nested(mlp.gate):
        done = nested.mlp(x, mlp)
        return None if done is None else done[:2]
    # All tokens use all neurons, so that the batch's rows are merged into one.
    tokens = x.shape[0] * x.shape[1] if x.ndim == 3 else 0
    if not _serves(x, mlp, tokens):
        return None
    z, _ = _neurons(mlp, x.reshape(1, tokens, x.shape[2]).contiguous(), None)
    return _down_of(mlp, z, None).view_as(x), z.view(*x.shape[:2], -1)


@grouped
def dense_mlp(x: Tensor, mlp: Mlp[Tensor]) -> Tensor | None:
    """As the reference."""
    done = _dense(x, mlp)
    return None if done is None else done[0]


@grouped
def dense_mlp_statistic(x: Tensor, mlp: Mlp[Tensor], valid: Tensor) -> tuple[Tensor, Tensor] | None:
    """As the reference."""
    done = _dense(x, mlp)
    if done is None:
        return None
    return done[0], (_activity(done[1]) * valid[..., None]).sum(1)


@grouped
def dense_mlp_activity(x: Tensor, mlp: Mlp[Tensor]) -> tuple[Tensor, Tensor] | None:
    """As the reference."""
    done = _dense(x, mlp)
    return None if done is None else (done[0], _activity(done[1]))


def _activity(z: Tensor) -> Tensor:
    return F.normalize(z.float(), dim=-1).square()


@functools.cache
def keeping(*names: str) -> Callable[..., Any]:
    """The kernel of an MLP that keeps some of its neurons. Its last arguments are `names`, as in
    `sirius_runtime.kernels.mlp.keeping`.
    """

    @grouped
    def kernel(x: Tensor, mlp: Mlp[Tensor], *own: Any) -> Any:
        return _of_kept(x, mlp, **dict(zip(names, own, strict=True)))

    return kernel


def _of_kept(
    x: Tensor,
    mlp: Mlp[Tensor],
    *,
    neurons: Tensor | None = None,
    keep: int | None = None,
    threshold: float | None = None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """y over the listed `neurons` (None: all), the `keep` largest, or those above `threshold`; then
    their number too.
    """
    if keep is not None:
        if neurons is not None or threshold is not None:
            return None  # no operator chooses among the chosen
        if not 1 <= keep <= outputs_of(mlp.gate) <= tiles.MOST_NEURONS:
            return None
    listed = None if neurons is None else neurons[mlp.layer]
    if is_nested(mlp.gate):
        done = nested.mlp(x, mlp, listed=listed, keep=keep, threshold=threshold)
        if done is None:
            return None
        y, _, kept = done
        return y if threshold is None or kept is None else (y, kept.sum((1, 2)))
    if not _serves(x, mlp, x.shape[-2]):
        return None
    if listed is not None:
        if not _is_list(listed, x):
            return None
        listed = listed.contiguous()
    x = x.contiguous()
    if keep is not None:
        g, score = _neurons(mlp, x, None, "sum", gate_only=True)
        return _live(mlp, x, g, largest(score, keep, x.dtype))
    if threshold is not None:
        g, score = _neurons(mlp, x, listed, "mean", gate_only=True)
        live = above(score, threshold, listed, x.dtype)
        return _live(mlp, x, g, live), live.count
    z, _ = _neurons(mlp, x, listed)
    return _down_of(mlp, z, listed)
