"""lay_out_weights: a weight is stored once, in the layout that its readers need."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass, run_passes
from sirius_passes.pair_paths import PairPaths
from sirius_passes.program import FULL, SPARSE, Program, call, calls
from sirius_passes.sparsify import Threshold
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.testing import check_pass, random_weights, snapshot
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import WeightSpec
from tests.support.fast import gate_but
from tests.support.graphs import (
    HIDDEN,
    NEURONS,
    Decoder,
    FusedMlp,
    Mlp,
    after,
    assert_prints,
    one_mlp,
    paired,
    two_layers,
)

DOWN = "layers.0.down.weight"


def test_before_and_after() -> None:
    program = paired(one_mlp)
    assert_prints(
        program.graphs[FULL],
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
    assert check_pass(program, LayOutWeights(), expect={"aten.t": (3, 0)}).rewrites == 1
    assert_prints(
        program.graphs[FULL],
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
        %16: model[B, T, 6] = sirius.dense_mlp(%15, %layers.0.gate.weight, %layers.0.up.weight, %layers.0.down.weight, None, None, None, 'silu', 0)
        %17: model[B, T, 6] = aten.add.Tensor(%15, %16)
        %18: model[B, T, 11] = aten.linear(%17, %head.weight)
        return logits=%18
        """,  # noqa: E501
    )


def test_the_table_says_how_the_weight_is_stored_and_others_stay() -> None:
    program = paired(one_mlp)
    before = dict(program.weights)
    assert before[DOWN] == WeightSpec(DOWN, "bfloat16", (6, 10))
    check_pass(program, LayOutWeights())
    assert program.weights.pop(DOWN) == WeightSpec(DOWN, "bfloat16", (10, 6), transposed=True)
    assert program.weights.items() <= before.items()


def test_random_weights_are_the_same_matrix_in_any_layout() -> None:
    program = paired(one_mlp)
    before = random_weights(program, seed=3)[DOWN]
    LayOutWeights().run(program)
    stored = random_weights(program, seed=3)[DOWN]
    assert stored.is_contiguous()
    assert torch.equal(stored, before.t())


def dense(build: type[Decoder], layer: Callable[[], nn.Module] = Mlp) -> Program:
    """A program at stage PAIRED whose MLPs are still traced operators."""
    return after(lambda: build(layer()), Canonicalize(), InsertKvCache(), PairPaths())


def skip_channels(program: Program) -> None:
    """Replaces every linear of the sparse path by one that may skip input channels, like TEAL."""
    graph = program.graphs[SPARSE].graph
    for linear in calls(graph, torch.ops.aten.linear.default):
        x, weight, *bias = linear.args
        with graph.inserting_before(linear):
            turned = call(graph, torch.ops.aten.t.default, (weight,), origin="test")
            args = (x, turned, *(bias or [None]), -1.0)
            both = call(graph, torch.ops.sirius.sparse_linear.default, args, origin="test")
            y = call(graph, operator.getitem, (both, 0), origin="test")
        linear.replace_all_uses_with(y)
        graph.erase_node(linear)


def printed(program: Program, name: str, *operators: str) -> list[str]:
    """The printed lines of a graph that call one of the operators."""
    lines = snapshot(program.graphs[name]).splitlines()
    return [line for line in lines if any(f"= {o}(" in line for o in operators)]


def test_a_linear_reads_a_view_where_another_path_skips_channels() -> None:
    program = dense(Decoder)
    skip_channels(program)
    expect = {
        "sparse/aten.t": (4, 0),
        "full/aten.t": (0, 4),
        "prefill/aten.t": (0, 4),
        "sparse/sirius.sparse_linear": (4, 4),
    }
    assert check_pass(program, LayOutWeights(), expect=expect).rewrites == 4
    assert {name for name, spec in program.weights.items() if spec.transposed} == {
        "head.weight",
        *(f"layers.0.{name}.weight" for name in ("gate", "up", "down")),
    }
    assert printed(program, FULL, "aten.t", "aten.linear")[:2] == [
        "%16: model[10, 6] = aten.t(%layers.0.gate.weight)",
        "%17: model[B, T, 10] = aten.linear(%15, %16)",
    ]
    assert printed(program, SPARSE, "sirius.sparse_linear")[0] == (
        "%16: (model[B, T, 10], int64[B]) = sirius.sparse_linear("
        "%15, %layers.0.gate.weight, None, -1.0)"
    )


def test_slices_of_a_weight_follow_it() -> None:
    program = dense(Decoder, lambda: FusedMlp(lambda y: y.chunk(2, -1)))
    skip_channels(program)
    assert check_pass(program, LayOutWeights()).rewrites == 3
    assert program.weights["layers.0.gate_up.weight"].shape == (HIDDEN, 2 * NEURONS)
    assert printed(program, FULL, "aten.slice.Tensor", "aten.t", "aten.linear")[:3] == [
        "%15: model[6, 10] = aten.slice.Tensor(%layers.0.gate_up.weight, 1, 0, 10)",
        "%16: model[10, 6] = aten.t(%15)",
        "%17: model[B, T, 10] = aten.linear(%14, %16)",
    ]
    assert printed(program, SPARSE, "aten.slice.Tensor", "sirius.sparse_linear")[:2] == [
        "%15: model[6, 10] = aten.slice.Tensor(%layers.0.gate_up.weight, 1, 0, 10)",
        "%16: (model[B, T, 10], int64[B]) = sirius.sparse_linear(%14, %15, None, -1.0)",
    ]


def test_neurons_and_input_channels_may_agree() -> None:
    """One path reads `down` by neurons, another by a linear's input channels."""
    program = paired(one_mlp)
    graph = program.graphs[SPARSE].graph
    (mlp,) = calls(graph, torch.ops.sirius.dense_mlp.default)
    x, gate, up, down = mlp.args[:4]
    with graph.inserting_before(mlp):
        g, u = (
            call(graph, torch.ops.aten.linear.default, (x, w), origin="test") for w in (gate, up)
        )
        g = call(graph, torch.ops.aten.silu.default, (g,), origin="test")
        z = call(graph, torch.ops.aten.mul.Tensor, (g, u), origin="test")
        args = (z, down, None, -1.0)
        both = call(graph, torch.ops.sirius.sparse_linear.default, args, origin="test")
        y = call(graph, operator.getitem, (both, 0), origin="test")
    mlp.replace_all_uses_with(y)
    graph.erase_node(mlp)
    assert check_pass(program, LayOutWeights(), expect={"aten.t": (3, 0)}).rewrites == 1


def test_neurons_and_input_channels_may_disagree() -> None:
    """One path reads rows of `gate` as neurons, another its columns as input channels."""
    program = paired(one_mlp)
    graph = program.graphs[SPARSE].graph
    (mlp,) = calls(graph, torch.ops.sirius.dense_mlp.default)
    with graph.inserting_before(mlp):
        turned = call(graph, torch.ops.aten.t.default, (mlp.args[1],), origin="test")
        args = (mlp.args[0], turned, None, -1.0)
        both = call(graph, torch.ops.sirius.sparse_linear.default, args, origin="test")
        g = call(graph, operator.getitem, (both, 0), origin="test")
        mean = call(graph, torch.ops.aten.mean.dim, (g, [-1], True), origin="test")
        y = call(graph, torch.ops.aten.add.Tensor, (mlp.args[0], mean), origin="test")
    mlp.replace_all_uses_with(y)
    graph.erase_node(mlp)
    reason = (
        r"weight layers.0.gate.weight is read as stored by dense_mlp.* and transposed by "
        r"sparse_linear"
    )
    with pytest.raises(UnsupportedModelError, match=reason):
        check_pass(program, LayOutWeights())


class Columns(nn.Module):
    """x @ weight + bias over flattened tokens, like transformers' Conv1D, in three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN, 3 * HIDDEN))
        self.bias = nn.Parameter(torch.empty(3 * HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        a, b, c = y.view(*x.shape[:-1], 3 * HIDDEN).split(HIDDEN, -1)
        return F.relu(a) * b.tanh() + c


def test_linears_that_all_read_a_weight_transposed_have_it_stored_so() -> None:
    program = dense(Decoder, Columns)
    assert check_pass(program, LayOutWeights(), expect={"aten.t": (3, 0)}).rewrites == 1
    assert program.weights["layers.0.weight"].shape == (3 * HIDDEN, HIDDEN)
    assert printed(program, FULL, "aten.slice.Tensor")[0].endswith(
        "[6, 6] = aten.slice.Tensor(%layers.0.weight, 0, 0, 6)"
    )


def test_linears_that_read_a_weight_both_ways_leave_it_as_it_is() -> None:
    program = dense(Decoder)
    graph = program.graphs[FULL].graph
    (head,) = [n for n in calls(graph, torch.ops.aten.linear.default) if "head" in str(n.args[1])]
    with graph.inserting_before(head):
        square = call(graph, torch.ops.aten.slice.Tensor, (head.args[1], 0, 0, 6), origin="test")
        turned = call(graph, torch.ops.aten.t.default, (square,), origin="test")
        twice = call(graph, torch.ops.aten.linear.default, (head.args[0], turned), origin="test")
    head.update_arg(0, twice)
    assert check_pass(program, LayOutWeights(), expect={"aten.t": (1, 1)}).rewrites == 0


SPARSIFY: list[Pass] = [
    SparsifyTopk(0.4),
    SparsifyCats(0.4, (Threshold(0.1, 0.4),) * 2),
    SparsifyGriffin(0.4),
]


@pytest.mark.parametrize("sparsify", gate_but(SPARSIFY, SPARSIFY[:1]), ids=lambda step: step.name)
def test_every_path_reads_the_one_copy(sparsify: Pass) -> None:
    program = paired(two_layers)
    run_passes(program, [sparsify])
    expect = {"aten.t": (2 * len(program.graphs), 0)}
    assert check_pass(program, LayOutWeights(), expect=expect).rewrites == 2


def test_rows_of_a_fused_weight_are_left_as_they_are() -> None:
    program = paired(lambda: Decoder(FusedMlp(lambda y: y.chunk(2, -1))))
    assert check_pass(program, LayOutWeights(), expect={"aten.t": (3, 0)}).rewrites == 1
    assert [name for name, spec in program.weights.items() if spec.transposed] == [DOWN]


def test_where_nothing_is_read_transposed_nothing_is_done() -> None:
    assert check_pass(dense(Decoder), LayOutWeights()).rewrites == 0


class EmbedIsTransposed(Decoder):
    """Tied: the embedding reads the weight by rows, and the head reads its transpose."""

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) @ self.embed.weight.t() @ self.embed.weight)


def test_a_weight_that_is_read_both_ways_is_refused() -> None:
    program = dense(EmbedIsTransposed)
    with pytest.raises(UnsupportedModelError, match=r"embed\.weight is read as stored by matmul_1"):
        check_pass(program, LayOutWeights())


def test_a_weight_that_one_path_reads_otherwise_is_refused() -> None:
    program = paired(one_mlp)
    graph = program.graphs[SPARSE].graph
    (turned,) = [n for n in graph.nodes if n.target is torch.ops.aten.t.default]
    turned.target, turned.args = torch.ops.aten.permute.default, (*turned.args, [1, 0])
    with pytest.raises(
        UnsupportedModelError, match=f"weight {DOWN} is read as stored by t_default"
    ):
        check_pass(program, LayOutWeights())
