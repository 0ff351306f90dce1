"""sparsify_griffin: prefill scores the neurons, the sparse path uses the chosen ones only, and a
copy of the full path says what its tokens add to the scores."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, fx

from sirius_passes.manager import run_passes
from sirius_passes.program import FULL, OBSERVE, PREFILL, SPARSE
from sirius_passes.recognise_mlps import DENSE_MLP
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_griffin_cats import SparsifyGriffinCats
from sirius_passes.testing import check_pass, random_weights, run_graph, snapshot
from sirius_passes.testing_runs import make_calls
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.graph import INPUT, placeholders
from sirius_runtime.spec import Method, SiteSpec
from tests.support import naive
from tests.support.graphs import (
    Attention,
    Decoder,
    Mlp,
    Plain,
    assert_prints,
    one_mlp,
    paired,
    run_replacing,
    two_layers,
)

OUTPUTS = {PREFILL: "statistic", OBSERVE: "activity"}


def reference(
    name: str, before: fx.GraphModule, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if name == FULL:
        return run_graph(before, inputs, weights)
    if name == SPARSE:
        chosen = {DENSE_MLP: lambda *args: naive.griffin_mlp(*args, inputs["neurons"])}
        return run_replacing(before, inputs, weights, chosen)
    second = []

    def dense_mlp(*args: object) -> Tensor:
        if name == OBSERVE:
            y, value = naive.dense_mlp_activity(*args)
        else:
            y, value = naive.dense_mlp_statistic(*args, inputs["valid"])
        second.append(value)
        return y

    outputs = run_replacing(before, inputs, weights, {DENSE_MLP: dense_mlp})
    return outputs | {OUTPUTS[name]: torch.stack(second)}


def test_before_and_after() -> None:
    program = paired(one_mlp)
    full = snapshot(program.graphs[FULL])
    assert_prints(
        program.graphs[PREFILL],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        input %slots: int64[B, T]
        input %length: int64[B]
        input %tree_mask: int64[R, T, M]
        input %k_cache: model[layers, B, G, S, D]
        input %v_cache: model[layers, B, G, S, Dv]
        input %last: int64[B]
        %14: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %15: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %16: model[B, T, 6] = aten.add.Tensor(%14, %15)
        %17: model[10, 6] = aten.t(%layers.0.down.weight)
        %18: model[B, T, 6] = sirius.dense_mlp(%16, %layers.0.gate.weight, %layers.0.up.weight, %17, None, None, None, 'silu', 0)
        %19: model[B, T, 6] = aten.add.Tensor(%16, %18)
        %20: int64[B, 1, 1] = aten.view(%last, [-1, 1, 1])
        %21: int64[B, 1, 6] = aten.expand(%20, [-1, -1, 6])
        %22: model[B, 1, 6] = aten.gather(%19, 1, %21)
        %23: model[B, 1, 11] = aten.linear(%22, %head.weight)
        return logits=%23
        """,  # noqa: E501
    )
    expect = {
        "sirius.dense_mlp": (3, 1),
        "prefill/sirius.dense_mlp_statistic": (0, 1),
        "sparse/sirius.griffin_mlp": (0, 1),
        "observe/sirius.dense_mlp_activity": (0, 1),
    }
    check = check_pass(program, SparsifyGriffin(0.35), reference=reference, expect=expect)
    assert check.rewrites == 3
    assert snapshot(program.graphs[FULL]) == full
    assert_prints(
        program.graphs[PREFILL],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        input %slots: int64[B, T]
        input %length: int64[B]
        input %tree_mask: int64[R, T, M]
        input %k_cache: model[layers, B, G, S, D]
        input %v_cache: model[layers, B, G, S, Dv]
        input %last: int64[B]
        input %valid: bool[B, T]
        %15: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %16: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %17: model[B, T, 6] = aten.add.Tensor(%15, %16)
        %18: model[10, 6] = aten.t(%layers.0.down.weight)
        %19: (model[B, T, 6], float32[B, 10]) = sirius.dense_mlp_statistic(%17, %layers.0.gate.weight, %layers.0.up.weight, %18, None, None, None, 'silu', 0, %valid)
        %20: model[B, T, 6] = getitem(%19, 0)
        %21: float32[B, 10] = getitem(%19, 1)
        %22: model[B, T, 6] = aten.add.Tensor(%17, %20)
        %23: int64[B, 1, 1] = aten.view(%last, [-1, 1, 1])
        %24: int64[B, 1, 6] = aten.expand(%23, [-1, -1, 6])
        %25: model[B, 1, 6] = aten.gather(%22, 1, %24)
        %26: model[B, 1, 11] = aten.linear(%25, %head.weight)
        %27: float32[1, B, 10] = aten.stack([%21])
        return logits=%26, statistic=%27
        """,  # noqa: E501
    )
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
        input %neurons: int64[layers, B, kept]
        %14: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %15: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %16: model[B, T, 6] = aten.add.Tensor(%14, %15)
        %17: model[10, 6] = aten.t(%layers.0.down.weight)
        %18: model[B, T, 6] = sirius.griffin_mlp(%16, %layers.0.gate.weight, %layers.0.up.weight, %17, None, None, None, 'silu', 0, %neurons)
        %19: model[B, T, 6] = aten.add.Tensor(%16, %18)
        %20: model[B, T, 11] = aten.linear(%19, %head.weight)
        return logits=%20
        """,  # noqa: E501
    )
    assert_prints(
        program.graphs[OBSERVE],
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
        %17: (model[B, T, 6], float32[B, T, 10]) = sirius.dense_mlp_activity(%15, %layers.0.gate.weight, %layers.0.up.weight, %16, None, None, None, 'silu', 0)
        %18: model[B, T, 6] = getitem(%17, 0)
        %19: float32[B, T, 10] = getitem(%17, 1)
        %20: model[B, T, 6] = aten.add.Tensor(%15, %18)
        %21: model[B, T, 11] = aten.linear(%20, %head.weight)
        %22: float32[1, B, T, 10] = aten.stack([%19])
        return logits=%21, activity=%22
        """,  # noqa: E501
    )


def test_every_layer_equals_loops_over_its_neurons() -> None:
    check = check_pass(paired(two_layers), SparsifyGriffin(0.35), reference=reference)
    assert check.rewrites == 6
    assert {"prefill.statistic", "observe.activity"} <= check.differences.keys()


@pytest.mark.gate
def test_all_neurons_kept_is_dense() -> None:
    check_pass(paired(two_layers), SparsifyGriffin(1.0))


@pytest.mark.gate
def test_an_mlp_of_unknown_activation_stays_dense() -> None:
    program = paired(lambda: Decoder(Plain(torch.tanh), Mlp()))
    expect = {"sparse/aten.linear": (3, 3), "sparse/sirius.griffin_mlp": (0, 1)}
    check_pass(program, SparsifyGriffin(0.35), reference=reference, expect=expect)


def test_only_the_paths_that_use_them_have_the_new_inputs() -> None:
    program = paired(two_layers)
    check_pass(program, SparsifyGriffin(0.35), reference=reference)
    inputs = {name: placeholders(m.graph, INPUT).keys() for name, m in program.graphs.items()}
    assert {name for name in inputs if "neurons" in inputs[name]} == {SPARSE}
    assert {name for name in inputs if "valid" in inputs[name]} == {PREFILL}


def test_to_observe_is_to_verify() -> None:
    """A refreshing period commits by these logits, so they must be the full path's bit for bit."""
    program = paired(two_layers)
    check_pass(program, SparsifyGriffin(0.35), reference=reference)
    weights = random_weights(program, seed=0)
    for call in make_calls(program.graphs[FULL], seed=0):
        full, observe = (
            run_graph(
                program.graphs[name],
                call.inputs() | {c: torch.zeros(2, 2, 1, 16, 2) for c in ("k_cache", "v_cache")},
                weights,
            )
            for name in (FULL, OBSERVE)
        )
        assert torch.equal(full["logits"], observe["logits"])


def test_the_spec_says_what_a_step_reads() -> None:
    program = paired(one_mlp)
    SparsifyGriffin(0.35).run(program)
    spec = program.sparsity
    assert (spec.method, spec.keep) == (Method.GRIFFIN, 0.35)
    assert (spec.neurons, spec.kept_neurons, spec.counted) == (10, 4, ())
    # 18: a row of gate, of up and of down, 6 wide
    assert spec.sites == (SiteSpec(0, "layers.0.gate.weight", 10, 4, 36),)
    assert spec.density == pytest.approx(1 - 6 * 18 / ((11 + 32 + 30 + 11) * 6))


def test_layers_of_different_widths_are_refused() -> None:
    program = paired(lambda: Decoder(Attention(0), Mlp(), Attention(1), Mlp(neurons=14)))
    with pytest.raises(
        UnsupportedModelError, match=r"MLPs have \[10, 14\] neurons. Use --sparsity"
    ):
        check_pass(program, SparsifyGriffin(0.5))


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\], got 0.0"):
        check_pass(paired(two_layers), SparsifyGriffin(0.0))


@pytest.mark.parametrize("method", [SparsifyGriffin, SparsifyGriffinCats])
def test_a_sparse_path_without_a_sparse_layer_is_refused(method: type[SparsifyGriffin]) -> None:
    step = method(0.5, None, (0, 1)) if method is SparsifyGriffinCats else method(0.5, (0, 1))  # type: ignore[call-arg,arg-type]
    with pytest.raises(ConfigError, match=r"--dense-layers keeps all 2 layers dense.*Leave some"):
        run_passes(paired(two_layers), [step])
