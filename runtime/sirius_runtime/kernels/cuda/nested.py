"""Linear layers and MLPs with nested weights for few tokens. Each function returns None if its
kernels do not take the arguments.

PyTorch rounds the activations and chooses the neurons, as in the references. The kernels read the
weights' planes, without the rows that are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import TYPES
from sirius_runtime.kernels.cuda.device import nested
from sirius_runtime.kernels.cuda.launch import launch
from sirius_runtime.kernels.cuda.sums import add_up
from sirius_runtime.nested import GROUP, in_steps, is_nested, matrix_shape
from sirius_runtime.ops.mlp import ACTIVATIONS
from sirius_runtime.ops.operands import Mlp


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None = None
) -> Tensor | None:
    """As the reference `sirius_runtime.ops.linear.linear`. live [O], bool: the outputs to compute
    (by-outputs layout only); the others are 0 + bias.
    """
    outputs, inputs = matrix_shape(tuple(weight.shape))
    tokens = x.numel() // inputs
    if not (
        x.dtype in TYPES
        and x.ndim > 0
        and x.shape[-1] == inputs
        and 1 <= tokens <= tiles.MOST_TOKENS
        and weight.device == x.device
        and weight.stride(-1) == 1
    ):
        return None
    given = in_steps(x.reshape(tokens, inputs)).contiguous()
    product = _by_outputs if weight.ndim == 3 else _by_inputs
    y = product(given, weight, outputs, live)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], outputs)


def _by_outputs(x: Tensor, weight: Tensor, outputs: int, live: Tensor | None) -> Tensor:
    tokens, inputs = x.shape
    y = x.new_empty(tokens, outputs)
    tile = tiles.nested_rows(tokens)
    launch(
        nested.by_outputs,
        (-(-outputs // tile.rows),),
        x.device,
        (
            *(x, weight, weight if live is None else live.to(torch.uint8), y),
            *(tokens, inputs, outputs, weight.stride(0), weight.stride(1)),
        ),
        tile,
        HAS_LIVE=live is not None,
        BOTH=len(weight) == 2,
        TOKENS=tiles.padded(tokens),
        ROWS=tile.rows,
    )
    return y


def _by_inputs(x: Tensor, weight: Tensor, outputs: int, live: Tensor | None) -> Tensor:
    assert live is None
    tokens, inputs = x.shape
    tile, groups = tiles.nested_bytes(tokens, outputs), inputs // GROUP
    blocks = -(-outputs // 2 // tile.channels)
    groups_per_split = -(-groups // tiles.splits(groups, blocks, x.device))
    splits = -(-groups // groups_per_split)
    partials = x.new_empty(splits, tokens, outputs)
    launch(
        nested.by_inputs,
        (blocks, splits),
        x.device,
        (x, weight, partials, tokens, inputs, outputs, *weight.stride()[:3], groups_per_split),
        tile,
        BOTH=len(weight) == 2,
        TOKENS=tiles.padded(tokens),
        BYTES=tile.channels,
    )
    return add_up(partials, None, x.new_empty(tokens, outputs))


def mlp(
    x: Tensor,
    own: Mlp[Tensor],
    *,
    listed: Tensor | None = None,
    keep: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """y [B, T, C] and z = act(gate x) · up x [B, T, I] over the neurons that each row keeps, and
    which these are, bool [B, 1, I]; None if all are.

    A row keeps its `listed` [B, K]; or the `keep` with the largest sum of |act(gate x)| over the
    tokens; and only those whose mean is above `threshold`. Rows of gate beyond the lists are not
    read.
    """
    weights = [weight for weight in (own.gate, own.up, own.down) if weight is not None]
    if x.ndim != 3 or own.act not in ACTIVATIONS or not all(map(is_nested, weights)):
        return None
    kept = live = None
    if listed is not None:
        neurons, _ = matrix_shape(tuple(own.gate.shape))
        kept = x.new_zeros(len(x), 1, neurons, dtype=torch.bool).scatter(2, listed[:, None], True)
        live = kept[:, 0].any(0)
    g = linear(x, own.gate, own.gate_bias, live)
    if g is None:
        return None
    z = ACTIVATIONS[own.act](g)
    if keep is not None:
        score = z.abs().sum(1, keepdim=True)
        first = score.topk(keep, -1, sorted=False).indices
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(2, first, True)
    if threshold is not None:
        above = z.abs().mean(1, keepdim=True) > threshold
        kept = above if kept is None else kept & above
    if kept is not None:
        z, live = z * kept, kept[:, 0].any(0)
    if own.up is not None:
        u = linear(x, own.up, own.up_bias, live)
        if u is None:
            return None
        z = z * u
    y = linear(z, own.down, own.down_bias)
    return None if y is None else (y, z, kept)
