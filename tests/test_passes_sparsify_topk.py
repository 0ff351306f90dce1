"""sparsify_topk: the sparse path keeps each token's largest neurons; the other paths stay dense."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, fx

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.pair_paths import PairPaths
from sirius_passes.program import FULL, PREFILL, SPARSE
from sirius_passes.recognise_mlps import DENSE_MLP
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.testing import check_pass, run_graph, snapshot
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.spec import Method, SiteSpec
from tests.support import naive
from tests.support.graphs import (
    Decoder,
    Mlp,
    Plain,
    after,
    assert_prints,
    one_mlp,
    paired,
    run_replacing,
    two_layers,
)

KEEP, KEPT = 0.35, 4  # of 10 neurons


def reference(
    name: str, before: fx.GraphModule, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if name != SPARSE:
        return run_graph(before, inputs, weights)
    topk = {DENSE_MLP: lambda *args: naive.topk_mlp(*args, KEPT)}
    return run_replacing(before, inputs, weights, topk)


def test_before_and_after() -> None:
    program = paired(one_mlp)
    dense = {name: snapshot(program.graphs[name]) for name in (FULL, PREFILL)}
    assert_prints(
        program.graphs[SPARSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        input %slots: int64[B, T]
        input %length: int64[B]
        input %tree_mask: int64[R, T, M]
        input %k_cache: model[layers, B, G, S, D]
        input %v_cache: model[layers, B, G, S, Dv]
        %13: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %14: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %15: model[B, T, 6] = aten.add.Tensor(%13, %14)
        %16: model[10, 6] = aten.t(%layers.0.down.weight)
        %17: model[B, T, 6] = sirius.dense_mlp(%15, %layers.0.gate.weight, %layers.0.up.weight, %16, None, None, None, 'silu', 0)
        %18: model[B, T, 6] = aten.add.Tensor(%15, %17)
        %19: model[B, T, 11] = aten.linear(%18, %head.weight)
        return logits=%19
        """,  # noqa: E501
    )
    expect = {"sirius.dense_mlp": (3, 2), "sparse/sirius.topk_mlp": (0, 1)}
    check = check_pass(program, SparsifyTopk(KEEP), reference=reference, expect=expect)
    assert check.rewrites == 1
    assert {name: snapshot(program.graphs[name]) for name in dense} == dense
    assert_prints(
        program.graphs[SPARSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        input %slots: int64[B, T]
        input %length: int64[B]
        input %tree_mask: int64[R, T, M]
        input %k_cache: model[layers, B, G, S, D]
        input %v_cache: model[layers, B, G, S, Dv]
        %13: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %14: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %15: model[B, T, 6] = aten.add.Tensor(%13, %14)
        %16: model[10, 6] = aten.t(%layers.0.down.weight)
        %17: model[B, T, 6] = sirius.topk_mlp(%15, %layers.0.gate.weight, %layers.0.up.weight, %16, None, None, None, 'silu', 0, 4)
        %18: model[B, T, 6] = aten.add.Tensor(%15, %17)
        %19: model[B, T, 11] = aten.linear(%18, %head.weight)
        return logits=%19
        """,  # noqa: E501
    )


def test_every_layer_equals_loops_over_its_neurons() -> None:
    check = check_pass(paired(two_layers), SparsifyTopk(KEEP), reference=reference)
    assert check.rewrites == 2


@pytest.mark.gate
def test_all_neurons_kept_is_dense() -> None:
    check_pass(paired(two_layers), SparsifyTopk(1.0))


@pytest.mark.gate
def test_an_mlp_of_unknown_activation_stays_dense() -> None:
    program = paired(lambda: Decoder(Plain(torch.tanh), Mlp()))
    expect = {"sparse/aten.linear": (3, 3), "sparse/sirius.topk_mlp": (0, 1)}
    check_pass(program, SparsifyTopk(KEEP), reference=reference, expect=expect)


@pytest.mark.parametrize(("keep", "kept"), [(0.35, 4), (0.4, 4), (0.5, 5), (0.01, 1), (1.0, 10)])
def test_the_spec_says_what_a_step_reads(keep: float, kept: int) -> None:
    program = paired(one_mlp)
    SparsifyTopk(keep).run(program)
    spec = program.sparsity
    assert (spec.method, spec.keep) == (Method.TOPK, keep)
    # 12: a row of up and a row of down, 6 wide
    assert spec.sites == (SiteSpec(0, "layers.0.gate.weight", 10, kept, 24),)
    parameters = 11 * 6 + 32 * 6 + 3 * 10 * 6 + 11 * 6
    assert spec.density == pytest.approx(1 - (10 - kept) * 12 / parameters)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(keep: float) -> None:
    program = paired(one_mlp)
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\], got"):
        check_pass(program, SparsifyTopk(keep))


def test_a_model_whose_mlps_were_not_recognised_is_refused() -> None:
    program = after(one_mlp, Canonicalize(), InsertKvCache(), PairPaths())
    with pytest.raises(UnsupportedModelError, match=r"the graph has no sirius\.dense_mlp"):
        check_pass(program, SparsifyTopk(KEEP))
