"""recognise_mlps: an MLP becomes one operator; anything else is refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.program import DENSE, Program, calls
from sirius_passes.recognise_mlps import DENSE_MLP, RecogniseMlps
from sirius_passes.testing import check_pass
from sirius_runtime.errors import UnsupportedModelError
from tests.support.fast import gate_but, slow_but
from tests.support.graphs import (
    HIDDEN,
    NEURONS,
    Attention,
    Decoder,
    FusedMlp,
    Mlp,
    Plain,
    after,
    assert_prints,
)


def canonical(*layers: Callable[[], nn.Module]) -> Program:
    return after(lambda: Decoder(*(layer() for layer in layers)), Canonicalize())


def test_before_and_after() -> None:
    program = canonical(Mlp)
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %8: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %9: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %10: model[B, T, 6] = aten.add.Tensor(%8, %9)
        %11: model[B, T, 10] = aten.linear(%10, %layers.0.gate.weight)
        %12: model[B, T, 10] = aten.silu(%11)
        %13: model[B, T, 10] = aten.linear(%10, %layers.0.up.weight)
        %14: model[B, T, 10] = aten.mul.Tensor(%12, %13)
        %15: model[B, T, 6] = aten.linear(%14, %layers.0.down.weight)
        %16: model[B, T, 6] = aten.add.Tensor(%10, %15)
        %17: model[B, T, 11] = aten.linear(%16, %head.weight)
        return logits=%17
        """,
    )
    expect = {"sirius.dense_mlp": (0, 1), "aten.linear": (4, 1), "aten.silu": (1, 0)}
    assert check_pass(program, RecogniseMlps(), expect=expect).rewrites == 1
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %8: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %9: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %10: model[B, T, 6] = aten.add.Tensor(%8, %9)
        %11: model[10, 6] = aten.t(%layers.0.down.weight)
        %12: model[B, T, 6] = sirius.dense_mlp(%10, %layers.0.gate.weight, %layers.0.up.weight, %11, None, None, None, 'silu', 0)
        %13: model[B, T, 6] = aten.add.Tensor(%10, %12)
        %14: model[B, T, 11] = aten.linear(%13, %head.weight)
        return logits=%14
        """,  # noqa: E501
    )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@pytest.mark.parametrize(
    ("act", "bias"),
    gate_but(product(ACTIVATIONS, (False, True)), {("silu", True), ("gelu_tanh", False)}),
)
def test_activations_and_biases(act: str, bias: bool) -> None:
    program = canonical(lambda: Mlp(ACTIVATIONS[act], bias=bias))
    check_pass(program, RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1)})
    (mlp,) = calls(program.graphs[DENSE].graph, DENSE_MLP)
    *_, gate_bias, up_bias, down_bias, name, _layer = mlp.args
    assert name == act
    assert [b is not None for b in (gate_bias, up_bias, down_bias)] == [bias] * 3


def test_a_plain_mlp_before_and_after() -> None:
    program = canonical(Plain)
    expect = {"sirius.dense_mlp": (0, 1), "aten.linear": (3, 1), "aten.gelu": (1, 0)}
    assert check_pass(program, RecogniseMlps(), expect=expect).rewrites == 1
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %9: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %10: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %11: model[B, T, 6] = aten.add.Tensor(%9, %10)
        %12: model[10, 6] = aten.t(%layers.0.fc2.weight)
        %13: model[B, T, 6] = sirius.dense_mlp(%11, %layers.0.fc1.weight, None, %12, %layers.0.fc1.bias, None, %layers.0.fc2.bias, 'gelu', 0)
        %14: model[B, T, 6] = aten.add.Tensor(%11, %13)
        %15: model[B, T, 11] = aten.linear(%14, %head.weight)
        return logits=%15
        """,  # noqa: E501
    )


class Flattened(Plain):
    """Over [B*T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1]).tanh()).view(x.shape)


def test_flattened_tokens_are_given_their_rows_back() -> None:
    program = canonical(Flattened)
    check_pass(program, RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1)})
    (mlp,) = calls(program.graphs[DENSE].graph, DENSE_MLP)
    rows, tokens, _ = mlp.args[0].meta["val"].shape
    assert (rows, tokens) == program.graphs[DENSE].graph.find_nodes(op="placeholder")[-1].meta[
        "val"
    ].shape


SPELLINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gelu by erf": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu by tanh": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3.0))),
    ),
    "gelu by a short tanh": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    ),
    "gelu by sigmoid": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu by sigmoid": ("silu", lambda x: x * x.sigmoid()),
    "silu by exp, in float32": (
        "silu",
        lambda x: (x.float() / (1 + torch.exp(-x.float()))).to(x.dtype),
    ),
    "relu by clamp": ("relu", lambda x: x.clamp(min=0)),
    "relu squared": ("relu2", lambda x: F.relu(x).square()),
    "relu to the power of 2": ("relu2", lambda x: F.relu(x).pow(2)),
    "relu times relu": ("relu2", lambda x: F.relu(x) * F.relu(x)),
}


@pytest.mark.parametrize("mlp", slow_but((Mlp, Plain), {Mlp}))
@pytest.mark.parametrize(
    "case",
    gate_but(
        SPELLINGS,
        {"gelu by erf", "gelu by a short tanh", "silu by exp, in float32"},
    ),
)
def test_an_activation_is_what_it_computes(case: str, mlp: type[Mlp | Plain]) -> None:
    name, function = SPELLINGS[case]
    program = canonical(lambda: mlp(function))
    check_pass(
        program,
        RecogniseMlps(),
        expect={"sirius.dense_mlp": (0, 1), "aten.linear": (1 + (3 if mlp is Mlp else 2), 1)},
    )
    (found,) = calls(program.graphs[DENSE].graph, DENSE_MLP)
    assert found.args[-2] == name


def test_the_layer_is_that_of_the_attention_before() -> None:
    def layers() -> Decoder:
        return Decoder(Attention(0), Plain(torch.tanh), Attention(1), Mlp(), Attention(2), Plain())

    program = after(layers, Canonicalize())
    assert check_pass(program, RecogniseMlps()).rewrites == 2
    assert [n.args[-1] for n in calls(program.graphs[DENSE].graph, DENSE_MLP)] == [1, 2]


class Parallel(nn.Module):
    """Attention and an MLP over the same input."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(layer), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + self.mlp(x)


def test_an_mlp_beside_attention() -> None:
    program = after(lambda: Decoder(Parallel(0), Parallel(1)), Canonicalize())
    expect = {"sirius.dense_mlp": (0, 2), "aten.linear": (15, 9)}
    check_pass(program, RecogniseMlps(), expect=expect)
    assert [n.args[-1] for n in calls(program.graphs[DENSE].graph, DENSE_MLP)] == [0, 1]


class UpFirst(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.act(self.gate(x)))


def test_up_may_come_before_gate() -> None:
    check_pass(canonical(UpFirst), RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1)})


def test_a_fused_gate_up_is_recognised_once_it_is_split() -> None:
    program = canonical(lambda: FusedMlp(lambda y: y.chunk(2, -1), bias=True))
    check_pass(
        program, RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1), "aten.slice.Tensor": (4, 4)}
    )


class ReadsInside(Mlp):
    """A gated MLP with an inner value that has a reader outside of it."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        inner = {"gate": gate, "up": up, "activated": F.silu(gate)}
        inner["product"] = inner["activated"] * up
        return self.down(inner["product"]) + inner[self.which].sum(-1, keepdim=True)


class TwoInputs(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x.tanh()))


class UpIsNoLinear(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x).tanh())


class OneLinear(Mlp):
    """x · silu(x) of one linear, so gate and up are the same node."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(F.silu(gate) * gate)


class Router(nn.Module):
    """Routing weights of three experts, computed by two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, NEURONS), nn.Linear(NEURONS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x))).softmax(-1)[..., :1] * x


class GatedAttention(nn.Module):
    """Values times a gate, then projected: no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.gate, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.v(x) * self.gate(x).sigmoid())


class LastToken(Plain):
    """Over each row's last token, [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x[:, -1])[:, None]


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unknown activation of two matrices": (
        lambda: Plain(torch.tanh),
        "aten.tanh.default is not a known activation",
    ),
    "a router": (Router, "3 features come out, but 6 go in"),
    "gated attention": (GatedAttention, "aten.sigmoid.default is not a known activation"),
    "over a part of the tokens": (
        LastToken,
        r"its input \[.*, 6\] is neither \[B, T, C\] nor \[B\*T, C\]",
    ),
    **{
        f"{which} read elsewhere": (
            lambda which=which: ReadsInside(which),
            f"{name} inside the MLP is read from outside it",
        )
        for which, name in {
            "gate": "linear",
            "up": "linear_1",
            "activated": "silu",
            "product": "mul",
        }.items()
    },
    "different inputs": (TwoInputs, r"gate and up read different inputs, \w+ and tanh"),
    "up is no linear": (UpIsNoLinear, r"gate or up is not a linear"),
    "gate is up": (OneLinear, "aten.mul.Tensor is not a known activation"),
    "unknown activation": (lambda: Mlp(torch.tanh), "aten.tanh.default is not a known activation"),
    "scaled activation": (
        lambda: Mlp(lambda x: F.silu(x) * 2),
        "aten.mul.Tensor is not a known activation",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_model_without_a_dense_mlp_is_refused_with_the_nearest_miss(case: str) -> None:
    layer, reason = NEAR_MISSES[case]
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        RecogniseMlps().run(canonical(layer))
    assert "--sparsity none" in str(refusal.value)


@pytest.mark.parametrize(
    "case", gate_but(NEAR_MISSES, {"a router", "gate read elsewhere", "different inputs"})
)
def test_near_misses_stay_beside_a_dense_mlp(case: str) -> None:
    layer, _ = NEAR_MISSES[case]
    program = canonical(layer, Mlp)
    linears = len(calls(program.graphs[DENSE].graph, torch.ops.aten.linear.default))
    expect = {"sirius.dense_mlp": (0, 1), "aten.linear": (linears, linears - 3)}
    assert check_pass(program, RecogniseMlps(), expect=expect).rewrites == 1


def test_run_again_it_finds_the_operators_there_and_does_not_refuse() -> None:
    program = canonical(Mlp)
    assert [RecogniseMlps().run(program) for _ in range(2)] == [1, 0]
