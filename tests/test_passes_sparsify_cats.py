"""sparsify_cats: the sparse path keeps neurons above calibrated thresholds, and counts them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, fx

from sirius_passes.program import FULL, PREFILL, SPARSE
from sirius_passes.recognise_mlps import DENSE_MLP
from sirius_passes.sparsify import Threshold
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.testing import check_pass, run_graph, snapshot
from sirius_runtime.errors import CalibrationError, ConfigError
from sirius_runtime.spec import Method, SiteSpec
from tests.support import naive
from tests.support.graphs import (
    Decoder,
    Mlp,
    Plain,
    assert_prints,
    one_mlp,
    paired,
    run_replacing,
    two_layers,
)

VALUES = (0.11, 0.07)
THRESHOLDS = tuple(Threshold(value, 0.45) for value in VALUES)


def reference(
    name: str, before: fx.GraphModule, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if name != SPARSE:
        return run_graph(before, inputs, weights)
    counts = []

    def cats_mlp(*args: object) -> Tensor:
        y, count = naive.cats_mlp(*args, VALUES[len(counts)])
        counts.append(count)
        return y

    outputs = run_replacing(before, inputs, weights, {DENSE_MLP: cats_mlp})
    return outputs | {"kept": torch.stack(counts)}


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
    expect = {"sirius.dense_mlp": (3, 2), "sparse/sirius.cats_mlp": (0, 1)}
    step = SparsifyCats(0.5, THRESHOLDS[:1])
    assert check_pass(program, step, reference=reference, expect=expect).rewrites == 1
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
        %17: (model[B, T, 6], int64[B]) = sirius.cats_mlp(%15, %layers.0.gate.weight, %layers.0.up.weight, %16, None, None, None, 'silu', 0, <calibrated>)
        %18: model[B, T, 6] = getitem(%17, 0)
        %19: int64[B] = getitem(%17, 1)
        %20: model[B, T, 6] = aten.add.Tensor(%15, %18)
        %21: model[B, T, 11] = aten.linear(%20, %head.weight)
        %22: int64[1, B] = aten.stack([%19])
        return logits=%21, kept=%22
        """,  # noqa: E501
    )


def test_every_layer_equals_loops_over_its_neurons() -> None:
    check = check_pass(paired(two_layers), SparsifyCats(0.5, THRESHOLDS), reference=reference)
    assert check.rewrites == 2
    assert check.differences["sparse.kept"] == 0


def test_a_threshold_that_all_neurons_pass_is_dense() -> None:
    check_pass(paired(two_layers), SparsifyCats(0.5, None))


def test_an_mlp_of_unknown_activation_stays_dense() -> None:
    program = paired(lambda: Decoder(Plain(torch.tanh), Mlp()))
    expect = {"sparse/aten.linear": (3, 3), "sparse/sirius.cats_mlp": (0, 1)}
    check_pass(program, SparsifyCats(0.5, THRESHOLDS[:1]), reference=reference, expect=expect)


def test_graphs_of_two_calibrations_print_the_same() -> None:
    texts = []
    for thresholds in ((0.1, 0.2), (0.3, 0.4)):
        program = paired(two_layers)
        SparsifyCats(0.5, [Threshold(value, 0.5) for value in thresholds]).run(program)
        texts.append(snapshot(program.graphs[SPARSE]))
    assert texts[0] == texts[1]


def test_the_spec_says_what_a_step_is_expected_to_read() -> None:
    program = paired(two_layers)
    SparsifyCats(0.45, THRESHOLDS).run(program)
    spec = program.sparsity
    assert (spec.method, spec.keep) == (Method.CATS, 0.45)
    assert spec.sites == tuple(
        # Attention stands before each.
        SiteSpec(index, f"layers.{2 * index + 1}.gate.weight", 10, 5, 24, threshold, counted=True)
        for index, threshold in enumerate(VALUES)
    )
    assert spec.counted == spec.sites
    attention = 6 * (4 + 2 + 2 + 4)
    parameters = (11 + 32 + 11) * 6 + 2 * (attention + 180) + 26  # 26 biases
    assert spec.density == pytest.approx(1 - 2 * 5 * 12 / parameters)


@pytest.mark.parametrize("thresholds", [(), (0.1,), (0.1, 0.1, 0.1)])
def test_thresholds_of_another_model_are_refused(thresholds: tuple[float, ...]) -> None:
    message = f"{len(thresholds)} thresholds for 2 MLPs"
    given = [Threshold(value, 0.5) for value in thresholds]
    with pytest.raises(CalibrationError, match=message):
        check_pass(paired(two_layers), SparsifyCats(0.5, given))


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\], got 1.5"):
        check_pass(paired(two_layers), SparsifyCats(0.5, (Threshold(0.1, 1.5),) * 2))
