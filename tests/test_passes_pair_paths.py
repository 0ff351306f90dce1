"""pair_paths: one dense graph becomes prefill, sparse and full over one weight table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.pair_paths import PairPaths
from sirius_passes.program import DENSE, FULL, PREFILL, SPARSE, Program
from sirius_passes.testing import check_pass, snapshot
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import WEIGHT, placeholders
from tests.support.graphs import (
    HIDDEN,
    VOCABULARY,
    Decoder,
    Mlp,
    after,
    assert_prints,
    one_mlp,
    two_layers,
)


def cached(build: Callable[[], nn.Module]) -> Program:
    return after(build, Canonicalize(), InsertKvCache())


def test_before_and_after() -> None:
    program = cached(one_mlp)
    dense = snapshot(program.graphs[DENSE])
    assert_prints(
        program.graphs[DENSE],
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
        %16: model[B, T, 10] = aten.linear(%15, %layers.0.gate.weight)
        %17: model[B, T, 10] = aten.silu(%16)
        %18: model[B, T, 10] = aten.linear(%15, %layers.0.up.weight)
        %19: model[B, T, 10] = aten.mul.Tensor(%17, %18)
        %20: model[B, T, 6] = aten.linear(%19, %layers.0.down.weight)
        %21: model[B, T, 6] = aten.add.Tensor(%15, %20)
        %22: model[B, T, 11] = aten.linear(%21, %head.weight)
        return logits=%22
        """,
    )
    expect = {
        "prefill/aten.gather": (0, 1),
        "full/aten.gather": (0, 0),
        "sparse/aten.gather": (0, 0),
        "aten.linear": (4, 12),
    }
    assert check_pass(program, PairPaths(), expect=expect).rewrites == 3
    assert list(program.graphs) == [PREFILL, SPARSE, FULL]
    assert snapshot(program.graphs[FULL]) == snapshot(program.graphs[SPARSE]) == dense
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
        %17: model[B, T, 10] = aten.linear(%16, %layers.0.gate.weight)
        %18: model[B, T, 10] = aten.silu(%17)
        %19: model[B, T, 10] = aten.linear(%16, %layers.0.up.weight)
        %20: model[B, T, 10] = aten.mul.Tensor(%18, %19)
        %21: model[B, T, 6] = aten.linear(%20, %layers.0.down.weight)
        %22: model[B, T, 6] = aten.add.Tensor(%16, %21)
        %23: int64[B, 1, 1] = aten.view(%last, [-1, 1, 1])
        %24: int64[B, 1, 6] = aten.expand(%23, [-1, -1, 6])
        %25: model[B, 1, 6] = aten.gather(%22, 1, %24)
        %26: model[B, 1, 11] = aten.linear(%25, %head.weight)
        return logits=%26
        """,
    )


def test_with_attention_prefill_gives_the_last_logits_of_each_row() -> None:
    check = check_pass(cached(two_layers), PairPaths())
    assert check.differences.keys() == {"prefill.logits", "sparse.logits", "full.logits"}


def test_the_paths_read_the_same_weights() -> None:
    program = cached(two_layers)
    weights = list(program.weights)
    check_pass(program, PairPaths())
    for module in program.graphs.values():
        assert list(placeholders(module.graph, WEIGHT)) == weights == list(program.weights)


def test_the_paths_share_no_nodes() -> None:
    program = cached(one_mlp)
    check_pass(program, PairPaths())
    nodes = [set(module.graph.nodes) for module in program.graphs.values()]
    assert len(set.union(*nodes)) == sum(map(len, nodes))


class Capped(Decoder):
    """Logits with a softcap after the head, like Gemma 2's."""

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return (super().forward(input_ids, positions) / 3.0).tanh() * 3.0


def test_what_follows_the_head_is_kept_and_done_for_one_token() -> None:
    program = cached(lambda: Capped(Mlp()))
    check_pass(program, PairPaths(), expect={"prefill/aten.tanh": (0, 1)})
    (logits,) = program.graphs[PREFILL].graph.output_node().args[0]
    assert logits.meta["val"].shape[1:] == (1, VOCABULARY)


class TwoHeads(Decoder):
    """Logits that are the sum of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return super().forward(input_ids, positions) + self.second(self.embed(input_ids))


def test_logits_of_two_heads_are_refused_by_name() -> None:
    program = cached(TwoHeads)
    with pytest.raises(
        UnsupportedModelError, match=r"not made by one linear: add_1 \(aten.add.Ten"
    ):
        check_pass(program, PairPaths())
