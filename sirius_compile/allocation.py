"""How a layer's linears share its sparsity: greedily, by the error that each adds to the layer's
output (TEAL, arXiv 2408.14690, algorithm 1).

All start dense. Each step gives a little more sparsity to the one linear whose channels change the
layer's output least, until the layer as a whole skips what was asked. What counts is weights: a
step is the same number of weights skipped, whichever linear skips them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sirius_compile.quantiles import QuantileSketch
from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Block, Tokenwise
from sirius_passes.sparsify import KEEP_ALL
from sirius_runtime.spec import SiteSpec

STEP = 0.05  # of a layer's weights; TEAL's own
LEAST_KEPT = 0.05  # of any one linear's channels
ROWS, TOKENS = 4, 128  # of text that errors are measured on, at the most


def allocate(
    path: Tokenwise, samples: Sequence[Sample], sketch: QuantileSketch, keep: float
) -> list[float]:
    """The share that each counted site keeps: `keep` of each layer's weights in all."""
    ids, prompt = _batch(samples)
    sites = path.spec.sparsity.counted
    shares = [keep] * len(sites)

    def visit(block: Block) -> None:
        for site, share in _allocate_layer(block, sites, sketch, keep).items():
            shares[site] = share

    path.blocks(ids, path.neurons(ids[:, :prompt]), visit)
    return shares


def _allocate_layer(
    block: Block, sites: Sequence[SiteSpec], sketch: QuantileSketch, keep: float
) -> dict[int, float]:
    weights = {index: sites[index].units * sites[index].params for index in block.sites}
    total, dense = sum(weights.values()), block.output.float()
    sparsity = dict.fromkeys(block.sites, 0.0)

    def error(changed: int, value: float) -> float:
        chosen = sparsity | {changed: value}
        thresholds = {i: _threshold(sketch, i, s) for i, s in chosen.items()}
        return float((block.run(thresholds).float() - dense).square().sum())

    left = total * (1.0 - keep)
    while left > 1e-9 * total:
        step = min(STEP * total, left)
        room = {
            index: min(sparsity[index] + step / weights[index], 1.0 - LEAST_KEPT)
            for index in block.sites
            if sparsity[index] < 1.0 - LEAST_KEPT
        }
        if not room:  # every linear is as sparse as it may be
            break
        best = min(room, key=lambda index: error(index, room[index]))
        left -= (room[best] - sparsity[best]) * weights[best]
        sparsity[best] = room[best]
    return {index: 1.0 - value for index, value in sparsity.items()}


def _threshold(sketch: QuantileSketch, site: int, sparsity: float) -> float:
    return KEEP_ALL if sparsity == 0.0 else sketch.quantile(site, sparsity)


def _batch(samples: Sequence[Sample]) -> tuple[Tensor, int]:
    """The longest samples as rows [R, T] of one length, and how much of each is the prompt."""
    longest = sorted(samples, key=len, reverse=True)[:ROWS]
    tokens = min(TOKENS, min(map(len, longest)))
    # The end of a sample is what was decoded.
    ids = torch.tensor([sample.tokens[-tokens:] for sample in longest])
    return ids, max(1, tokens // 2)
