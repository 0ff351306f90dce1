"""Passes over mixtures of experts: their rewrites of `sirius.dense_moe`, and their refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass, run_passes
from sirius_passes.mixtures import check_method
from sirius_passes.program import DENSE, FULL, SPARSE, calls
from sirius_passes.recognise_mlps import DENSE_MLP, DENSE_MOE, RecogniseMlps
from sirius_passes.sparsify import step_bytes
from sirius_passes.sparsify_experts import SparsifyExperts
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.testing import Reference, check_pass, run_graph, snapshot
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.spec import Method, SiteSpec
from tests.support import naive
from tests.support.fast import gate_but
from tests.support.graphs import (
    HIDDEN,
    Attention,
    Decoder,
    Mixture,
    Mlp,
    after,
    paired,
    run_replacing,
    trace,
    two_layers,
    two_mixtures,
)


def mixture() -> Decoder:
    return Decoder(Attention(0), Mixture(0))


def on_sparse(replacements: Mapping[Any, Callable[..., Any]]) -> Reference:
    """Each graph's expected outputs; the sparse path's operators are computed by loops."""

    def reference(
        name: str,
        before: fx.GraphModule,
        inputs: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        if name != SPARSE:
            return run_graph(before, inputs, weights)
        return run_replacing(before, inputs, weights, replacements)

    return reference


def sites_of(step: Pass) -> tuple[SiteSpec, ...]:
    program = paired(two_mixtures)
    run_passes(program, [step])
    return program.sparsity.sites


# canonicalize


def test_weights_are_normalised_apart_not_in_place() -> None:
    program = trace(mixture)
    expect = {"aten.div_.Tensor": (1, 0), "aten.div.Tensor": (0, 1)}
    check_pass(program, Canonicalize(), expect=expect)


def in_two_parts(x: Tensor) -> Tensor:
    """Concatenated like the keys of latent attention."""
    y = x.new_empty(x.shape)
    y[..., :2] = x[..., 1:3]
    y[..., 2:] = x.tanh()[..., 2:]
    return y * 2


def test_parts_that_are_copied_in_become_values_of_their_own() -> None:
    program = trace(lambda: Decoder(Lambda(in_two_parts)))
    expect = {"aten.copy_": (2, 0), "aten.slice_scatter": (0, 2)}
    check_pass(program, Canonicalize(), expect=expect)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def read_later(x: Tensor) -> Tensor:
    y = x.tanh()
    z = y.view(-1)
    y += 1
    return z.view(x.shape) * y


def written_through_a_view(x: Tensor) -> Tensor:
    y = x.tanh()
    y[..., 0] += 1
    return y


def copied_to_a_part_that_is_read(x: Tensor) -> Tensor:
    y = x.tanh()
    front = y[..., :2]
    y[..., 2:] = 0 * x[..., 2:]
    return y + front.sum()


def zeroed(x: Tensor) -> Tensor:
    return x.tanh().fill_(0)


@pytest.mark.parametrize(
    "function",
    gate_but(
        [read_later, written_through_a_view, copied_to_a_part_that_is_read, zeroed],
        [read_later, written_through_a_view],
    ),
)
def test_what_can_not_be_written_apart_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    program = trace(lambda: Decoder(Lambda(function)))
    with pytest.raises(UnsupportedModelError, match=r"of the model's graph writes in place into"):
        Canonicalize().run(program)


# recognise_mlps


def test_a_mixture_needs_no_mlp_beside_it() -> None:
    program = after(mixture, Canonicalize())
    assert check_pass(program, RecogniseMlps()).rewrites == 0


def test_its_router_is_no_mlp() -> None:
    program = after(two_mixtures, Canonicalize())
    assert check_pass(program, RecogniseMlps()).rewrites == 1
    assert [n.args[8] for n in calls(program.graphs[DENSE].graph, DENSE_MLP)] == [1]


# sparsify_topk


def test_topk_keeps_neurons_of_a_tokens_experts() -> None:
    expect = {
        "sparse/sirius.topk_moe": (0, 2),
        "sparse/sirius.topk_mlp": (0, 1),
        "sirius.dense_moe": (6, 4),
        "sirius.dense_mlp": (3, 2),
    }
    reference = on_sparse(
        {
            DENSE_MOE: lambda *args: naive.topk_moe(*args, 8),
            DENSE_MLP: lambda *args: naive.topk_mlp(*args, 4),
        }
    )
    step = SparsifyTopk(0.4)
    assert check_pass(paired(two_mixtures), step, reference=reference, expect=expect).rewrites == 3


@pytest.mark.gate
def test_topk_of_all_neurons_is_dense() -> None:
    check_pass(paired(two_mixtures), SparsifyTopk(1.0))


def test_topk_s_sites() -> None:
    fused = [f"layers.{layer}.gate_up" for layer in (1, 3)]
    assert sites_of(SparsifyTopk(0.4)) == (
        SiteSpec(1, "layers.4.gate.weight", 10, 4, 2 * 2 * HIDDEN),
        SiteSpec(0, fused[0], 20, 8, 2 * 2 * HIDDEN),
        SiteSpec(1, fused[1], 20, 8, 2 * 2 * HIDDEN),
    )


def test_topk_leaves_dense_layers() -> None:
    expect = {"sparse/sirius.topk_moe": (0, 1), "sparse/sirius.topk_mlp": (0, 0)}
    program = paired(two_mixtures)
    reference = on_sparse({})
    step = SparsifyTopk(1.0, dense_layers=[1])
    assert check_pass(program, step, reference=reference, expect=expect).rewrites == 1


# sparsify_experts


def test_experts_keeps_the_heaviest() -> None:
    expect = {"sparse/sirius.experts_moe": (0, 2), "sparse/sirius.dense_mlp": (1, 1)}
    layers = {0: True, 1: False}
    reference = on_sparse({DENSE_MOE: lambda *args: naive.experts_moe(*args, 1, layers[args[10]])})
    program = paired(two_mixtures)
    step = SparsifyExperts(0.5)
    assert check_pass(program, step, reference=reference, expect=expect).rewrites == 2
    lines = [line for line in snapshot(program.graphs[SPARSE]).splitlines() if "_moe" in line]
    assert [line.rpartition("'silu', ")[2] for line in lines] == ["0, 1, True)", "1, 1, False)"]


@pytest.mark.gate
def test_all_experts_kept_is_dense() -> None:
    check_pass(paired(two_mixtures), SparsifyExperts(1.0))


def test_experts_sites() -> None:
    assert sites_of(SparsifyExperts(0.5)) == (
        SiteSpec(0, "layers.1.gate_up", 2, 1, 2 * 3 * 10 * HIDDEN),
        SiteSpec(1, "layers.3.gate_up", 2, 1, 2 * 3 * 10 * HIDDEN),
    )


def test_a_share_that_keeps_all_experts_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--keep 0.6 of a token's 2 experts rounds up to all of them"
    ):
        SparsifyExperts(0.6).run(paired(two_mixtures))


class OwnWeights(Mixture):
    """The routing weights are computed by another matrix."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        _, experts = self.router(flat).topk(2)
        weights = self.router(flat).softmax(-1)[:, :2]
        gate, up = self.gate_up[:, :10], self.gate_up[:, 10:]
        mlps = gate, up, self.down.transpose(1, 2), None, None, None, "silu", self.layer
        return torch.ops.sirius.dense_moe(flat, experts, weights, *mlps).reshape(x.shape)


def test_weights_that_do_not_come_from_the_choice_are_refused() -> None:
    program = paired(lambda: Decoder(Attention(0), OwnWeights()))
    with pytest.raises(UnsupportedModelError, match=r"router also reads linear_\d \(aten.linear"):
        SparsifyExperts(0.5).run(program)


# density and refusals


def test_a_step_reads_the_experts_of_one_token() -> None:
    """Each of two layers skips one of three experts."""
    for stage in (paired(two_mixtures), after(two_mixtures, Canonicalize())):
        every = sum(2 * spec.numbers for spec in stage.weights.values())
        assert every - step_bytes(stage) == 2 * 2 * 3 * 10 * HIDDEN


def test_density() -> None:
    program = paired(two_mixtures)
    run_passes(program, [SparsifyExperts(0.5)])
    step = step_bytes(program)
    assert program.sparsity.density == pytest.approx(1 - 2 * 2 * 180 / step)
    assert program.sparsity.step == step


@pytest.mark.parametrize("method", [Method.CATS, Method.GRIFFIN, Method.TEAL])
def test_other_methods_refuse_mixtures(method: Method) -> None:
    reason = (
        rf"--sparsity {method} does not support .* layers 0, 1 are mixtures. Use --sparsity topk"
    )
    with pytest.raises(UnsupportedModelError, match=reason):
        check_method(trace(two_mixtures), method)


@pytest.mark.parametrize("method", [Method.TOPK, Method.EXPERTS, Method.NONE])
def test_methods_that_have_a_form_for_mixtures(method: Method) -> None:
    check_method(trace(two_mixtures), method)


def test_experts_needs_a_mixture() -> None:
    for refusing in (
        lambda: check_method(trace(two_layers), Method.EXPERTS),
        lambda: SparsifyExperts(0.5).run(paired(two_layers)),
    ):
        with pytest.raises(UnsupportedModelError, match="skips experts, and this model has none"):
            refusing()


# lay_out_weights


@pytest.mark.parametrize(
    "step",
    [SparsifyTopk(0.5), pytest.param(SparsifyExperts(0.5), marks=pytest.mark.gate)],
    ids=lambda s: s.name,
)
def test_down_is_stored_neuron_major(step: Pass) -> None:
    program = paired(mixture)
    run_passes(program, [step])
    expect = {"aten.transpose.int": (15, 12), "aten.slice.Tensor": (6, 6)}
    assert check_pass(program, LayOutWeights(), expect=expect).rewrites == 1
    assert program.weights["layers.1.down"].shape == (3, 10, HIDDEN)
    assert program.weights["layers.1.gate_up"].shape == (3, 20, HIDDEN)
    assert [name for name, spec in program.weights.items() if spec.transposed] == ["layers.1.down"]


class Alternating(Mixture):
    """Gate and up alternate as columns of [E, C, 2I], as in gpt-oss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(3, HIDDEN, 20))
        self.down = nn.Parameter(torch.empty(3, 10, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, experts = self.router(flat).topk(2)
        rows = self.gate_up.transpose(1, 2)
        mlps = rows[:, ::2], rows[:, 1::2], self.down, None, None, None, "silu", self.layer
        return torch.ops.sirius.dense_moe(flat, experts, weights, *mlps).reshape(x.shape)


def test_columns_that_alternate_become_rows_that_alternate() -> None:
    program = paired(lambda: Decoder(Attention(0), Alternating()))
    assert check_pass(program, LayOutWeights()).rewrites == 1
    assert program.weights["layers.1.gate_up"].shape == (3, 20, HIDDEN)
    slices = [line for line in snapshot(program.graphs[FULL]).splitlines() if "slice" in line]
    assert [line.rpartition("(")[2] for line in slices] == [
        "%layers.1.gate_up, 1, 0, 9223372036854775807, 2)",
        "%layers.1.gate_up, 1, 1, 9223372036854775807, 2)",
    ]


@pytest.mark.gate
def test_an_mlp_may_stand_beside_a_mixture() -> None:
    def layers() -> Decoder:
        return Decoder(Attention(0), Mlp(), Attention(1), Mixture(1))

    program = paired(layers)
    run_passes(program, [SparsifyTopk(0.5), LayOutWeights()])
    assert [(site.layer, site.units) for site in program.sparsity.sites] == [(0, 10), (1, 20)]
