"""MLPs at few tokens. Each function returns None where its kernels do not serve.

Choices of neurons are the references': products, activations and their means are rounded to the
tensors' type as torch rounds them. Of equal scores, `topk_mlp` takes the first. The neurons of
griffin's list are taken to be distinct, as those are that the session chooses: one named twice
counts twice, and one that is not there is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import ACTIVATIONS, TYPES, given, is_matrix, is_vector
from sirius_runtime.kernels.cuda.device import products
from sirius_runtime.kernels.cuda.launch import launch
from sirius_runtime.kernels.cuda.selection import Live, above, largest
from sirius_runtime.kernels.cuda.sums import sum_of_rows


@dataclass(frozen=True)
class _Mlp:
    """An MLP's weights, all of a type and device that the kernels take."""

    gate: Tensor
    up: Tensor | None
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    act: str

    def neurons(
        self, x: Tensor, rows: Tensor | None, score: str = "", gate_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """z [B, T, K] = act(gate x) · up x of x [B, T, C], for the neurons `rows` [B, K] or all;
        and, if `score` says "mean" or "sum", that of |z| over tokens [B, K], float32.
        """
        B, T, C = x.shape
        I = self.gate.shape[0]  # noqa: E741
        K = I if rows is None else rows.shape[1]
        up = None if gate_only else self.up
        tile = tiles.products(T, K, C, x.dtype, 1 if up is None else 2, x.device)
        z = x.new_empty(B, T, K)
        scores = x.new_empty(B, K if score else 0, dtype=torch.float32)
        launch(
            products.neurons,
            (-(-K // tile.rows), B),
            x.device,
            (
                *(x, self.gate, given(up, x), given(self.gate_bias, x), given(self.up_bias, x)),
                *(given(rows, x), z, scores, T, C, I, K),
                *(self.gate.stride(0), 0 if up is None else up.stride(0)),
            ),
            tile,
            HAS_UP=up is not None,
            HAS_GATE_BIAS=self.gate_bias is not None,
            HAS_UP_BIAS=up is not None and self.up_bias is not None,
            HAS_ROWS=rows is not None,
            SCORE=score,
            ACT=self.act,
            TOKENS=tiles.padded(T),
            ROWS=tile.rows,
            CHANNELS=tile.channels,
        )
        return z, scores

    def live(self, x: Tensor, g: Tensor, live: Live) -> Tensor:
        """y [B, T, C] of the live neurons among g [B, T, K] = act(gate x)."""
        B, T, C = x.shape
        K = g.shape[2]
        up = self.up
        tile = tiles.products(T, K, C, x.dtype, 1, x.device)
        z = torch.empty_like(g)
        launch(
            products.live_neurons,
            (-(-K // tile.rows), B),
            x.device,
            (
                *(x, given(up, x), given(self.up_bias, x), g),
                *(live.positions, live.rows, live.count, z),
                *(T, C, K, 0 if up is None else up.stride(0)),
            ),
            tile,
            HAS_UP=up is not None,
            HAS_UP_BIAS=up is not None and self.up_bias is not None,
            TOKENS=tiles.padded(T),
            ROWS=tile.rows,
            CHANNELS=tile.channels,
        )
        return sum_of_rows(z, self.down, live.rows, live.count, self.down_bias)

    def down_of(self, z: Tensor, rows: Tensor | None) -> Tensor:
        return sum_of_rows(z, self.down, rows, None, self.down_bias)


def _served(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    tokens: int,
) -> _Mlp | None:
    """The MLP, if the kernels take it for as many tokens of a row."""
    if x.dtype not in TYPES or act not in ACTIVATIONS or x.ndim != 3 or gate.ndim != 2:
        return None
    I, C = gate.shape  # noqa: E741
    if not (
        1 <= tokens <= tiles.MOST_TOKENS
        and x.shape[0] > 0
        and x.shape[2] == C > 0
        and I > 0
        and all(is_matrix(w, x, I, C) for w in (gate, up, down) if w is not None)
        and is_vector(gate_bias, x.dtype, x.device, I)
        and is_vector(up_bias, x.dtype, x.device, I)
        and is_vector(down_bias, x.dtype, x.device, C)
    ):
        return None
    return _Mlp(gate, up, down, gate_bias, up_bias, down_bias, act)


def _is_list(neurons: Tensor, x: Tensor) -> bool:
    """Whether `neurons` is [B, K], int64, of some K, on the device of `x`."""
    return (
        neurons.dtype is torch.int64
        and neurons.device == x.device
        and neurons.ndim == 2
        and neurons.shape[0] == x.shape[0]
        and neurons.shape[1] > 0
    )


def _dense(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor] | None:
    """y [B, T, C] and z [B, T, I]."""
    tokens = x.shape[0] * x.shape[1] if x.ndim == 3 else 0  # nothing tells rows from tokens
    mlp = _served(x, gate, up, down, gate_bias, up_bias, down_bias, act, tokens)
    if mlp is None:
        return None
    z, _ = mlp.neurons(x.reshape(1, tokens, x.shape[2]).contiguous(), None)
    return mlp.down_of(z, None).view_as(x), z.view(*x.shape[:2], -1)


def dense_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
) -> Tensor | None:
    """As the reference."""
    done = _dense(x, gate, up, down, gate_bias, up_bias, down_bias, act)
    return None if done is None else done[0]


def dense_mlp_statistic(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    valid: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """As the reference."""
    done = _dense(x, gate, up, down, gate_bias, up_bias, down_bias, act)
    if done is None:
        return None
    return done[0], (_activity(done[1]) * valid[..., None]).sum(1)


def dense_mlp_activity(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
) -> tuple[Tensor, Tensor] | None:
    """As the reference."""
    done = _dense(x, gate, up, down, gate_bias, up_bias, down_bias, act)
    return None if done is None else (done[0], _activity(done[1]))


def _activity(z: Tensor) -> Tensor:
    return F.normalize(z.float(), dim=-1).square()


def topk_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    keep: int,
) -> Tensor | None:
    """As the reference."""
    mlp = _served(x, gate, up, down, gate_bias, up_bias, down_bias, act, x.shape[-2])
    if mlp is None or not 1 <= keep <= gate.shape[0] <= tiles.MOST_NEURONS:
        return None
    x = x.contiguous()
    g, score = mlp.neurons(x, None, "sum", gate_only=True)
    return mlp.live(x, g, largest(score, keep, x.dtype))


def cats_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    threshold: float,
) -> tuple[Tensor, Tensor] | None:
    """As the reference."""
    mlp = _served(x, gate, up, down, gate_bias, up_bias, down_bias, act, x.shape[-2])
    return None if mlp is None else _above(mlp, x.contiguous(), None, threshold)


def griffin_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    neurons: Tensor,
) -> Tensor | None:
    """As the reference."""
    mlp = _served(x, gate, up, down, gate_bias, up_bias, down_bias, act, x.shape[-2])
    if mlp is None or not _is_list(own := neurons[layer], x):
        return None
    own = own.contiguous()
    z, _ = mlp.neurons(x.contiguous(), own)
    return mlp.down_of(z, own)


def griffin_cats_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    neurons: Tensor,
    threshold: float,
) -> tuple[Tensor, Tensor] | None:
    """As the reference."""
    mlp = _served(x, gate, up, down, gate_bias, up_bias, down_bias, act, x.shape[-2])
    if mlp is None or not _is_list(own := neurons[layer], x):
        return None
    return _above(mlp, x.contiguous(), own.contiguous(), threshold)


def _above(mlp: _Mlp, x: Tensor, listed: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """y and the number of neurons whose mean |act(gate x)| is above `threshold`."""
    g, score = mlp.neurons(x, listed, "mean", gate_only=True)
    live = above(score, threshold, listed, x.dtype)
    return mlp.live(x, g, live), live.count
