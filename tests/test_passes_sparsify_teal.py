"""sparsify_teal: every projection of the sparse path skips input channels, and counts them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, fx

from sirius_passes.program import FULL, PREFILL, SPARSE
from sirius_passes.sparsify import Threshold
from sirius_passes.sparsify_teal import SparsifyTeal, projections
from sirius_passes.testing import Reference, check_pass, run_graph, snapshot
from sirius_runtime.errors import CalibrationError, UnsupportedModelError
from sirius_runtime.spec import Method, SiteSpec
from tests.support import naive
from tests.support.graphs import Attention, Decoder, Mlp, plainly_paired, run_replacing

LINEARS = ["q", "k", "v", "o", "gate", "up", "down"]
KEEP = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
THRESHOLDS = [Threshold(0.05 * (1 + i), keep) for i, keep in enumerate(KEEP)]


def one_layer() -> Decoder:
    return Decoder(Attention(0), Mlp(bias=True))


def reference_for(thresholds: list[Threshold]) -> Reference:
    def reference(
        name: str,
        before: fx.GraphModule,
        inputs: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        if name != SPARSE:
            return run_graph(before, inputs, weights)
        counts: list[Tensor] = []

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if len(counts) == len(thresholds):  # the head
                return torch.nn.functional.linear(x, weight, bias)
            threshold = thresholds[len(counts)].value
            y, count = naive.sparse_linear(x, weight.t(), bias, threshold)
            counts.append(count)
            return y

        outputs = run_replacing(before, inputs, weights, {torch.ops.aten.linear.default: linear})
        return outputs | {"kept": torch.stack(counts)}

    return reference


def test_before_and_after() -> None:
    program = plainly_paired(lambda: Decoder(Attention(0)))
    dense = {name: snapshot(program.graphs[name]) for name in (FULL, PREFILL)}
    check_pass(
        program,
        SparsifyTeal(0.5, THRESHOLDS[:4]),
        reference=reference_for(THRESHOLDS[:4]),
        expect={
            "sparse/aten.linear": (5, 1),
            "sparse/sirius.sparse_linear": (0, 4),
            "full/aten.linear": (5, 5),
        },
    )
    assert {name: snapshot(program.graphs[name]) for name in dense} == dense
    lines = snapshot(program.graphs[SPARSE]).splitlines()
    calls = [line.partition(" = ")[2] for line in lines if "sparse_linear" in line]
    assert [call.split("(")[0] for call in calls] == ["sirius.sparse_linear"] * 4
    assert all(call.endswith(", None, <calibrated>)") for call in calls)
    assert lines[-1].startswith("return logits=")
    assert ", kept=" in lines[-1]


def test_every_linear_equals_loops_over_its_channels() -> None:
    check = check_pass(
        plainly_paired(one_layer),
        SparsifyTeal(0.5, THRESHOLDS),
        reference=reference_for(THRESHOLDS),
    )
    assert check.rewrites == 7
    assert check.differences["sparse.kept"] == 0


def test_without_thresholds_it_is_dense() -> None:
    check_pass(plainly_paired(one_layer), SparsifyTeal(0.5, None))


def test_dense_layers_are_left_alone() -> None:
    program = plainly_paired(lambda: Decoder(Attention(0), Mlp(), Attention(1), Mlp()))
    graph = program.graphs[SPARSE].graph
    assert list(projections(graph).values()) == [0] * 7 + [1] * 7
    check = check_pass(
        program,
        SparsifyTeal(0.5, None, dense_layers=[0]),
        expect={"sparse/sirius.sparse_linear": (0, 7), "sparse/aten.linear": (15, 8)},
    )
    assert check.rewrites == 7
    assert {site.layer for site in program.sparsity.sites} == {1}
    assert program.sparsity.dense_layers == (0,)


def test_the_spec_says_what_a_step_is_expected_to_read() -> None:
    program = plainly_paired(one_layer)
    SparsifyTeal(0.55, THRESHOLDS).run(program)
    spec = program.sparsity
    assert (spec.method, spec.keep) == (Method.TEAL, 0.55)
    sizes = [(6, 4), (6, 2), (6, 2), (4, 6), (6, 10), (6, 10), (10, 6)]
    names = [f"layers.{0 if i < 4 else 1}.{name}.weight" for i, name in enumerate(LINEARS)]
    assert spec.sites == tuple(
        SiteSpec(0, name, units, units * own.keep, 2 * features, own.value, counted=True)
        for name, (units, features), own in zip(names, sizes, THRESHOLDS, strict=True)
    )
    skipped = sum(u * f * (1 - keep) for (u, f), keep in zip(sizes, KEEP, strict=True))
    parameters = (11 + 32 + 11) * 6 + sum(u * f for u, f in sizes) + 26  # 26 biases
    assert spec.step == 2 * parameters
    assert spec.density == pytest.approx(1 - skipped / parameters)


def test_thresholds_of_another_model_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"3 thresholds for 7 linears. Calibrate"):
        check_pass(plainly_paired(one_layer), SparsifyTeal(0.5, THRESHOLDS[:3]))


def test_a_model_of_no_linears_is_refused() -> None:
    program = plainly_paired(lambda: Decoder(Attention(0)))
    SparsifyTeal(0.5, None).run(program)
    with pytest.raises(UnsupportedModelError, match="the model has no linear to make sparse"):
        SparsifyTeal(0.5, None).run(program)


def test_graphs_of_two_calibrations_print_the_same() -> None:
    texts = []
    for scale in (1.0, 2.0):
        program = plainly_paired(one_layer)
        own = [Threshold(t.value * scale, t.keep) for t in THRESHOLDS]
        SparsifyTeal(0.5, own).run(program)
        texts.append(snapshot(program.graphs[SPARSE]))
    assert texts[0] == texts[1]
