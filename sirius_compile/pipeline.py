"""The order of the passes, as two literal lists: calibration stands between them."""

from __future__ import annotations

from collections.abc import Sequence

from sirius_passes.build_period import BuildPeriod
from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass
from sirius_passes.pair_paths import PairPaths
from sirius_passes.recognise_mlps import RecogniseMlps
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.sparsify_experts import SparsifyExperts
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_runtime.spec import Method


def front(method: Method) -> list[Pass]:
    """From the captured graph to the paired paths, still dense."""
    return [
        # one spelling for what models say in many
        Canonicalize(),
        # neurons instead of matrices; a model that stays dense may have any MLP
        *([] if method is Method.NONE else [RecogniseMlps()]),
        # one graph for prefill, chain and tree
        InsertKvCache(),
        # prefill, full and sparse over one weight table
        PairPaths(),
    ]


def back(
    method: Method,
    keep: float,
    thresholds: Sequence[float],
    *,
    period: int,
    tree_width: int,
    max_seq_len: int,
) -> list[Pass]:
    """From the paired paths to the program that is packaged. `thresholds` [layers]: cats only."""
    sparsify: dict[Method, list[Pass]] = {
        Method.CATS: [SparsifyCats(keep, thresholds)],
        Method.TOPK: [SparsifyTopk(keep)],
        Method.GRIFFIN: [SparsifyGriffin(keep)],
        Method.EXPERTS: [SparsifyExperts(keep)],
        Method.NONE: [],
    }
    return [
        # the sparse path skips neurons
        *sparsify[method],
        # one stored copy of each weight, as the kernels stream it
        LayOutWeights(),
        # draft, verify, accept and roll back as one graph
        BuildPeriod(period, tree_width, max_seq_len),
    ]
