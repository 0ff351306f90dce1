"""Launches kernels; nothing else does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from sirius_runtime.kernels.cuda.tiles import Tile


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    tile: Tile,
    **constants: Any,
) -> None:
    """Queues `kernel` on the device's current stream, with the tile's warps and stages.

    `constants` are its `tl.constexpr` parameters. A multiplication and an addition may be fused
    (FMA), as in the references' matrix products.
    """
    # Triton launches on the current device, which need not be the device of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](
            *arguments,
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
