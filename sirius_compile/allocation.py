"""Divides a layer's sparsity among its linears, greedily by the error of the layer's output (TEAL,
arXiv 2408.14690, algorithm 1).

All linears start dense. Each step makes one linear sparser: the one that changes the layer's output
least. A step skips the same number of weights in any linear. The steps end once the layer skips the
share of weights that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sirius_compile.quantiles import QuantileSketch
from sirius_compile.texts import padded
from sirius_compile.tokenwise import Block, History, Tokenwise
from sirius_compile.watch import Watch, unwatched
from sirius_compile.writing import Text
from sirius_passes.sparsify import KEEP_ALL
from sirius_runtime.ops.products import converted_once
from sirius_runtime.spec import SiteSpec

STEP = 0.05  # share of a layer's weights, as in TEAL
LEAST_KEPT = 0.05  # share of a linear's channels
ROWS, TOKENS = 3, 48  # at most so many rows and tokens measure the error
ENDS = 4, 20  # rows and tokens, if the K/V of the tokens before them is known


def allocate(
    path: Tokenwise, text: Text, sketch: QuantileSketch, keep: float, watch: Watch = unwatched
) -> list[float]:
    """The share that each counted site keeps, such that each layer keeps `keep` of its weights."""
    sites = path.spec.sparsity.counted
    shares = [keep] * len(sites)
    with watch.count("allocate sparsity", path.spec.state.layers) as done:

        def visit(block: Block) -> None:
            with converted_once():  # each of a layer's weights is multiplied about ten times
                found = _allocate_layer(block, sites, sketch, keep)
            for site, share in found.items():
                shares[site] = share
            done()

        ids, prompts, history = _ends(text)
        path.blocks(ids, path.neurons(prompts), visit, history)
    return shares


@dataclass(frozen=True)
class _Move:
    """A possible next step, which makes one linear sparser.

    `sparsity`: the linear's sparsity after the step. `error`: the squared error of the layer's
    output after the step, of which the step adds `added`. `after`: the number of steps that had
    been made when this one was measured.
    """

    sparsity: float
    error: float
    added: float
    after: int


def _allocate_layer(
    block: Block, sites: Sequence[SiteSpec], sketch: QuantileSketch, keep: float
) -> dict[int, float]:
    weights = {index: sites[index].units * sites[index].params for index in block.sites}
    total, dense = sum(weights.values()), block.output.float()
    sparsity, moves = dict.fromkeys(block.sites, 0.0), dict[int, _Move]()
    left, error, made = total * (1.0 - keep), 0.0, 0

    def measure(site: int, step: float) -> _Move:
        wanted = min(sparsity[site] + step / weights[site], 1.0 - LEAST_KEPT)
        output = block.run(site, _threshold(sketch, site, wanted)).float()
        found = float((output - dense).square().sum())
        return _Move(wanted, found, found - error, made)

    while left > 1e-9 * total:
        step = min(STEP * total, left)
        if step < STEP * total:
            moves.clear()  # they were measured for a larger step
        candidates = [site for site in block.sites if sparsity[site] < 1.0 - LEAST_KEPT]
        if not candidates:
            break
        # The error that a step adds hardly depends on the other steps. So only the best step is
        # measured again, until the best one is up to date.
        while True:
            best = min(
                candidates, key=lambda site: moves[site].added if site in moves else -math.inf
            )
            if best in moves and moves[best].after == made:
                break
            moves[best] = measure(best, step)
        move = moves.pop(best)
        block.set(best, _threshold(sketch, best, move.sparsity))
        left -= (move.sparsity - sparsity[best]) * weights[best]
        sparsity[best], error, made = move.sparsity, move.error, made + 1
    return {index: 1.0 - value for index, value in sparsity.items()}


def _threshold(sketch: QuantileSketch, site: int, sparsity: float) -> float:
    return KEEP_ALL if sparsity == 0.0 else sketch.quantile(site, sparsity)


def _ends(text: Text) -> tuple[Tensor, list[tuple[int, ...]], History | None]:
    """The last tokens [R, T] of the longest samples, their prompts, and the K/V of the tokens
    before them if the full path has run the text.
    """

    def new(row: int) -> int:
        sample = text.samples[row]
        return len(sample) - (0 if text.caches is None else sample.prompt)

    most_rows, most_tokens = (ROWS, TOKENS) if text.caches is None else ENDS
    rows = sorted(range(len(text.samples)), key=new, reverse=True)[:most_rows]
    tokens = min(most_tokens, min(map(new, rows)))
    if text.caches is None:
        ends = [text.samples[row].tokens[-tokens:] for row in rows]
        return padded(ends), [end[: max(1, tokens // 2)] for end in ends], None
    starts = [len(text.samples[row]) - tokens for row in rows]
    ids, history = text.after(rows, starts, tokens)
    return ids, text.prompts(rows), history
