"""insert_kv_cache: attention reads and writes a KV cache; the logits of chains and trees stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.program import DENSE, calls
from sirius_passes.testing import check_pass
from sirius_runtime.graph import INPUT, placeholders
from tests.support.fast import gate_but
from tests.support.graphs import Attention, Decoder, after, assert_prints, two_layers


def test_before_and_after() -> None:
    program = after(lambda: Decoder(Attention(0)), Canonicalize())
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %9: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %10: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %11: model[B, T, 6] = aten.add.Tensor(%9, %10)
        %12: model[B, T, 4] = aten.linear(%11, %layers.0.q.weight)
        %13: model[B, T, 2, 2] = aten.unflatten.int(%12, -1, [-1, 2])
        %14: model[B, 2, T, 2] = aten.transpose.int(%13, 1, 2)
        %15: model[B, T, 2] = aten.linear(%11, %layers.0.k.weight)
        %16: model[B, T, 1, 2] = aten.unflatten.int(%15, -1, [-1, 2])
        %17: model[B, 1, T, 2] = aten.transpose.int(%16, 1, 2)
        %18: model[B, T, 2] = aten.linear(%11, %layers.0.v.weight)
        %19: model[B, T, 1, 2] = aten.unflatten.int(%18, -1, [-1, 2])
        %20: model[B, 1, T, 2] = aten.transpose.int(%19, 1, 2)
        %21: model[B, 2, T, 2] = sirius.attention(%14, %17, %20, 0, 0.5, None, None)
        %22: model[B, T, 2, 2] = aten.transpose.int(%21, 1, 2)
        %23: model[B, T, 4] = aten.flatten.using_ints(%22, 2)
        %24: model[B, T, 6] = aten.linear(%23, %layers.0.o.weight)
        %25: model[B, T, 6] = aten.add.Tensor(%11, %24)
        %26: model[B, T, 11] = aten.linear(%25, %head.weight)
        return logits=%26
        """,
    )
    expect = {"sirius.attention": (1, 0), "sirius.cached_attention": (0, 1)}
    assert check_pass(program, InsertKvCache(), expect=expect).rewrites == 1
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
        %14: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %15: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %16: model[B, T, 6] = aten.add.Tensor(%14, %15)
        %17: model[B, T, 4] = aten.linear(%16, %layers.0.q.weight)
        %18: model[B, T, 2, 2] = aten.unflatten.int(%17, -1, [-1, 2])
        %19: model[B, 2, T, 2] = aten.transpose.int(%18, 1, 2)
        %20: model[B, T, 2] = aten.linear(%16, %layers.0.k.weight)
        %21: model[B, T, 1, 2] = aten.unflatten.int(%20, -1, [-1, 2])
        %22: model[B, 1, T, 2] = aten.transpose.int(%21, 1, 2)
        %23: model[B, T, 2] = aten.linear(%16, %layers.0.v.weight)
        %24: model[B, T, 1, 2] = aten.unflatten.int(%23, -1, [-1, 2])
        %25: model[B, 1, T, 2] = aten.transpose.int(%24, 1, 2)
        %26: model[B, 2, T, 2] = sirius.cached_attention(%19, %22, %25, %k_cache, %v_cache, %positions, %slots, %length, %tree_mask, 0, 0.5, None, None)
        %27: model[B, T, 2, 2] = aten.transpose.int(%26, 1, 2)
        %28: model[B, T, 4] = aten.flatten.using_ints(%27, 2)
        %29: model[B, T, 6] = aten.linear(%28, %layers.0.o.weight)
        %30: model[B, T, 6] = aten.add.Tensor(%16, %29)
        %31: model[B, T, 11] = aten.linear(%30, %head.weight)
        return logits=%31
        """,  # noqa: E501
    )


def test_every_layer_is_rewritten_and_nothing_else() -> None:
    program = after(two_layers, Canonicalize())
    check = check_pass(program, InsertKvCache())
    old, new = check.before[DENSE], check.after[DENSE]
    assert old.pop("sirius.attention") == new.pop("sirius.cached_attention") == 2
    assert old == new


@pytest.mark.parametrize(
    ("window", "softcap"), gate_but([(1, None), (3, None), (None, 0.5), (3, 0.5)], [(3, 0.5)])
)
def test_windows_and_softcaps_are_kept(window: int | None, softcap: float | None) -> None:
    program = after(lambda: Decoder(Attention(0, window, softcap)), Canonicalize())
    check_pass(program, InsertKvCache())
    (node,) = calls(program.graphs[DENSE].graph, torch.ops.sirius.cached_attention.default)
    assert node.args[-2:] == (window, softcap)


class Positionless(nn.Module):
    """Reads no positions; only the cache needs them as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(11, 6), Attention(0)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(input_ids)))


def test_inputs_are_added_once() -> None:
    inputs = ["input_ids", "positions", "slots", "length", "tree_mask", "k_cache", "v_cache"]
    for build in (lambda: Decoder(Attention(0)), Positionless):
        program = after(build, Canonicalize())
        check_pass(program, InsertKvCache())
        assert list(placeholders(program.graphs[DENSE].graph, INPUT)) == inputs


class OwnAttention(nn.Module):
    """The model's own attention over the heads of one token, not over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (3, 2))
        return ((heads @ heads.mT).softmax(-1) @ heads).flatten(2)


def test_other_attention_stays() -> None:
    program = after(lambda: Decoder(Attention(0), OwnAttention()), Canonicalize())
    expect = {"aten.matmul": (2, 2)}
    assert check_pass(program, InsertKvCache(), expect=expect).rewrites == 1


def test_sinks_are_kept() -> None:
    program = after(lambda: Decoder(Attention(0, 3, sinks=True)), Canonicalize())
    check_pass(program, InsertKvCache(), expect={"sirius.cached_attention": (0, 1)})
    (node,) = calls(program.graphs[DENSE].graph, torch.ops.sirius.cached_attention.default)
    assert node.args[-1].meta["weight"] == "layers.0.sinks"
