"""canonicalize: removes export noise, and splits a fused linear into one linear a slice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.program import DENSE
from sirius_passes.recognise_mlps import RecogniseMlps
from sirius_passes.testing import check_pass
from tests.support.fast import slow_but
from tests.support.graphs import HIDDEN, NEURONS, Decoder, FusedMlp, assert_prints, trace

Split = Callable[[Tensor], tuple[Tensor, Tensor]]


class Noisy(nn.Module):
    """A fused MLP between operators that have no effect at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FusedMlp(lambda y: (y[..., :NEURONS], y[..., NEURONS:]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1, training=False).to(torch.bfloat16)
        x.sum()  # dead
        return self.mlp(torch.ops.aten.alias(x)).detach()


def test_before_and_after() -> None:
    program = trace(lambda: Decoder(Noisy()))
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %7: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %8: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %9: model[B, T, 6] = aten.add.Tensor(%7, %8)
        %10: model[B, T, 6] = aten.dropout(%9, 0.1, False)
        %11: model[B, T, 6] = aten.to.dtype(%10, model)
        %12: model[] = aten.sum(%11)
        %13: model[B, T, 6] = aten.alias(%11)
        %14: model[B, T, 20] = aten.linear(%13, %layers.0.mlp.gate_up.weight)
        %15: model[B, T, 10] = aten.slice.Tensor(%14, 2, 0, 10)
        %16: model[B, T, 10] = aten.slice.Tensor(%14, 2, 10, 9223372036854775807)
        %17: model[B, T, 10] = aten.silu(%15)
        %18: model[B, T, 10] = aten.mul.Tensor(%17, %16)
        %19: model[B, T, 6] = aten.linear(%18, %layers.0.mlp.down.weight)
        %20: model[B, T, 6] = aten.detach(%19)
        %21: model[B, T, 6] = aten.add.Tensor(%9, %20)
        %22: model[B, T, 11] = aten.linear(%21, %head.weight)
        return logits=%22
        """,
    )
    check = check_pass(program, Canonicalize(), expect={"aten.linear": (3, 4)})
    assert check.rewrites == 6  # dropout, to, sum, alias, detach; one linear split
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %7: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %8: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %9: model[B, T, 6] = aten.add.Tensor(%7, %8)
        %10: model[10, 6] = aten.slice.Tensor(%layers.0.mlp.gate_up.weight, 0, 0, 10)
        %11: model[B, T, 10] = aten.linear(%9, %10)
        %12: model[10, 6] = aten.slice.Tensor(%layers.0.mlp.gate_up.weight, 0, 10, 20)
        %13: model[B, T, 10] = aten.linear(%9, %12)
        %14: model[B, T, 10] = aten.silu(%11)
        %15: model[B, T, 10] = aten.mul.Tensor(%14, %13)
        %16: model[B, T, 6] = aten.linear(%15, %layers.0.mlp.down.weight)
        %17: model[B, T, 6] = aten.add.Tensor(%9, %16)
        %18: model[B, T, 11] = aten.linear(%17, %head.weight)
        return logits=%18
        """,
    )


SPLITS: dict[str, Split] = {
    "slices": lambda y: (y[..., :NEURONS], y[..., NEURONS:]),
    "swapped": lambda y: (y[..., NEURONS:], y[..., :NEURONS]),
    "negative": lambda y: (y[..., :-NEURONS], y[..., -NEURONS:]),
    "out of range": lambda y: (y[..., -99:NEURONS], y[..., -NEURONS:99]),
    "overlapping": lambda y: (y[..., :NEURONS], y[..., 3 : 3 + NEURONS]),
    "not all": lambda y: (y[..., 1:-9], y[..., 9:-1]),
    "chunk": lambda y: y.chunk(2, -1),
    "chunk, dim from the front": lambda y: y.chunk(2, 2),
    "split": lambda y: y.split(NEURONS, -1),
    "split with sizes": lambda y: y.split([NEURONS, NEURONS], -1),
}


@pytest.mark.parametrize(
    ("split", "bias"),
    slow_but(
        product(SPLITS, (False, True)),
        {("slices", False), ("negative", False), ("split", False), ("chunk", True)},
        [*((split, False) for split in SPLITS), ("slices", True)],
    ),
)
def test_a_fused_linear_is_split(split: str, bias: bool) -> None:
    program = trace(lambda: Decoder(FusedMlp(SPLITS[split], bias=bias)))
    check = check_pass(program, Canonicalize(), expect={"aten.linear": (3, 4)})
    assert not check.after[DENSE].keys() & {"aten.chunk", "aten.split.Tensor", "getitem"}


NOT_FEATURE_SLICES: dict[str, Split] = {
    "also read whole": lambda y: (y[..., :NEURONS], y[..., NEURONS:] + y.sum(-1, keepdim=True)),
    "also along tokens": lambda y: (y[..., :NEURONS], y[:, :1].tanh()[..., NEURONS:]),
    "every other feature": lambda y: (y[..., ::2], y[..., 1::2]),
    "by a view": lambda y: y.unflatten(-1, (2, NEURONS)).unbind(-2),
}


@pytest.mark.parametrize("split", NOT_FEATURE_SLICES)
def test_a_linear_that_is_not_only_sliced_stays(split: str) -> None:
    program = trace(lambda: Decoder(FusedMlp(NOT_FEATURE_SLICES[split])))
    assert check_pass(program, Canonicalize(), expect={"aten.linear": (3, 3)}).rewrites == 0


class ComputedWeight(FusedMlp):
    """The fused weight is computed, so it is not in the weight table."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up.weight * 2).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def test_a_linear_over_a_computed_weight_stays() -> None:
    program = trace(lambda: Decoder(ComputedWeight(SPLITS["chunk"])))
    assert check_pass(program, Canonicalize(), expect={"aten.linear": (3, 3)}).rewrites == 0


class Lambda(nn.Module):
    """A layer without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def test_a_cast_to_another_dtype_stays() -> None:
    program = trace(lambda: Decoder(Lambda(lambda x: x.to(torch.float32).exp().to(x.dtype))))
    assert check_pass(program, Canonicalize(), expect={"aten.to.dtype": (2, 2)}).rewrites == 0


def test_contiguous_goes_only_where_it_copies_nothing() -> None:
    def layer(x: Tensor) -> Tensor:
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        return turned + torch.ops.aten.contiguous(x)

    program = trace(lambda: Decoder(Lambda(layer)))
    assert check_pass(program, Canonicalize(), expect={"aten.contiguous": (2, 1)}).rewrites == 1


class Columns(nn.Module):
    """x @ weight + bias over flattened tokens, like transformers' Conv1D."""

    def __init__(self, features: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN, features))
        self.bias = nn.Parameter(torch.empty(features))

    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).view(*x.shape[:-1], self.weight.shape[1])


def test_a_product_with_columns_before_and_after() -> None:
    program = trace(lambda: Decoder(Columns()))
    expect = {"aten.addmm": (1, 0), "aten.linear": (1, 2), "aten.view": (2, 0), "aten.t": (0, 1)}
    check_pass(program, Canonicalize(), expect=expect)
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %7: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %8: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %9: model[B, T, 6] = aten.add.Tensor(%7, %8)
        %10: model[6, 6] = aten.t(%layers.0.weight)
        %11: model[B, T, 6] = aten.linear(%9, %10, %layers.0.bias)
        %12: model[B, T, 6] = aten.add.Tensor(%9, %11)
        %13: model[B, T, 11] = aten.linear(%12, %head.weight)
        return logits=%13
        """,
    )


class ColumnsInThree(Columns):
    """Three fused products, split along their features."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = super().forward(x).chunk(3, -1)
        return a.tanh() * b + c


def test_fused_columns_are_split() -> None:
    program = trace(lambda: Decoder(ColumnsInThree(3 * HIDDEN)))
    check_pass(program, Canonicalize(), expect={"aten.linear": (1, 4), "aten.slice.Tensor": (0, 6)})


class ColumnsStayFlat(Columns):
    """The flat product [B*T, C] has another reader."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return (y + y.mean(0)).view(x.shape)


def test_a_product_that_stays_flat_is_a_linear_over_flat_tokens() -> None:
    program = trace(lambda: Decoder(ColumnsStayFlat()))
    expect = {"aten.addmm": (1, 0), "aten.linear": (1, 2), "aten.view": (2, 2)}
    check_pass(program, Canonicalize(), expect=expect)


class ComputedColumns(Columns):
    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight * 2)


class ScaledColumns(Columns):
    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight, beta=2)


@pytest.mark.parametrize("layer", [ComputedColumns, ScaledColumns])
def test_a_product_that_is_no_linear_over_a_weight_stays(layer: type[Columns]) -> None:
    program = trace(lambda: Decoder(layer()))
    assert check_pass(program, Canonicalize(), expect={"aten.addmm": (1, 1)}).rewrites == 0


@pytest.mark.gate
def test_phi3_is_split_into_q_k_v_gate_and_up() -> None:
    from transformers import Phi3Config

    from sirius_compile.capture import capture

    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 16, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    program = capture(Phi3Config(**sizes, **heads, eos_token_id=1)).program
    check_pass(program, Canonicalize(), expect={"aten.linear": (9, 15), "aten.dropout": (4, 0)})
    assert len(program.weights) == 16  # as captured: the slices are views
    check_pass(program, RecogniseMlps(), expect={"sirius.dense_mlp": (0, 2)})
