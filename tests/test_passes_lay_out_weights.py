"""lay_out_weights: a weight that is read transposed is stored so, once, for every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass, run_passes
from sirius_passes.pair_paths import PairPaths
from sirius_passes.program import FULL, SPARSE, Program
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.testing import check_pass, random_weights
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import WeightSpec
from tests.support.graphs import (
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


SPARSIFY: list[Pass] = [SparsifyTopk(0.4), SparsifyCats(0.4, (0.1, 0.1)), SparsifyGriffin(0.4)]


@pytest.mark.parametrize("sparsify", SPARSIFY, ids=lambda step: step.name)
def test_every_path_reads_the_one_copy(sparsify: Pass) -> None:
    program = paired(two_layers)
    run_passes(program, [sparsify])
    expect = {"aten.t": (2 * len(program.graphs), 0)}
    assert check_pass(program, LayOutWeights(), expect=expect).rewrites == 2


def test_rows_of_a_fused_weight_are_left_as_they_are() -> None:
    program = paired(lambda: Decoder(FusedMlp(lambda y: y.chunk(2, -1))))
    assert check_pass(program, LayOutWeights(), expect={"aten.t": (3, 0)}).rewrites == 1
    assert [name for name, spec in program.weights.items() if spec.transposed] == [DOWN]


def dense(build: type[Decoder]) -> Program:
    """At stage PAIRED with its MLPs as they were traced."""
    return after(lambda: build(Mlp()), Canonicalize(), InsertKvCache(), PairPaths())


def test_where_nothing_is_read_transposed_nothing_is_done() -> None:
    assert check_pass(dense(Decoder), LayOutWeights()).rewrites == 0


class EmbedIsTransposed(Decoder):
    """Tied: the embedding is read by rows, and transposed as the head."""

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) @ self.embed.weight.t() @ self.embed.weight)


def test_a_weight_that_is_read_both_ways_is_refused() -> None:
    program = dense(EmbedIsTransposed)
    with pytest.raises(UnsupportedModelError, match=r"embed\.weight is read both transposed and"):
        check_pass(program, LayOutWeights())


def test_a_weight_that_one_path_reads_otherwise_is_refused() -> None:
    program = paired(one_mlp)
    graph = program.graphs[SPARSE].graph
    (turned,) = [n for n in graph.nodes if n.target is torch.ops.aten.t.default]
    turned.target, turned.args = torch.ops.aten.permute.default, (*turned.args, [1, 0])
    with pytest.raises(UnsupportedModelError, match=f"weight {DOWN} is read both"):
        check_pass(program, LayOutWeights())
