"""The order of the passes, as literal lists. Calibration runs between them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sirius_passes.build_period import BuildPeriod
from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass
from sirius_passes.nest_weights import NestWeights
from sirius_passes.pair_paths import PairPaths
from sirius_passes.recognise_mlps import RecogniseMlps
from sirius_passes.sparsify import Threshold
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.sparsify_experts import SparsifyExperts
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_griffin_cats import SparsifyGriffinCats
from sirius_passes.sparsify_teal import SparsifyTeal
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_runtime.spec import Method


@dataclass(frozen=True)
class Thresholds:
    """Calibrated thresholds of the MLPs and of the linears, each in the graph's order."""

    neurons: tuple[Threshold, ...] = ()
    channels: tuple[Threshold, ...] = ()


def front(method: Method) -> list[Pass]:
    """The passes from the captured graph to the paired paths, still dense."""
    return [
        # one spelling of each operation, whatever the model's code
        Canonicalize(),
        # MLP operators instead of matrices, if the method skips neurons or experts
        *([RecogniseMlps()] if method.rewrites_mlps else []),
        # one graph for prefill, chain and tree
        InsertKvCache(),
        # prefill, full and sparse over one weight table
        PairPaths(),
    ]


def sparsify(
    method: Method,
    keep: float,
    thresholds: Thresholds | None,
    dense_layers: Collection[int] = (),
) -> list[Pass]:
    """The passes that make the sparse path sparse.

    `thresholds`: None keeps all units at the sites that have thresholds, as calibration needs.
    """
    dense = frozenset(dense_layers)
    neurons = None if thresholds is None else thresholds.neurons
    channels = None if thresholds is None else thresholds.channels
    match method:
        case Method.CATS:
            return [SparsifyCats(keep, neurons, dense)]
        case Method.TOPK:
            return [SparsifyTopk(keep, dense)]
        case Method.GRIFFIN:
            return [SparsifyGriffin(keep, dense)]
        case Method.TEAL:
            return [SparsifyTeal(keep, channels, dense)]
        case Method.GRIFFIN_TEAL:
            return [
                # the prompt's neurons, and a token's neurons among them
                SparsifyGriffinCats(keep, neurons, dense),
                # the remaining linears: those of attention
                SparsifyTeal(keep, channels, dense, method=method),
            ]
        case Method.EXPERTS:
            return [SparsifyExperts(keep, dense)]
        case Method.NONE:
            return []


def lay_out(nest: NestWeights | None) -> list[Pass]:
    """The passes that lay out the weights; `nest`: the pass that nests them, if any."""
    return [
        # one stored copy of each weight, in the layout that the kernels read
        LayOutWeights(),
        # 8-bit weights in two planes of 4 bits; a draft may read only one
        *([] if nest is None else [nest]),
    ]


def back(
    *,
    period: int,
    tree_width: int,
    max_seq_len: int,
    whole_periods: bool = True,
    nest: NestWeights | None = None,
) -> list[Pass]:
    """The passes from the sparse and full paths to the program that is packaged."""
    return [
        *lay_out(nest),
        # draft, verify, accept and roll back as one graph
        *([BuildPeriod(period, tree_width, max_seq_len)] if whole_periods else []),
    ]
